"""Fields and the shapes and types of tensors in; what a GGUF file (version 3) begins with out."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType

from macft.errors import ModelError
from macft.gguf.writing.mixes import Shape
from macft.gguf.writing.model import Field
from macft.gguf.writing.quantize import row_bytes
from macft.weights.tensors.lazy import Array

ALIGNMENT = 32  # bytes, for the first number of each tensor

_MAGIC = b"GGUF"
_VERSION = 3
_TYPES: dict[np.dtype[Any], GGUFValueType] = {
    np.dtype(np.uint8): GGUFValueType.UINT8,
    np.dtype(np.int8): GGUFValueType.INT8,
    np.dtype(np.uint16): GGUFValueType.UINT16,
    np.dtype(np.int16): GGUFValueType.INT16,
    np.dtype(np.uint32): GGUFValueType.UINT32,
    np.dtype(np.int32): GGUFValueType.INT32,
    np.dtype(np.float32): GGUFValueType.FLOAT32,
    np.dtype(np.bool_): GGUFValueType.BOOL,
    np.dtype(np.uint64): GGUFValueType.UINT64,
    np.dtype(np.int64): GGUFValueType.INT64,
    np.dtype(np.float64): GGUFValueType.FLOAT64,
}


def tensor_bytes(kind: Kind, shape: Shape) -> int:
    """How many bytes the numbers take, without padding."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return rows * row_bytes(kind, shape[-1])


def padding(count: int) -> int:
    """How many bytes are missing to the next multiple of the alignment."""
    return -count % ALIGNMENT


def header_bytes(fields: Mapping[str, Field], tensors: Iterable[tuple[str, Shape, Kind]]) -> bytes:
    """All bytes in front of the first tensor's numbers, which follow in the order given, each padded.

    Shapes are numpy's, outermost axis first. ModelError names a field whose text is no Unicode.
    """
    infos, offset, count = bytearray(), 0, 0
    for name, shape, kind in tensors:
        infos += _string(name, name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", int(kind), offset)
        nbytes = tensor_bytes(kind, shape)
        offset += nbytes + padding(nbytes)
        count += 1
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, count, len(fields)))
    for key, value in fields.items():
        header += _string(key, key) + _field(key, value)
    header += infos
    return bytes(header + bytes(padding(len(header))))


def _field(key: str, value: Field) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return _type(GGUFValueType.STRING) + _string(key, value)
    if isinstance(value, list):
        encoded = b"".join(_string(key, text) for text in value)
        return _type(GGUFValueType.ARRAY) + _type(GGUFValueType.STRING) + struct.pack("<Q", len(value)) + encoded
    array = _numeric(key, value)
    code = _type(_TYPES[array.dtype])
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    if array.ndim == 0:
        return code + little
    assert array.ndim == 1, (key, array.shape)
    return _type(GGUFValueType.ARRAY) + code + struct.pack("<Q", len(array)) + little


def _numeric(key: str, value: bool | int | float | np.generic | Array) -> Array:
    """A number or an array, in the type it is written in."""
    if isinstance(value, np.generic | np.ndarray):
        return np.asarray(value)
    if isinstance(value, int) and not isinstance(value, bool):
        assert 0 <= value < 1 << 32, (key, value)
        return np.asarray(value, np.uint32)
    return np.asarray(value, np.bool_ if isinstance(value, bool) else np.float32)


def _type(code: GGUFValueType) -> bytes:
    return struct.pack("<I", int(code))


def _string(key: str, text: str) -> bytes:
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModelError(f"{key}: holds text that is no Unicode ({error.reason}): {text[:40]!r}") from None
    return struct.pack("<Q", len(encoded)) + encoded
