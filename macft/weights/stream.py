"""From tensors that arrive one at a time to a safetensors file, holding one of them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from macft.files import new_file

DTYPE_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint32): "U32",
}

# what transformers asks of a safetensors file
_PT = {"format": "pt"}


@dataclass(frozen=True)
class TensorSlot:
    """What the header must know of a tensor before its numbers exist."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def write_state(
    path: Path,
    state: Mapping[str, np.ndarray[Any, Any]],
    *,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] = _PT,
) -> None:
    """Write named arrays, converted to `dtype` one by one, in order of name; the file is whole or absent."""
    names = sorted(state)
    slots = [TensorSlot(name, np.dtype(dtype), state[name].shape) for name in names]
    with new_file(path) as temporary:
        write_safetensors(temporary, slots, (state[name].astype(dtype) for name in names), metadata=metadata)


def write_safetensors(
    path: Path,
    slots: list[TensorSlot],
    arrays: Iterable[np.ndarray[Any, Any]],
    *,
    metadata: Mapping[str, str] = _PT,
) -> None:
    """Write `arrays`, which come in the order of `slots` and match them.

    The file is written in place: put it in a folder that only counts when whole.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for slot in slots:
        end = offset + prod(slot.shape) * slot.dtype.itemsize
        header[slot.name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for slot, array in zip(slots, arrays, strict=True):
            assert array.dtype == slot.dtype and array.shape == slot.shape, slot.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
