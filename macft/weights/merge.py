"""A model's tensors and LoRA adapters in; the same tensors with the adapters added when they are read, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from macft.errors import ModelError, join_faults
from macft.weights.adapter import Adapter
from macft.weights.lazy import Array, LazyTensor, cast, derived, read_rows, renamed

HEAD = "lm_head.weight"
_PREFIX = "base_model.model."
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_COPY = "base_layer.weight"  # PEFT adds the base's own matrix when an adapter is on an embedding or head
_SUFFIXES = (*_LINEAR, *_EMBEDDING, _MAGNITUDE, _COPY)
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_TILE_ROWS = 8
_PRODUCT = 1 << 18  # multiplications up to which OpenBLAS keeps to one thread
_BLOCK = 1 << 18  # numbers added at a time: small enough for the CPU's cache

# told of each merged block: (tensor name, before, after), both float32 or wider [rows, columns]
Observer = Callable[[str, Array, Array], None]


@dataclass(frozen=True)
class _Update:
    """W + b @ a, and with a magnitude m: m * (W + b @ a) / norm, the norm over each row, or column of an embedding.

    a [rank, columns], b [rows, rank] with the scale in it, magnitude [rows] or, of an embedding, [columns].
    `copy` is the W [rows, columns] that the adapter was trained on, if it brings it.
    """

    a: Array
    b: Array
    magnitude: Array | None
    is_embedding: bool
    copy: Array | None


def merge_adapters(
    tensors: Sequence[LazyTensor], adapters: Sequence[Adapter], observe: Observer | None = None
) -> list[LazyTensor]:
    """Add adapters, each on what those before it left: float32 sums, rounded once to the type of each tensor.

    Names are Hugging Face's. ModelError lists, of all adapters, every tensor that is unknown, not finite or
    fits no module of the model.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    updates: dict[str, list[_Update]] = {}
    faults: list[str] = []
    for adapter in adapters:
        for module, parts in _modules(adapter, faults).items():
            name = f"{module}.weight"
            update = _update(adapter, module, parts, by_name.get(name), faults)
            if update is not None:
                updates.setdefault(name, []).append(update)
    if faults:
        raise ModelError(join_faults("the adapter does not fit this model; nothing was merged:", faults))
    return [_merged(t, updates[t.name], observe) if t.name in updates else t for t in tensors]


def adapted_modules(adapter: Adapter) -> list[str]:
    """The modules an adapter changes, such as model.layers.0.self_attn.q_proj, in order of name."""
    return sorted(_modules(adapter, []))


def untie(
    config: dict[str, Any], tensors: list[LazyTensor], adapters: Sequence[Adapter]
) -> tuple[dict[str, Any], list[LazyTensor]]:
    """Give a head of its own to a model whose head is its embedding, if an adapter changes either of the two.

    An adapter is trained on one of them: merged into the shared matrix it would change the other too, which
    is what PEFT warns of and mends in this way. Config and tensors come back as they were if nothing is to do.
    """
    head = HEAD.removesuffix(".weight")
    touched = {module for adapter in adapters for module in adapted_modules(adapter)}
    if not any(module == head or module.rpartition(".")[2] == "embed_tokens" for module in touched):
        return config, tensors
    has_head = any(tensor.name == HEAD for tensor in tensors)
    if not config.get("tie_word_embeddings", not has_head):
        return config, tensors
    embeddings = [tensor for tensor in tensors if tensor.name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ModelError(
            "an adapter changes the head or the embedding, which this model shares, and the shared matrix was not "
            f"found ({len(embeddings)} tensors are named embed_tokens.weight); untie them before training"
        )
    rest = [tensor for tensor in tensors if tensor.name != HEAD]
    return {**config, "tie_word_embeddings": False}, [*rest, renamed(embeddings[0], HEAD)]


def _modules(adapter: Adapter, faults: list[str]) -> dict[str, dict[str, Array]]:
    """The tensors of an adapter by module and suffix."""
    found: dict[str, dict[str, Array]] = {}
    for name, array in adapter.state.items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(f".{suffix}")), None)
        if suffix is None or not name.startswith(_PREFIX):
            faults.append(f"{adapter.folder}: {name} is of no kind that can be merged")
            continue
        if not np.isfinite(array).all():
            faults.append(f"{adapter.folder}: {name} holds NaN or infinite numbers")
        module = name[len(_PREFIX) : -len(suffix) - 1]
        found.setdefault(module, {})[suffix] = array
    if not found:
        faults.append(f"{adapter.folder}: holds no LoRA tensors")
    return found


