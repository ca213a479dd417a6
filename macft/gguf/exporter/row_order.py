"""Lazy tensors in, the same numbers as GGUF wants them out: rows in another order, norms plus one, fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from macft.errors import ModelError
from macft.weights.tensors.lazy import Array, LazyTensor, derived, from_rows, read_rows

_FLOAT32 = np.dtype(np.float32)


def interleave(rows: Array, heads: int) -> Array:
    """Rows whose heads are two halves, [h, 2, d/2, ...], as pairs [h, d/2, 2, ...]: llama's original rotary order."""
    pairs: Array = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return pairs


def interleaved(tensor: LazyTensor, heads: int) -> LazyTensor:
    """`interleave` of a tensor; a part of a head is made of the same part of both its halves."""
    size = tensor.shape[0] // heads
    half = size // 2

    def rows(start: int, stop: int) -> Array:
        if start % size == 0 and stop % size == 0:
            return interleave(read_rows(tensor, start, stop), (stop - start) // size)
        parts = []
        for head in range(start // size, (stop - 1) // size + 1):
            first, last = max(start - head * size, 0), min(stop - head * size, size)
            low, high = first // 2, (last + 1) // 2
            both = [read_rows(tensor, head * size + at + low, head * size + at + high) for at in (0, half)]
            parts.append(interleave(np.concatenate(both), 1)[first - 2 * low : last - 2 * low])
        return np.concatenate(parts)

    return derived(tensor.name, tensor.dtype, tensor.shape, rows, tensor)


def plus_one(tensor: LazyTensor) -> LazyTensor:
    """1 + the tensor, in float32, in which GGUF holds all norms: nothing is rounded to 16 bits on the way."""
    return mapped(tensor, tensor.name, tensor.shape, lambda rows: rows.astype(np.float32) + np.float32(1), _FLOAT32)


def mapped(
    tensor: LazyTensor,
    name: str,
    shape: tuple[int, ...],
    change: Callable[[Array], Array],
    dtype: np.dtype[Any] | None = None,
) -> LazyTensor:
    """Other numbers under another name, where `change` works on each entry of the first axis by itself."""

    def rows(start: int, stop: int) -> Array:
        return change(read_rows(tensor, start, stop))

    return derived(name, dtype or tensor.dtype, shape, rows, tensor)


def reordered(tensor: LazyTensor, order: Array) -> LazyTensor:
    """Rows in another order, or some of them; those that were neighbors and still are, are read together."""

    def rows(start: int, stop: int) -> Array:
        expected = order[start:stop]
        runs = np.split(expected, np.flatnonzero(np.diff(expected) != 1) + 1)
        return np.concatenate([read_rows(tensor, int(run[0]), int(run[-1]) + 1) for run in runs])

    return derived(tensor.name, tensor.dtype, (len(order), *tensor.shape[1:]), rows, tensor)


def first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The tensor without the rows after the first `count`."""
    return derived(tensor.name, tensor.dtype, (count, *tensor.shape[1:]), partial(read_rows, tensor), tensor)


def same_as(tensor: LazyTensor, copy: LazyTensor) -> LazyTensor:
    """`tensor`, compared with its copy as it is read; ModelError where they differ."""
    problem = (
        f"{copy.name} differs from {tensor.name}, but config.json says tie_word_embeddings: true; "
        "set tie_word_embeddings to false if the head is meant to be the model's"
    )
    if tensor.shape != copy.shape:
        raise ModelError(problem)

    def rows(start: int, stop: int) -> Array:
        found = read_rows(tensor, start, stop)
        if not np.array_equal(found, read_rows(copy, start, stop)):
            raise ModelError(problem)
        return found

    return derived(tensor.name, tensor.dtype, tensor.shape, rows, tensor, copy)


def constants(name: str, numbers: Array) -> LazyTensor:
    """A float32 tensor that no file of the model holds."""
    array = np.asarray(numbers, np.float32)
    return from_rows(name, _FLOAT32, array.shape, lambda start, stop: array[start:stop])
