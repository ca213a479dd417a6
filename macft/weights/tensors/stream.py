"""Tensors that arrive one at a time in; one safetensors file out, with one of them in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from macft.files import new_file
from macft.weights.tensors.lazy import LazyTensor, cast, from_array
from macft.weights.tensors.safetensors import header_bytes

# what transformers asks of a safetensors file
_PT = {"format": "pt"}


def write_state(
    path: Path,
    state: Mapping[str, np.ndarray[Any, Any]],
    *,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] = _PT,
) -> None:
    """Write named arrays, converted to `dtype` one by one, in order of name; the file is whole or absent."""
    tensors = [cast(from_array(name, state[name]), np.dtype(dtype)) for name in sorted(state)]
    with new_file(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def write_safetensors(path: Path, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] = _PT) -> None:
    """Write the tensors in the order given.

    The file is written in place: put it in a folder that only counts when whole.
    """
    with path.open("wb") as file:
        file.write(header_bytes(tensors, metadata))
        for tensor in tensors:
            array = tensor.read()
            assert array.dtype == tensor.dtype and array.shape == tensor.shape, tensor.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
