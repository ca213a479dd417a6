"""Describe a model folder on disk and identify its weights by a hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from macft.errors import ModelError, raise_problems
from macft.weights.tensors.safetensors import MAX_HEADER

_POINTER = b"version https://git-lfs"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: the name as typed, and a folder in HF or MLX layout."""

    name: str
    path: Path


def weights_hash(folder: Path) -> str:
    """A SHA-256 (hex) that identifies a model's weights, without reading all of them.

    It covers, of each file that counts, in order of name: name, size, header, 64 spread samples of 4 KiB.
    """
    digest = hashlib.sha256()
    paths = sorted(model_files(folder)[0]) if any(weight_files(folder)) else []
    if not paths:
        raise ModelError(f"{folder}: no *.safetensors files to hash; {listing(folder)}")
    for path in paths:
        if problem := damage(path):
            raise ModelError(f"{path}: {problem}")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name}\0{size}\0".encode())
            digest.update(file.read(length))
            # a fine-tuned copy has the same names and shapes as its base: only numbers tell them apart
            for index in range(64):
                file.seek(8 + length + (size - 8 - length) * index // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def damage(path: Path) -> str | None:
    """Why a weights file cannot be whole, by its size and header; None if nothing is wrong with these."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start + file.read(len(_POINTER) - 8) == _POINTER:
            return "only a pointer of git-lfs, not the weights; run git lfs pull there"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            return f"not a safetensors file, or cut short ({size} bytes); download it again"
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        missing = 8 + length + max(ends, default=0) - size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None  # whoever reads the tensors says what is wrong
    return f"cut short: the last {missing} bytes are missing; download it again" if missing > 0 else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder, except an adapter's."""
    return [file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter")]


def pickle_problem(folder: Path) -> str | None:
    """Why the weights in a folder cannot be read, when they are pickled."""
    names = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not names:
        return None
    return (
        f"its weights are pickled ({names[0]}), and unpickling runs code from the file; convert them: load the model "
        "with transformers in an environment you trust and save_pretrained() it again"
    )


def listing(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    names = sorted(file.name for file in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"found {shown}" if names else "the folder is empty"


def token_ids(folder: Path) -> dict[str, int] | None:
    """The id of each token in a folder's tokenizer.json, added ones included; None without a readable one."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        # Unigram has a list of [token, score]
        known = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
        return {**known, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def model_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the model, and the file of each tensor where only an index says which they are.

    A whole model.safetensors counts before an index and its shards, as in transformers; without either all
    model*.safetensors do, else all but adapters. ModelError where files are missing, pickled or outside the folder.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE], {}
    index = _read_index(folder)
    if index:
        return _indexed_files(folder, index), index
    found = sorted(folder.glob("model*.safetensors")) or sorted(weight_files(folder))
    if found:
        return found, {}
    raise ModelError(f"{folder}: {pickle_problem(folder) or 'no *.safetensors weights; expected a model folder'}")


def has_two_sets(folder: Path) -> bool:
    """Whether an index beside a whole model.safetensors names other files, which are not read."""
    try:
        return (folder / WHOLE).is_file() and bool({*_read_index(folder).values()} - {WHOLE})
    except ModelError:
        return True


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor according to the index; empty without an index."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f'{path}: no "weight_map" from tensors to file names; download it again')
    return weight_map


def _indexed_files(folder: Path, index: dict[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    outside = [f"{name!r} is not a file name inside the folder" for name in names if not _is_inside(name)]
    raise_problems(f"{folder / INDEX}: refused", outside)
    foreign = [name for name in names if not name.endswith(".safetensors")]
    if foreign:
        raise ModelError(
            f"{folder / INDEX}: names {foreign[0]}, which is not a .safetensors file; nothing else is read"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    headline = f"{folder}: {len(missing)} of {len(names)} weight files are missing; download it again"
    raise_problems(headline, missing)
    return [folder / name for name in names]


def _is_inside(name: str) -> bool:
    # judged by the name only: the hub cache links its files to another folder
    if "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts
