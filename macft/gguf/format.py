"""From a .gguf file on disk: its metadata fields, and where each tensor's bytes lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from macft.errors import ModelError

# GGUF value types 0..12 that are one number, as `struct` spells them
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is outermost first (rows before columns), `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A checked header; `data` is the whole file, mapped read-only [bytes]."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    def number(self, key: str, default: Any = None) -> Any:
        """A field that must be one number; ModelError when it is a list, text or flag."""
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, type(default))):
            raise ModelError(f"{self.path}: {key} is {str(value)[:60]}, one number was expected")
        return value

    def text(self, key: str) -> str | None:
        """A field that must be text, or None where the file has none; ModelError for anything else."""
        value = self.fields.get(key)
        if not isinstance(value, (str, type(None))):
            raise ModelError(f"{self.path}: {key} is {str(value)[:60]}, text was expected")
        return value

    def packed(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor as stored, [rows, bytes per row]; a vector is one row."""
        flat = self.data[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
        return flat.reshape(rows, -1)


def read_gguf(path: Path) -> GgufFile:
    """Read and check a header (GGUF version 2 or 3, little-endian).

    Raises ModelError for anything else: another kind of file, one cut short, one with lengths that lie.
    """
    try:
        size = path.stat().st_size
        if size < 24:
            raise ModelError(f"{path}: {size} bytes is too short for a GGUF file; download it again")
        data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise ModelError(f"{path}: cannot read the model: {error.strerror or error}") from None
    try:
        return _parse(path, data)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(f"{path}: the GGUF header is cut short or damaged ({error}); download it again") from None


def _parse(path: Path, data: np.ndarray[Any, np.dtype[np.uint8]]) -> GgufFile:
    header = _Cursor(data.data)
    magic = header.take(4)
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, a GGUF file with b'GGUF')")
    version = header.number("I")
    if version not in (2, 3):
        found = "a big-endian file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise ModelError(f"{path}: {found}; versions 2 and 3, little-endian, can be read: convert the model again")
    num_tensors, num_fields = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = header.text()
        fields[key] = header.value(header.number("I"))
    entries = [_tensor_entry(path, header) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"{path}: general.alignment is {alignment!r}, a positive number was expected")
    start = -(-header.offset // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ModelError(
                f"{path}: {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}"
            )
        num_bytes = int(np.prod(shape, dtype=object)) // block * block_bytes
        if start + offset + num_bytes > data.size:
            raise ModelError(
                f"{path}: cut short: {name} ends at byte {start + offset + num_bytes}, "
                f"the file has {data.size}; download it again"
            )
        tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)
    if len(tensors) != len(entries):
        raise ModelError(f"{path}: {len(entries) - len(tensors)} tensor names appear twice; the file is damaged")
    return GgufFile(path, fields, tensors, data)


def _tensor_entry(path: Path, header: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = header.text()
    num_dimensions = header.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name!r} has {num_dimensions} dimensions, 1 to 4 were expected")
    shape = tuple(header.number("Q") for _ in range(num_dimensions))[::-1]
    code = header.number("I")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise ModelError(
            f"{path}: {name} has quantization type {code}, which the installed gguf package does not know; "
            "upgrade it (pip install -U gguf) or give an F16 or Q8_0 file"
        ) from None
    return name, shape, kind, int(header.number("Q"))


class _Cursor:
    """Reads values one after another; struct.error when the buffer ends first."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.offset = 0

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self.buffer):
            raise struct.error(f"{count} bytes expected at {self.offset}, the file has {len(self.buffer)}")
        taken = bytes(self.buffer[self.offset : end])
        self.offset = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise struct.error(f"unknown value type {kind} at byte {self.offset}")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            code = _SCALARS[item]
            content = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", content))
        if count > len(self.buffer):
            raise struct.error(f"an array of {count} items at byte {self.offset}")
        return [self.value(item) for _ in range(count)]
