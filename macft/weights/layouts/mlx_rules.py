"""Define each difference between the HF and the MLX layout as a named rule that can be applied and undone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from macft.errors import ModelError, join_problems
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows, renamed

Tensors = list[LazyTensor]
Change = Callable[[Config, Tensors], Tensors]

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
SHIFTED_NORMS = re.compile(
    r"(\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)|(^|\.)(language_)?model\.norm)\.weight$"
)
_CONV = re.compile(r"\.conv1d\.weight$")


@dataclass(frozen=True)
class LayoutRule:
    """One difference; `lost` matches the HF names of tensors for which the MLX layout has no place."""

    name: str
    note: str
    to_mlx: Change
    to_hf: Change
    lost: re.Pattern[str] | None = None


def same(_: Config, tensors: Tensors) -> Tensors:
    """No change."""
    return tensors


def mapped(tensor: LazyTensor, name: str, shape: tuple[int, ...], change: Callable[[Array], Array]) -> LazyTensor:
    """A tensor with new numbers and a new name, where `change` treats each entry of the first axis separately."""
    return from_rows(name, tensor.dtype, shape, lambda start, stop: change(read_rows(tensor, start, stop)))


def ties_head(config: Config, tensors: Tensors, *, default: bool | None = None) -> bool:
    """Whether the head is the embedding: as the config says, else if no head is stored."""
    said = config.get("tie_word_embeddings", default)
    return bool(said) if said is not None else all(tensor.name != HEAD for tensor in tensors)


def _drop_head(tensors: Tensors) -> Tensors:
    """Drop the copy of a tied head; reading the embedding compares the two (ModelError when they differ)."""
    head = next((tensor for tensor in tensors if tensor.name == HEAD), None)
    if head is None:
        return tensors
    return [
        _compared(tensor, head) if tensor.name.endswith(EMBEDDING) else tensor
        for tensor in tensors
        if tensor is not head
    ]


def _compared(embedding: LazyTensor, head: LazyTensor) -> LazyTensor:
    problem = (
        f"{HEAD} differs from {embedding.name}, but config.json says tie_word_embeddings: true, and the MLX layout "
        "would lose the head; set tie_word_embeddings to false to keep the head"
    )
    if embedding.shape != head.shape:
        raise ModelError(problem)

    def rows(start: int, stop: int) -> Array:
        first = read_rows(embedding, start, stop)
        if not np.array_equal(first, read_rows(head, start, stop)):
            raise ModelError(problem)
        return first

    return from_rows(embedding.name, embedding.dtype, embedding.shape, rows)


def _tied(config: Config, tensors: Tensors) -> Tensors:
    if ties_head(config, tensors):
        return _drop_head(tensors)
    if all(tensor.name != HEAD for tensor in tensors):
        raise ModelError(f"no {HEAD}, though config.json says tie_word_embeddings: false; the model is incomplete")
    return tensors


def _always_tied(config: Config, tensors: Tensors) -> Tensors:
    if not ties_head(config, tensors, default=True):
        raise ModelError(
            f"config.json: tie_word_embeddings is false, but MLX always ties the head of {config['model_type']}; "
            "only models with a tied head can be converted"
        )
    return _drop_head(tensors)


def _never_tied(config: Config, tensors: Tensors) -> Tensors:
    if ties_head(config, tensors):
        raise ModelError(
            f"config.json: tie_word_embeddings is true, but MLX cannot tie the head of {config['model_type']}; "
            "only models with a head of their own can be converted"
        )
    return _tied(config, tensors)


def _dropping(pattern: re.Pattern[str]) -> Change:
    return lambda _, tensors: [tensor for tensor in tensors if not pattern.search(tensor.name)]


_ROTARY = re.compile(r"\.rotary_emb\.inv_freq$")
_MTP = re.compile(r"(^|\.)mtp\.")
_VISION = re.compile(r"^(model\.visual|vision_tower)\b")


def _prefix_to_mlx(_: Config, tensors: Tensors) -> Tensors:
    inner = re.compile(r"^model\.(language_model\.)?")
    return [renamed(tensor, f"language_model.{inner.sub('model.', tensor.name)}") for tensor in tensors]


def _prefix_to_hf(_: Config, tensors: Tensors) -> Tensors:
    return [renamed(tensor, tensor.name.removeprefix("language_model.")) for tensor in tensors]


def shift(array: Array, amount: int) -> Array:
    """A norm plus 1 or -1, rounded once to its own dtype, as in MLX."""
    shifted: Array = array + np.asarray(amount, array.dtype)
    return shifted


def _shifting(amount: int) -> Change:
    def change(_: Config, tensors: Tensors) -> Tensors:
        return [
            mapped(tensor, tensor.name, tensor.shape, lambda array: shift(array, amount))
            if is_shifted_norm(tensor)
            else tensor
            for tensor in tensors
        ]

    return change


def is_shifted_norm(tensor: LazyTensor) -> bool:
    """Whether this is a norm that the HF layout stores minus one."""
    return len(tensor.shape) == 1 and SHIFTED_NORMS.search(tensor.name) is not None


def swap_last(array: Array) -> Array:
    """The last two axes exchanged."""
    return np.swapaxes(array, -1, -2)


def _moving_axis(found: int) -> Change:
    """Conv1d weights [channels, 1, kernel] of HF with axis 1 moved last, or the reverse."""

    def change(_: Config, tensors: Tensors) -> Tensors:
        convolutions = [tensor for tensor in tensors if _CONV.search(tensor.name)]
        problems = [
            f"{tensor.name} is {list(tensor.shape)}"
            for tensor in convolutions
            if len(tensor.shape) != 3 or tensor.shape[found] != 1
        ]
        if problems:
            layout = "HF layout [channels, 1, kernel]" if found == 1 else "MLX layout [channels, kernel, 1]"
            raise ModelError(join_problems(f"these convolutions are not in the {layout}:", problems))
        return [
            mapped(tensor, tensor.name, (tensor.shape[0], tensor.shape[2], tensor.shape[1]), swap_last)
            if _CONV.search(tensor.name)
            else tensor
            for tensor in tensors
        ]

    return change


TIED_HEAD = LayoutRule("TIED_HEAD", "a tied head is not stored", _tied, same)
ALWAYS_TIED = LayoutRule("ALWAYS_TIED", "the head is always tied and not stored", _always_tied, same)
NEVER_TIED = LayoutRule("NEVER_TIED", "the head is never tied", _never_tied, same)
DROP_ROTARY = LayoutRule(
    "DROP_ROTARY", "rotary frequencies are computed, not stored", _dropping(_ROTARY), _dropping(_ROTARY)
)
DROP_MTP = LayoutRule("DROP_MTP", "no multi-token prediction, mtp.* (lost)", _dropping(_MTP), same, lost=_MTP)
DROP_VISION = LayoutRule("DROP_VISION", "no vision tower (lost)", _dropping(_VISION), same, lost=_VISION)
PREFIX = LayoutRule("PREFIX", "names begin with language_model.", _prefix_to_mlx, _prefix_to_hf)
SHIFT_NORMS = LayoutRule("SHIFT_NORMS", "norms are stored plus one", _shifting(1), _shifting(-1))
CONV_AXIS = LayoutRule(
    "CONV_AXIS", "conv1d is [channels, kernel, 1], in HF [channels, 1, kernel]", _moving_axis(1), _moving_axis(2)
)
