"""Read and write the header of a GGUF file: metadata fields, and the shape, type and place of each tensor."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as GgmlType

from macft.errors import ModelError
from macft.weights.tensors.lazy import Array, LazyTensor

ALIGNMENT = 32  # bytes, for the first number of each tensor

_MAGIC = b"GGUF"
_READABLE_VERSIONS = (2, 3)
_WRITTEN_VERSION = 3
# GGUF value types that are one number, as `struct` and numpy spell them
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALAR_OF_DTYPE = {np.dtype(code): kind for kind, code in _SCALARS.items()}
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 4

# the tensor types that are plain arrays of a numpy type
PLAIN: dict[GgmlType, np.dtype[Any]] = {
    GgmlType.F32: np.dtype(np.float32),
    GgmlType.F16: np.dtype(np.float16),
    GgmlType.BF16: np.dtype(ml_dtypes.bfloat16),
}

Shape = tuple[int, ...]
# int: UINT32; float: FLOAT32; a numpy scalar: its own type; an array: ARRAY of its dtype; a list: ARRAY of STRING.
Field = str | bool | int | float | np.generic | Array | list[str]


@dataclass(frozen=True)
class GgufModel:
    """A model to be written: `fields` in file order; float `tensors` by their GGUF names, read when written."""

    architecture: str
    fields: dict[str, Field]
    tensors: list[LazyTensor]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is outermost first (rows before columns), `offset` counts from the file's start."""

    name: str
    shape: Shape
    kind: GgmlType
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
        """A field that must be a number; ModelError when it is a list, text or a flag."""
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, type(default))):
            raise ModelError(f"{self.path}: {key} is {str(value)[:60]}, a number was expected")
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

    Raises ModelError for any other kind of file, one that is cut short, and one whose lengths are wrong.
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
    if magic != _MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}, a GGUF file with b'GGUF')")
    version = header.number("I")
    if version not in _READABLE_VERSIONS:
        found = "a big-endian file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise ModelError(f"{path}: {found}; versions 2 and 3, little-endian, can be read: convert the model again")
    num_tensors, num_fields = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = header.text()
        fields[key] = header.value(header.number("I"))
    entries = [_tensor_entry(path, header) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"{path}: general.alignment is {alignment!r}, a positive number was expected")
    start = -(-header.offset // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        block, _ = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ModelError(
                f"{path}: {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}"
            )
        num_bytes = tensor_bytes(kind, shape)
        if start + offset + num_bytes > data.size:
            raise ModelError(
                f"{path}: cut short: {name} ends at byte {start + offset + num_bytes}, "
                f"the file has {data.size}; download it again"
            )
        tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)
    if len(tensors) != len(entries):
        raise ModelError(f"{path}: {len(entries) - len(tensors)} tensor names appear twice; the file is damaged")
    return GgufFile(path, fields, tensors, data)


def _tensor_entry(path: Path, header: _Cursor) -> tuple[str, Shape, GgmlType, int]:
    name = header.text()
    num_dimensions = header.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ModelError(f"{path}: tensor {name!r} has {num_dimensions} dimensions, 1 to 4 were expected")
    shape = tuple(header.number("Q") for _ in range(num_dimensions))[::-1]
    code = header.number("I")
    try:
        kind = GgmlType(code)
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


# --- writing


def tensor_bytes(kind: GgmlType, shape: Shape) -> int:
    """How many bytes the numbers take, without padding."""
    return prod(quant_shape_to_byte_shape(shape, kind))


def padding(count: int) -> int:
    """How many bytes are missing to the next multiple of the alignment."""
    return -count % ALIGNMENT


def header_bytes(fields: Mapping[str, Field], tensors: Iterable[tuple[str, Shape, GgmlType]]) -> bytes:
    """All bytes before the numbers of the first tensor; the tensors follow in the order given, each padded.

    Shapes are numpy's, outermost axis first. Raises ModelError for a field whose text is not valid Unicode.
    """
    infos, offset, count = bytearray(), 0, 0
    for name, shape, kind in tensors:
        infos += _string(name, name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", int(kind), offset)
        nbytes = tensor_bytes(kind, shape)
        offset += nbytes + padding(nbytes)
        count += 1
    header = bytearray(_MAGIC + struct.pack("<IQQ", _WRITTEN_VERSION, count, len(fields)))
    for key, value in fields.items():
        header += _string(key, key) + _typed(key, value)
    header += infos
    return bytes(header + bytes(padding(len(header))))


def _typed(key: str, value: Field) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(key, value)
    if isinstance(value, list):
        encoded = b"".join(_string(key, text) for text in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + encoded
    array = _numeric(key, value)
    kind = _SCALAR_OF_DTYPE[array.dtype]
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    if array.ndim == 0:
        return struct.pack("<I", kind) + little
    assert array.ndim == 1, (key, array.shape)
    return struct.pack("<IIQ", _ARRAY, kind, len(array)) + little


def _numeric(key: str, value: bool | int | float | np.generic | Array) -> Array:
    """A number or an array, in the type it is written in."""
    if isinstance(value, np.generic | np.ndarray):
        return np.asarray(value)
    if isinstance(value, int) and not isinstance(value, bool):
        assert 0 <= value < 1 << 32, (key, value)
        return np.asarray(value, np.uint32)
    return np.asarray(value, np.bool_ if isinstance(value, bool) else np.float32)


def _string(key: str, text: str) -> bytes:
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModelError(f"{key}: the text is not valid Unicode ({error.reason}): {text[:40]!r}") from None
    return struct.pack("<Q", len(encoded)) + encoded
