"""Merge LoRA adapters into a model's tensors, which are summed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock

import numpy as np

from macft.errors import raise_problems
from macft.weights.adapters import shapes
from macft.weights.adapters.own import OwnTensors, Rows
from macft.weights.adapters.peft import Adapter
from macft.weights.adapters.shapes import COPY, EMBEDDING, MAGNITUDE, PREFIX
from macft.weights.tensors.lazy import Array, LazyTensor, cast, derived, read_rows

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_TILE_ROWS = 8
_PRODUCT = 1 << 18  # multiplications up to which OpenBLAS keeps to one thread
_BLOCK = 1 << 18  # numbers added at a time: small enough for the CPU's cache


@dataclass(frozen=True)
class _Update:
    """W + b @ a, and with a magnitude m: m * (W + b @ a) / norm, the norm over each row, or column of an embedding.

    a [rank, columns], b [rows, rank] with the scale in it, magnitude [rows] or, of an embedding, [columns].
    `copy` is the W [rows, columns] that the adapter was trained on, if the adapter holds one.
    """

    a: Array
    b: Array
    magnitude: Array | None
    is_embedding: bool
    copy: Array | None


_Change = _Update | Rows | Array  # an array replaces the base's tensor


def merge_adapters(tensors: Sequence[LazyTensor], adapters: Sequence[Adapter]) -> list[LazyTensor]:
    """Add adapters one after the other: float32 sums, rounded once to the type of each tensor.

    Names are Hugging Face's. ModelError lists, for all adapters, every tensor that is unknown, not finite or does
    not fit a module of the model.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    changes: dict[str, list[_Change]] = {}
    problems: list[str] = []
    for adapter in adapters:
        own: list[str] = []
        for name, change in _changes(adapter, by_name, own):
            changes.setdefault(name, []).append(change)
        problems += [f"{adapter.folder}: {problem}" for problem in own]
    raise_problems("the adapter does not fit this model; nothing was merged:", problems)
    return [_merged(tensor, changes[tensor.name]) if tensor.name in changes else tensor for tensor in tensors]


def merge_problems(tensors: Mapping[str, LazyTensor], adapter: Adapter) -> list[str]:
    """Why an adapter cannot be merged into these tensors, given by name: a line for each problem."""
    problems: list[str] = []
    _changes(adapter, tensors, problems)
    return problems


def _changes(adapter: Adapter, by_name: Mapping[str, LazyTensor], problems: list[str]) -> list[tuple[str, _Change]]:
    """What an adapter does to tensors of the model, in order; what does not fit is added to `problems`."""
    found = _own_changes(adapter.own, by_name, problems)
    named = {**adapter.state, **{f"{PREFIX}{name}": array for name, array in adapter.own.whole.items()}}
    problems += [
        f"{name} holds NaN or infinite numbers" for name, array in named.items() if not np.isfinite(array).all()
    ]
    modules = shapes.by_module(adapter.state, problems)
    if not modules:
        problems.append("holds no LoRA tensors")
    for module, parts in modules.items():
        name = f"{module}.weight"
        base = by_name.get(name)
        problem = "the model has no such module" if base is None else _misfit(adapter, parts, base)
        if problem is not None:
            problems.append(f"{module}: {problem}")
        else:
            found.append((name, _update(adapter, parts)))
    return found


def _own_changes(own: OwnTensors, by_name: Mapping[str, LazyTensor], problems: list[str]) -> list[tuple[str, _Change]]:
    found: list[tuple[str, _Change]] = []
    for name in own.names:
        base = by_name.get(name)
        if base is None:
            problems.append(f"{name}, which the adapter holds beside LoRA: the model has no such tensor")
            continue
        array, rows = own.whole.get(name), own.rows.get(name)
        if array is not None:
            if base.shape != array.shape or not base.shape:
                problems.append(f"{name}, trained whole, is {list(array.shape)}, in the model {list(base.shape)}")
            found.append((name, array))
        if rows is not None:
            if rows.values.shape[1:] != base.shape[1:] or not all(0 <= id_ < base.shape[0] for id_ in rows.ids):
                problems.append(
                    f"{name}: {list(rows.values.shape)} are the trained rows of tokens {list(rows.ids)[:8]}, the model "
                    f"has {list(base.shape)}"
                )
            found.append((name, rows))
    return found


def _misfit(adapter: Adapter, parts: dict[str, Array], base: LazyTensor) -> str | None:
    """Why these tensors cannot be merged into the base's, or None."""
    if problem := shapes.module_problem(parts, adapter.config.use_dora):
        return problem
    if len(base.shape) != 2 or base.dtype.name not in _FLOATS:
        return f"{base.dtype} {list(base.shape)} in the model, expected a matrix of floats"
    names, rank, (rows, columns) = shapes.pair_of(parts), adapter.config.rank, base.shape
    a, b = _pair(parts)
    if a.shape != (rank, columns) or b.shape != (rows, rank):
        first, second = (f"{name} {list(parts[name].shape)}" for name in names)
        return (
            f"{list(base.shape)} in the model, the adapter's {first} and {second} of rank {rank} are for "
            f"{[b.shape[0], a.shape[-1]]}"
        )
    copy, magnitude = parts.get(COPY), parts.get(MAGNITUDE)
    if copy is not None and copy.shape != base.shape:
        return f"trained on {list(copy.shape)} in place of the model's {list(base.shape)}"
    if magnitude is not None and magnitude.shape != ((columns if names == EMBEDDING else rows),):
        return f"{MAGNITUDE} {list(magnitude.shape)} for {list(base.shape)} in the model"
    return None


