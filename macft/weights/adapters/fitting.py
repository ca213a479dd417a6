"""Fit adapters and the model they are merged into to each other: copies, vocabulary, a head that is the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.adapters import shapes
from macft.weights.adapters.formats import read_any_adapter
from macft.weights.adapters.own import OwnTensors
from macft.weights.adapters.peft import Adapter
from macft.weights.adapters.shapes import COPY, EMBEDDING, LINEAR, PREFIX
from macft.weights.folder import token_ids
from macft.weights.layouts.mlx import as_hf, flat_config
from macft.weights.layouts.mlx_rules import EMBEDDING as EMBEDDING_WEIGHT
from macft.weights.layouts.mlx_rules import HEAD as HEAD_WEIGHT
from macft.weights.model_config import read_config
from macft.weights.source import open_model
from macft.weights.tensors.lazy import Array, LazyTensor, derived, read_rows, renamed

_HEAD = HEAD_WEIGHT.removesuffix(".weight")
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Fitted:
    """A model's config and tensors, with one head or two and as many rows as the adapters need; and the adapters."""

    config: dict[str, Any]
    tensors: list[LazyTensor]
    adapters: tuple[Adapter, ...]
    notes: tuple[str, ...]


def read_on(folder: Path, base: Path) -> Adapter:
    """`read_any_adapter` for use on the model in the folder `base`: copies of its own matrices are left out."""
    adapter = read_any_adapter(folder, read_config(base), with_saved=True)
    return without_copies(adapter, as_hf(open_model(base))[1]) if adapter.own.whole else adapter


def tokenizer_folder(base: Path, adapters: Sequence[Adapter]) -> Path:
    """The folder of the tokenizer that goes with base and adapters: an adapter's where its training changed it.

    That is where it brings a whole embedding or head, or where the base has rows to spare for its new tokens.
    """
    known = token_ids(base) or {}
    spare = flat_config(read_config(base)).get("vocab_size")
    for adapter in reversed(adapters):
        own = token_ids(adapter.folder) or {}
        brought = [len(a) for name, a in _whole(adapter).items() if name.endswith((EMBEDDING_WEIGHT, HEAD_WEIGHT))]
        rows = brought[0] if brought else spare
        adds = bool(known) and own.items() > known.items()
        if own and own != known and (brought or adds) and isinstance(rows, int) and max(own.values()) < rows:
            return adapter.folder
    return base


