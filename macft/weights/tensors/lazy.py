"""Represent a model as tensors that are read only when asked for, so that it is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

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
