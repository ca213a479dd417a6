"""Read lazy tensors in parts of bounded size, on many threads, and yield the parts in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from macft.weights.tensors.lazy import Array, LazyTensor, read_rows

CHUNK_BYTES = 4 << 20  # bytes of a tensor that a thread works on at a time

_AHEAD = 64 << 20  # bytes computed but not yet yielded, unless a single part has more
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}  # bits that are all set only in NaN and infinity


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of a tensor; a tensor that cannot be read in parts is one chunk."""

    tensor: LazyTensor
    start: int
    stop: int
    nbytes: int


class HasBytes(Protocol):
    """A part whose size `ordered_map` counts."""

    @property
    def nbytes(self) -> int:
        """Its approximate size in bytes."""


Part = TypeVar("Part", bound=HasBytes)
Result = TypeVar("Result")


def iter_chunks(tensors: Iterable[LazyTensor]) -> Iterator[Chunk]:
    """Parts of the tensors, in order: as many rows of each as `CHUNK_BYTES` bytes hold, at least one."""
    for tensor in tensors:
        nbytes = tensor.nbytes
        if tensor.rows is None or not tensor.shape or not nbytes:
            yield Chunk(tensor, 0, tensor.shape[0] if tensor.shape else 1, nbytes)
            continue
        row = nbytes // tensor.shape[0]
        step = max(1, CHUNK_BYTES // row)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            yield Chunk(tensor, start, stop, (stop - start) * row)


def read_chunk(chunk: Chunk) -> Array:
    """The numbers of a chunk, flat [n]."""
    tensor = chunk.tensor
    whole = tensor.rows is None or chunk.nbytes == tensor.nbytes
    array = tensor.read() if whole else read_rows(tensor, chunk.start, chunk.stop)
    rows = tensor.shape[:1] if whole else (chunk.stop - chunk.start,)
    assert array.dtype == tensor.dtype and array.shape == (*rows, *tensor.shape[1:]), tensor.name
    return np.ascontiguousarray(array).reshape(-1)


def ordered_map(
    parts: Iterable[Part], convert: Callable[[Part], Result], pool: ThreadPoolExecutor
) -> Iterator[tuple[Part, Result]]:
    """Yield each part with the result of `convert`, in order, working ahead by a bounded number of bytes."""
    waiting: deque[tuple[Part, Future[Result]]] = deque()
    ahead = 0
    try:
        for part in parts:
            while waiting and ahead + part.nbytes > _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
                ahead -= first.nbytes
            waiting.append((part, pool.submit(convert, part)))
            ahead += part.nbytes
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def count_broken(flat: Array) -> int:
    """How many numbers are NaN or infinite."""
    mask = _EXPONENTS.get(flat.dtype.name)
    if mask is not None:
        # far faster than isfinite on 16-bit floats
        bits = flat.view(np.uint16) & np.uint16(mask)
        return int(np.count_nonzero(bits == mask))
    if flat.dtype.kind != "f":
        return 0
    return flat.size - int(np.count_nonzero(np.isfinite(flat)))
