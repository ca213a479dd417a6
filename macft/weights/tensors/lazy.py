"""Represent a model as tensors that are read only when asked for, so that it is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from macft.errors import ModelError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose numbers are not read yet; `read` returns `shape` numbers of `dtype`, on any thread.

    The array may be a read-only view of a file: copy it before writing into it. `rows(start, stop)`, where
    there is one, reads only that part of the first axis, so that huge tensors need not fit in memory.
    A conversion takes a list of these and returns another (renamed, permuted, stacked, merged), reading nothing.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]
    rows: Callable[[int, int], Array] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the numbers in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def from_array(name: str, array: Array) -> LazyTensor:
    """A tensor that is already in memory."""
    return LazyTensor(name, array.dtype, array.shape, lambda: array, lambda start, stop: array[start:stop])


def from_rows(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], rows: Callable[[int, int], Array]) -> LazyTensor:
    """A tensor that `rows(start, stop)` can read in parts of its first axis."""
    return LazyTensor(name, dtype, shape, lambda: rows(0, shape[0]), rows)


def mapped_tensor(path: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> LazyTensor:
    """A tensor whose bytes lie in a file from `offset` on; it is read as read-only views of the file."""
    if not shape:
        return LazyTensor(name, dtype, shape, lambda: _mapped(path, dtype, offset, shape))
    row_bytes = prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> Array:
        return _mapped(path, dtype, offset + start * row_bytes, (stop - start, *shape[1:]))

    return from_rows(name, dtype, shape, rows)


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> Array:
    """A view of the file, which is closed with the array."""
    if not prod(shape):
        return np.zeros(shape, dtype)
    try:
        # bytes first: the numbers in a file may be at any offset
        flat = np.memmap(path, np.uint8, "r", offset, (prod(shape) * dtype.itemsize,))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: changed or vanished while it was read ({error})") from None
    return np.asarray(flat).view(dtype).reshape(shape)


def derived(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], rows: Callable[[int, int], Array], *origins: LazyTensor
) -> LazyTensor:
    """`from_rows`, but in parts only if all `origins` can be: otherwise each part would read them completely."""
    tensor = from_rows(name, dtype, shape, rows)
    return tensor if all(origin.rows is not None for origin in origins) else replace(tensor, rows=None)


def read_rows(tensor: LazyTensor, start: int, stop: int) -> Array:
    """Rows `start` to `stop` of a tensor, reading only these where possible."""
    return tensor.rows(start, stop) if tensor.rows is not None else tensor.read()[start:stop]


def renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    """The same numbers under another name."""
    return replace(tensor, name=name)


def cast(tensor: LazyTensor, dtype: np.dtype[Any]) -> LazyTensor:
    """The same tensor with its numbers rounded to `dtype` when read; numbers that are too large become infinite."""
    if tensor.dtype == dtype:
        return tensor
    rows = tensor.rows

    def rounded(array: Array) -> Array:
        with np.errstate(over="ignore"):
            return array.astype(dtype)

    return LazyTensor(
        tensor.name,
        dtype,
        tensor.shape,
        lambda: rounded(tensor.read()),
        None if rows is None else lambda start, stop: rounded(rows(start, stop)),
    )