def _update(
    adapter: Adapter, module: str, parts: dict[str, Array], base: LazyTensor | None, faults: list[str]
) -> _Update | None:
    """What an adapter does to one module, or None with the reasons added to `faults`."""
    where = f"{adapter.folder}: {module}"
    is_embedding = _EMBEDDING[0] in parts or _EMBEDDING[1] in parts
    names = _EMBEDDING if is_embedding else _LINEAR
    wanted = {*names, _MAGNITUDE} if adapter.config.use_dora else {*names}
    if set(parts) - {_COPY} != wanted:
        faults.append(f"{where}: has {', '.join(sorted(parts))}; wanted {', '.join(sorted(wanted))}")
        return None
    if base is None:
        faults.append(f"{where}: the model has no such module")
        return None
    if len(base.shape) != 2 or base.dtype.name not in _FLOATS:
        faults.append(f"{where}: {base.dtype} {list(base.shape)} in the model, wanted a matrix of floats")
        return None
    first, second = (parts[name] for name in names)
    # PEFT holds an embedding's pair for the transposed matrix
    a, b = (second.T, first.T) if is_embedding else (first, second)
    rank, (rows, columns) = adapter.config.rank, base.shape
    if a.shape != (rank, columns) or b.shape != (rows, rank):
        faults.append(
            f"{where}: {list(base.shape)} in the model, the adapter's {names[0]} {list(first.shape)} and {names[1]} "
            f"{list(second.shape)} of rank {rank} are for {[b.shape[0], a.shape[-1]]}"
        )
        return None
    copy = parts.get(_COPY)
    if copy is not None and copy.shape != base.shape:
        faults.append(f"{where}: trained on {list(copy.shape)} in place of the model's {list(base.shape)}")
        return None
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None and magnitude.shape != ((columns if is_embedding else rows),):
        faults.append(f"{where}: {_MAGNITUDE} {list(magnitude.shape)} for {list(base.shape)} in the model")
        return None
    scale = adapter.config.alpha / (rank**0.5 if adapter.config.use_rslora else rank)
    scaled = np.ascontiguousarray(b) * b.dtype.type(scale)
    return _Update(np.ascontiguousarray(a), scaled, magnitude, is_embedding, copy)


def _merged(tensor: LazyTensor, updates: list[_Update], observe: Observer | None) -> LazyTensor:
    """The tensor with all updates; rows are added in cache-sized blocks and rounded once."""
    wide = np.promote_types(tensor.dtype, np.float32)
    steps = [_step(tensor, updates[:index], update) for index, update in enumerate(updates)]

    def rows(start: int, stop: int) -> Array:
        base = read_rows(tensor, start, stop)
        merged = np.empty(base.shape, tensor.dtype)
        count = max(1, _BLOCK // max(1, base.shape[1]))
        for first in range(0, len(base), count):
            block = base[first : first + count].astype(wide)
            before = block.copy() if observe is not None else block
            for step in steps:
                step(block, start + first)
            if observe is not None:
                observe(tensor.name, before, block)
            # a number too large for the type becomes infinite, and the writer names it
            with np.errstate(over="ignore"):
                merged[first : first + count] = block
        return merged

    return derived(tensor.name, tensor.dtype, tensor.shape, rows, tensor)


def _step(tensor: LazyTensor, earlier: list[_Update], update: _Update) -> Callable[[Array, int], None]:
    """A function that updates a block [rows, columns], whose first row is given, in place."""

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
    norms_of_columns = _once(lambda: _column_norms(_merged_wide(tensor, earlier), add))

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


def _merged_wide(tensor: LazyTensor, updates: list[_Update]) -> LazyTensor:
    """The tensor with these updates, not rounded."""
    return _merged(cast(tensor, np.promote_types(tensor.dtype, np.float32)), updates, None)


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
    made: list[Array] = []

    def get() -> Array:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get
