"""Read and write safetensors files: headers are checked at once, tensors read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from macft.errors import ModelError, raise_problems
from macft.files import new_file
from macft.weights.tensors.lazy import Array, LazyTensor, cast, from_array, mapped_tensor

MAX_HEADER = 100_000_000  # bytes, the limit of the format

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# read, to be dequantized, and never written
FP8_DTYPES: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_READABLE = {**DTYPES, **FP8_DTYPES}

_FROM_TORCH = {"format": "pt"}  # what transformers asks of a safetensors file


@dataclass(frozen=True)
class SafetensorsFile:
    """One checked file: its metadata, and its tensors in the order of their bytes."""

    metadata: dict[str, str]
    tensors: list[LazyTensor]


def header_bytes(tensors: Iterable[LazyTensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors, in this order and without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        code = DTYPE_CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_state(
    path: Path,
    state: Mapping[str, Array],
    *,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] = _FROM_TORCH,
) -> None:
    """Write named arrays in order of name, converting one at a time to `dtype`; the file is complete or absent."""
    tensors = [cast(from_array(name, state[name]), np.dtype(dtype)) for name in sorted(state)]
    with new_file(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def write_safetensors(path: Path, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] = _FROM_TORCH) -> None:
    """Write the tensors in the order given.

    The file is written in place: put it in a folder that only counts when whole.
    """
    with path.open("wb") as file:
        file.write(header_bytes(tensors, metadata))
        for tensor in tensors:
            array = tensor.read()
            assert array.dtype == tensor.dtype and array.shape == tensor.shape, tensor.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header; ModelError lists everything wrong with it, and says what to do."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ModelError(f"{path}: not a safetensors file, or cut short ({size} bytes); download it again")
            encoded = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = _parse(path, encoded)
    metadata = header.pop("__metadata__", None) or {}
    problems: list[str] = []
    entries = [entry for name, value in header.items() if (entry := _entry(name, value, problems)) is not None]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    problems += _layout_problems(entries, size - 8 - length)
    raise_problems(f"{path}: a damaged safetensors file; download it again", problems)
    tensors = [mapped_tensor(path, entry.name, entry.dtype, entry.shape, 8 + length + entry.begin) for entry in entries]
    return SafetensorsFile(dict(metadata), tensors)


@dataclass(frozen=True)
class _HeaderEntry:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse(path: Path, encoded: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(encoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its header is not JSON ({error}); download it again") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict | None):
        raise ModelError(f"{path}: its header is not an object of tensors; download it again")
    return header


def _entry(name: str, value: Any, problems: list[str]) -> _HeaderEntry | None:
    """One tensor of the header, or None with the reason added to `problems`."""
    if not isinstance(value, dict):
        problems.append(f"{name}: described by {value!r}")
        return None
    dtype = _READABLE.get(str(value.get("dtype")))
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if dtype is None:
        problems.append(f"{name}: dtype {value.get('dtype')!r} cannot be read (accepted: {', '.join(_READABLE)})")
    if not _are_sizes(shape):
        problems.append(f"{name}: shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        problems.append(f"{name}: data_offsets {offsets!r}")
        return None
    if dtype is None or not _are_sizes(shape):
        return None
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        problems.append(f"{name}: {end - begin} bytes for {value['dtype']} {shape}")
        return None
    return _HeaderEntry(name, dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _layout_problems(entries: list[_HeaderEntry], data_bytes: int) -> list[str]:
    """Bytes that two tensors share, that belong to none, or that the file does not have."""
    position, problems = 0, []
    for entry in entries:
        if entry.end > data_bytes:
            problems.append(f"{entry.name}: ends at byte {entry.end}, the file has {data_bytes}: it was cut short")
        elif entry.begin != position:
            problems.append(f"{entry.name}: begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if not problems and position != data_bytes:
        problems.append(f"{data_bytes} bytes of data, the header describes {position}")
    return problems