def _pair(parts: dict[str, Array]) -> tuple[Array, Array]:
    """a [rank, columns] and b [rows, rank]: PEFT holds an embedding's for the transposed matrix."""
    names = shapes.pair_of(parts)
    first, second = (parts[name] for name in names)
    return (second.T, first.T) if names == EMBEDDING else (first, second)


def _update(adapter: Adapter, parts: dict[str, Array]) -> _Update:
    config, (a, b) = adapter.config, _pair(parts)
    scale = shapes.scale_of(config.rank, config.alpha, config.use_rslora)
    scaled = np.ascontiguousarray(b) * b.dtype.type(scale)
    is_embedding = shapes.pair_of(parts) == EMBEDDING
    return _Update(np.ascontiguousarray(a), scaled, parts.get(MAGNITUDE), is_embedding, parts.get(COPY))


def _merged(tensor: LazyTensor, changes: list[_Change]) -> LazyTensor:
    """The tensor with all changes; rows are summed in cache-sized blocks and rounded once."""
    wide = np.promote_types(tensor.dtype, np.float32)
    steps = [
        _adding(tensor, changes[:index], change) if isinstance(change, _Update) else _replacing(change)
        for index, change in enumerate(changes)
    ]

    def rows(start: int, stop: int) -> Array:
        base = read_rows(tensor, start, stop)
        merged = np.empty(base.shape, tensor.dtype)
        count = max(1, _BLOCK // max(1, prod(base.shape[1:])))
        for first in range(0, len(base), count):
            block = base[first : first + count].astype(wide)
            for step in steps:
                step(block, start + first)
            # a number too large for the type becomes infinite, and the writer names it
            with np.errstate(over="ignore"):
                merged[first : first + count] = block
        return merged

    return derived(tensor.name, tensor.dtype, tensor.shape, rows, tensor)


def _replacing(change: Rows | Array) -> Callable[[Array, int], None]:
    """A function that puts trained values into a block of rows, the first of which is given."""

    def replace_all(block: Array, start: int) -> None:
        block[:] = values[start : start + len(block)]

    def replace_rows(block: Array, start: int) -> None:
        for id_, row in zip(ids, values, strict=True):
            if start <= id_ < start + len(block):
                block[id_ - start] = row

    if isinstance(change, Rows):
        ids, values = change.ids, change.values
        return replace_rows
    values = change
    return replace_all


def _adding(tensor: LazyTensor, earlier: list[_Change], update: _Update) -> Callable[[Array, int], None]:
    """A function that changes a block of rows, the first of which is given, in place."""

    def add(block: Array, start: int) -> None:
        if update.copy is not None and not earlier:
            block[:] = update.copy[start : start + len(block)]
        _add_product(block, update.b[start : start + len(block)], update.a)

    magnitude = update.magnitude
    if magnitude is None:
        return add

    def rescale_rows(block: Array, start: int) -> None:
        # m * W' / ||W'||, for each row; source: DoRA, arXiv 2402.09353, equation 5
        add(block, start)
        norms = np.sqrt((block * block).sum(axis=1))
        with np.errstate(divide="ignore", invalid="ignore"):
            block *= (magnitude[start : start + len(block)] / norms)[:, None]

    if not update.is_embedding:
        return rescale_rows
    unrounded = cast(tensor, np.promote_types(tensor.dtype, np.float32))
    norms_of_columns = _once(lambda: _column_norms(_merged(unrounded, earlier), add))

    def rescale_columns(block: Array, start: int) -> None:
        add(block, start)
        block *= magnitude / norms_of_columns()

    return rescale_columns


def _add_product(block: Array, b: Array, a: Array) -> None:
    """block += b @ a, in products too small for OpenBLAS to spread over threads.

    Its threads and ours would wait for each other: whole products took 100 times the time on two busy cores.
    """
    rank = a.shape[0]
    width = max(8, _PRODUCT // (_TILE_ROWS * rank))
    even = len(b) // _TILE_ROWS * _TILE_ROWS
    tiles = b[:even].reshape(-1, _TILE_ROWS, rank)
    for first in range(0, a.shape[1], width):
        part = a[:, first : first + width]
        block[:even, first : first + width] += np.matmul(tiles, part).reshape(even, part.shape[1])
        if even < len(b):
            block[even:, first : first + width] += b[even:] @ part


def _column_norms(tensor: LazyTensor, add: Callable[[Array, int], None]) -> Array:
    count = max(1, _BLOCK // max(1, tensor.shape[1]))
    squares = np.zeros(tensor.shape[1], np.float64)
    for start in range(0, tensor.shape[0], count):
        block = read_rows(tensor, start, min(start + count, tensor.shape[0])).copy()
        add(block, start)
        squares += np.square(block, dtype=np.float64).sum(axis=0)
    return np.sqrt(squares).astype(tensor.dtype)


def _once(make: Callable[[], Array]) -> Callable[[], Array]:
    """`make`, called by whichever thread comes first."""
    lock = Lock()
    result: list[Array] = []

    def get() -> Array:
        with lock:
            if not result:
                result.append(make())
        return result[0]

    return get
