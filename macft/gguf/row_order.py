"""Reorder and change the rows of tensors where GGUF and the Hugging Face layout differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from macft.weights.tensors.lazy import Array, LazyTensor, derived, read_rows


def interleave(rows: Array, heads: int) -> Array:
    """Rows whose heads are two halves, [h, 2, d/2, ...], as pairs [h, d/2, 2, ...]: llama's original rotary order."""
    pairs: Array = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return pairs


def deinterleave(rows: Array, heads: int) -> Array:
    """The inverse of `interleave`."""
    halves: Array = rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return halves


def interleaved(tensor: LazyTensor, heads: int) -> LazyTensor:
    """`interleave` of a lazy tensor; a part of a head comes from the same part of both its halves."""
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


def mapped(
    tensor: LazyTensor,
    name: str,
    shape: tuple[int, ...],
    change: Callable[[Array], Array],
    dtype: np.dtype[Any] | None = None,
) -> LazyTensor:
    """`change` of a lazy tensor under another name; it must treat each entry of the first axis by itself."""

    def rows(start: int, stop: int) -> Array:
        return change(read_rows(tensor, start, stop))

    return derived(name, dtype or tensor.dtype, shape, rows, tensor)


def reordered(tensor: LazyTensor, order: Array) -> LazyTensor:
    """Rows in another order, or some of them; rows that stay neighbors are read together."""

    def rows(start: int, stop: int) -> Array:
        chosen = order[start:stop]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return np.concatenate([read_rows(tensor, int(run[0]), int(run[-1]) + 1) for run in runs])

    return derived(tensor.name, tensor.dtype, (len(order), *tensor.shape[1:]), rows, tensor)