def without_copies(adapter: Adapter, tensors: Sequence[LazyTensor]) -> Adapter:
    """The adapter without whole matrices that are the model's own, such as PEFT's save_embedding_layers writes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if (embedding := _embedding(tensors)) is not None:
        by_name.setdefault(HEAD_WEIGHT, embedding)
    suffix = f".{COPY}"
    copies = {name: name.removeprefix(PREFIX).removesuffix(suffix) for name in adapter.state if name.endswith(suffix)}
    return replace(
        adapter,
        state={
            name: array
            for name, array in adapter.state.items()
            if name not in copies or not _is_same(array, by_name.get(f"{copies[name]}.weight"))
        },
        own=replace(
            adapter.own,
            apart={name: a for name, a in adapter.own.apart.items() if not _is_same(a, by_name.get(name))},
            in_place={name: a for name, a in adapter.own.in_place.items() if not _is_same(a, by_name.get(name))},
        ),
    )


def fit(config: dict[str, Any], tensors: list[LazyTensor], adapters: Sequence[Adapter]) -> Fitted:
    """Give the model as many rows of vocabulary as the adapters were trained with, and the heads that they need.

    A head that is the embedding stays so where both change alike, as with PEFT's ensure_weight_tying. Otherwise the
    model gets two matrices, each changed as its adapter says; PEFT's own merging would change both. Raises ModelError.
    """
    embedding = _embedding(tensors)
    module = None if embedding is None else embedding.name.removesuffix(".weight")
    has_head = any(tensor.name == HEAD_WEIGHT for tensor in tensors)
    is_tied = bool(config.get("tie_word_embeddings", not has_head))
    touched = adapted_modules(adapters)
    if not any(name == _HEAD or name.rpartition(".")[2] == "embed_tokens" for name in touched):
        return Fitted(config, tensors, tuple(adapters), ())
    if embedding is None or module is None:
        if not is_tied:
            return Fitted(config, tensors, tuple(adapters), ())
        raise ModelError(
            "an adapter changes the head or the embedding, which this model shares, and the shared matrix was not "
            "found (it should be the only embed_tokens.weight); untie them before training"
        )
    notes: list[str] = []
    if is_tied:
        adapters = [_both_uses(adapter, module) for adapter in adapters]
        if not all(_are_alike(adapter, module) for adapter in adapters):
            rest = [tensor for tensor in tensors if tensor.name != HEAD_WEIGHT]
            config, tensors = {**config, "tie_word_embeddings": False}, [*rest, renamed(embedding, HEAD_WEIGHT)]
            notes.append("an adapter changes the head or the embedding, which were one matrix: the result has two")
        else:
            adapters = [_without_head(adapter) for adapter in adapters]
            tensors = [tensor for tensor in tensors if tensor.name != HEAD_WEIGHT]
    uses, before = (module, _HEAD), embedding.shape[0]
    others = [(a, rows) for a in adapters for use in uses for rows in _rows(a, use) if rows != before]
    if others:
        adapter, rows = others[-1]
        config, tensors = _resize(config, tensors, adapter, uses, rows)
        notes.append(f"the vocabulary has {rows} rows, as {adapter.folder} was trained with; the base has {before}")
    return Fitted(config, tensors, tuple(adapters), tuple(notes))


def adapted_modules(adapters: Sequence[Adapter]) -> set[str]:
    """The modules that the adapters change, such as model.layers.0.self_attn.q_proj."""
    own = {name.rpartition(".")[0] for adapter in adapters for name in adapter.own.names}
    return own.union(*(shapes.by_module(adapter.state, []) for adapter in adapters))


def _embedding(tensors: Sequence[LazyTensor]) -> LazyTensor | None:
    found = [tensor for tensor in tensors if tensor.name.endswith(EMBEDDING_WEIGHT)]
    return found[0] if len(found) == 1 else None


def _is_same(array: Array, tensor: LazyTensor | None) -> bool:
    if tensor is None or tensor.shape != array.shape:
        return False
    if not tensor.shape:
        return bool(tensor.read() == array)
    parts = ((first, min(first + _ROWS_AT_ONCE, len(array))) for first in range(0, len(array), _ROWS_AT_ONCE))
    return all(np.array_equal(read_rows(tensor, *part).astype(array.dtype), array[slice(*part)]) for part in parts)


# --- one matrix for embedding and head


def _both_uses(adapter: Adapter, module: str) -> Adapter:
    """The adapter with what changes a shared matrix written out for both of its uses, as PEFT loads it.

    Tensors in place and copies of the base belong to both; so do trained rows of the embedding.
    """
    in_place, rows = dict(adapter.own.in_place), dict(adapter.own.rows)
    whole = {use: _whole_in_place(adapter, use) for use in (module, _HEAD)}
    given = [array for array in whole.values() if array is not None]
    if len(given) == 2 and not np.array_equal(given[0], given[1]):
        raise ModelError(
            f"{adapter.folder}: was trained on a model with an embedding and a head that differ, and in this one they "
            "are one matrix; name the model that it was trained on"
        )
    for use, array in whole.items():
        if given and array is None:
            in_place[f"{use}.weight"] = given[0]
    trained = rows.get(f"{module}.weight")
    if trained is not None and HEAD_WEIGHT not in adapter.own.apart:
        rows.setdefault(HEAD_WEIGHT, trained)
    return replace(adapter, own=OwnTensors(adapter.own.apart, in_place, rows))


def _whole_in_place(adapter: Adapter, module: str) -> Array | None:
    return adapter.own.in_place.get(f"{module}.weight", adapter.state.get(f"{PREFIX}{module}.{COPY}"))


def _are_alike(adapter: Adapter, module: str) -> bool:
    """Whether the adapter does the same to embedding and head."""
    first, second = (_effect(adapter, use) for use in (module, _HEAD))
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def _effect(adapter: Adapter, module: str) -> tuple[Array | None, ...]:
    """What an adapter does to a matrix: whole, rows and their ids, A and B, magnitude."""
    name, own = f"{module}.weight", adapter.own
    rows = own.rows.get(name)
    parts = shapes.by_module(adapter.state, []).get(module, {})
    names = shapes.pair_of(parts)
    pair = [parts.get(suffix) for suffix in names]
    if names == EMBEDDING:
        # it is held for the transposed matrix
        pair = [None if part is None else part.T for part in reversed(pair)]
    return (
        own.apart.get(name, _whole_in_place(adapter, module)),
        None if rows is None else np.array(rows.ids),
        None if rows is None else rows.values,
        *pair,
        parts.get(shapes.MAGNITUDE),
    )


def _without_head(adapter: Adapter) -> Adapter:
    own, prefix = adapter.own, f"{PREFIX}{_HEAD}."
    return replace(
        adapter,
        state={name: array for name, array in adapter.state.items() if not name.startswith(prefix)},
        own=OwnTensors(
            {name: array for name, array in own.apart.items() if name != HEAD_WEIGHT},
            {name: array for name, array in own.in_place.items() if name != HEAD_WEIGHT},
            {name: rows for name, rows in own.rows.items() if name != HEAD_WEIGHT},
        ),
    )


# --- the number of rows


def _rows(adapter: Adapter, module: str) -> list[int]:
    whole = _whole(adapter).get(f"{module}.weight")
    parts = shapes.by_module(adapter.state, []).get(module, {})
    axes = {EMBEDDING[0]: 1, LINEAR[1]: 0}
    found = [parts[name].shape[axis] for name, axis in axes.items() if name in parts and parts[name].ndim == 2]
    return found if whole is None else [len(whole), *found]


def _resize(
    config: dict[str, Any], tensors: list[LazyTensor], adapter: Adapter, modules: Sequence[str], rows: int
) -> tuple[dict[str, Any], list[LazyTensor]]:
    """The model with so many rows; those that it lacks are 0, since the adapter brings whole matrices."""
    names, folder = {f"{module}.weight" for module in modules}, adapter.folder
    brought = {name for name, array in _whole(adapter).items() if len(array) == rows}
    raise_problems(
        f"{folder}: was trained with {rows} rows of vocabulary, which it does not all hold; name as the base the model "
        "as it was when training began, its vocabulary resized:",
        [
            f"{tensor.name} has {tensor.shape[0]} rows in the model and is not in the adapter"
            for tensor in tensors
            if tensor.name in names - brought
        ],
    )
    ids = token_ids(folder)
    if not ids or max(ids.values()) >= rows:
        held = f"a tokenizer with token {max(ids.values())}" if ids else "no tokenizer.json"
        raise ModelError(
            f"{folder}: was trained with {rows} rows of vocabulary, and holds {held}; copy the tokenizer that it was "
            "trained with into this folder"
        )
    text = config.get("text_config")
    sized = {"text_config": {**text, "vocab_size": rows}} if isinstance(text, dict) else {"vocab_size": rows}
    return {**config, **sized}, [_with_rows(t, rows) if t.name in names else t for t in tensors]


def _whole(adapter: Adapter) -> dict[str, Array]:
    """The whole matrices that the adapter brings, copies of its base among them, by the model's names."""
    suffix = f".{COPY}"
    copies = {name: array for name, array in adapter.state.items() if name.endswith(suffix)}
    named = {f"{name.removeprefix(PREFIX).removesuffix(suffix)}.weight": array for name, array in copies.items()}
    return {**named, **adapter.own.whole}


def _with_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The tensor cut to `count` rows, or with rows of 0 at its end."""

    def rows(start: int, stop: int) -> Array:
        known = read_rows(tensor, min(start, tensor.shape[0]), min(stop, tensor.shape[0]))
        missing = np.zeros((stop - start - len(known), *tensor.shape[1:]), tensor.dtype)
        return np.concatenate([known, missing])

    return derived(tensor.name, tensor.dtype, (count, *tensor.shape[1:]), rows, tensor)
