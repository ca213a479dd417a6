"""Store tables of tokenized rows as folders of plain arrays, and map them into memory."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from macft.data.notes import Note
from macft.data.tokenization.report import TokenizeReport, count_rows
from macft.data.tokenization.table import COLUMNS, Table
from macft.files import new_dir, new_file, write_json

_MANIFEST = "manifest.json"
_DTYPES = {"tokens": np.dtype("<i4"), "loss_mask": np.dtype("?"), "offsets": np.dtype("<i8"), "columns": COLUMNS}
# a .npy header is padded to this, so that it can be written when the length is known
_HEADER = 1024
_BLOCK = 1 << 22


def write_part(path: Path, table: Table) -> None:
    """Write a part of a future table into one file."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, width=np.array(table.width), **{name: getattr(table, name) for name in _DTYPES})


def read_part(path: Path) -> Table | None:
    """The table that `write_part` wrote, without its `files`; None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in _DTYPES}
            width = int(arrays["width"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    # another version names its columns differently
    return Table(**found, width=width) if all(found[name].dtype == _DTYPES[name] for name in found) else None


class _Array:
    """A growing array with its checksum and digest."""

    def __init__(self, dtype: np.dtype[Any], file: IO[bytes] | None) -> None:
        self._dtype = dtype
        self._file = file
        self.sha = hashlib.sha256()
        self.crc = 0
        self.count = 0
        if file is not None:
            file.write(bytes(_HEADER))

    def extend(self, values: np.ndarray) -> None:
        """Add values at the end."""
        self.count += len(values)
        data = np.ascontiguousarray(values, dtype=self._dtype).view(np.uint8).data
        self.sha.update(data)
        self.crc = zlib.crc32(data, self.crc)
        if self._file is not None:
            self._file.write(data)

    def end(self) -> None:
        """Write the header."""
        if self._file is not None:
            self._file.seek(0)
            self._file.write(_header(self._dtype, self.count))


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    start = np.lib.format.magic(1, 0) + (_HEADER - 10).to_bytes(2, "little")
    return start + repr(described).encode().ljust(_HEADER - 11) + b"\n"


def _extend(arrays: dict[str, _Array], part: Table) -> None:
    """Append the rows of a table; its offsets continue the earlier ones."""
    before = arrays["tokens"].count
    for name in _DTYPES:
        if name == "offsets":
            arrays[name].extend(part.offsets[1 if arrays[name].count else 0 :] + before)
        else:
            arrays[name].extend(getattr(part, name))


def _digest(arrays: dict[str, _Array], width: int) -> str:
    # the places of rows in their files, and their counts, do not identify them
    parts = [str(width), *(arrays[name].sha.hexdigest() for name in ("tokens", "loss_mask", "offsets"))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def with_digest(table: Table) -> Table:
    """The table with the digest that it would have on disk."""
    arrays = {name: _Array(dtype, None) for name, dtype in _DTYPES.items()}
    _extend(arrays, table)
    return replace(table, digest=_digest(arrays, table.width))


def write_table(
    folder: Path, parts: Iterable[Table], width: int, files: Mapping[str, int], notes: Sequence[Note]
) -> None:
    """Write the rows of all parts as one table, with the notes to repeat whenever it is read."""
    with new_dir(folder) as temporary:
        with ExitStack() as stack:
            files_of = {n: stack.enter_context((temporary / f"{n}.npy").open("wb")) for n in _DTYPES}
            arrays = {name: _Array(_DTYPES[name], file) for name, file in files_of.items()}
            for part in parts:
                _extend(arrays, part)
            for array in arrays.values():
                array.end()
        sums = {name: {"count": array.count, "crc32": array.crc} for name, array in arrays.items()}
        digest = _digest(arrays, width)
        manifest = {
            "width": width,
            "digest": digest,
            "arrays": sums,
            "notes": [[files[note.path], note.text] for note in notes],
        }
        table = _mapped(temporary, manifest, ())
        report = TokenizeReport()
        count_rows(report, table, np.arange(len(table)))
        write_json(temporary / _MANIFEST, manifest | {"report": asdict(report)})


def read_table(folder: Path, files: Sequence[str]) -> tuple[Table, list[Note]] | None:
    """(the table, mapped from disk; its notes); None if the folder is missing or damaged. `files`: see Table."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        for name, found in manifest["arrays"].items():
            if _checksum(folder / f"{name}.npy") != found["crc32"]:
                return None
        table = _mapped(folder, manifest, files)
        notes = [Note(str(text), files[file]) for file, text in manifest["notes"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return table, notes


def table_bytes(folder: Path) -> int:
    """The size of a table on disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _mapped(folder: Path, manifest: dict[str, Any], files: Sequence[str]) -> Table:
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in _DTYPES.items():
        count = manifest["arrays"][name]["count"]
        path = folder / f"{name}.npy"
        # an empty file cannot be mapped
        mapped = np.load(path, mmap_mode="r" if count else None, allow_pickle=False)
        if mapped.dtype != dtype or mapped.shape != (count,):
            raise ValueError(f"{path}: not what the manifest says")
        # plain arrays are sliced much faster than np.memmap
        arrays[name] = np.asarray(mapped)
    # every plan reads them: copied to avoid page faults
    arrays["columns"] = np.array(arrays["columns"])
    return Table(**arrays, width=int(manifest["width"]), files=tuple(files), digest=str(manifest["digest"]))


def _checksum(path: Path) -> int:
    """The checksum of the values, read rather than mapped: mapped pages would count as used memory."""
    crc = 0
    with path.open("rb") as file:
        file.seek(_HEADER)
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc
