"""Turn a model in the Hugging Face layout into GGUF fields and lazy tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from macft.errors import ModelError, join_problems
from macft.gguf.architectures import ARCHITECTURES, Architecture
from macft.gguf.dimensions import Sizes
from macft.gguf.exporter import linear_attention, rope
from macft.gguf.exporter.hyper_parameters import read_sizes
from macft.gguf.format import GgufModel
from macft.gguf.row_order import interleave, interleaved, mapped, reordered
from macft.gguf.tensor_rules import EXPERT, shape_problems
from macft.weights.layouts.mlx import flat_config
from macft.weights.model_config import Config, normalize_config
from macft.weights.tensors.lazy import Array, LazyTensor, cast, derived, read_rows, renamed

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STACKED = "switch_mlp"  # where MLX's layout has the experts of a layer in one tensor
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_WRAPPED = re.compile(r"^model\.language_model\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FLOATS, _FLOAT32 = ("float32", "float16", "bfloat16"), np.dtype(np.float32)
# llama.cpp ignores the window of these; the first have one whenever a config gives its width
_ALWAYS_WINDOWED = ("mistral", "mixtral", "phi3")
_UNWINDOWED = (*_ALWAYS_WINDOWED, "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")


def architecture_of(config: Config) -> Architecture:
    """The row of a model type; ModelError, with the list, for one that is not in the table."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"config.json: model_type {model_type!r} cannot become a GGUF file (known: {', '.join(ARCHITECTURES)}); "
            "write a model in HF layout instead (macft export merged), and see whether llama.cpp's own converter takes "
            "that"
        )
    return ARCHITECTURES[model_type]


def notes(config: Config) -> list[str]:
    """Sentences on where llama.cpp will compute differently from the model, for what GGUF cannot express exactly."""
    flat = normalize_config(flat_config(config))
    kind, window = rope.rope_type(flat), flat.get("sliding_window")
    found = []
    has_window = flat.get("use_sliding_window", flat["model_type"] in _ALWAYS_WINDOWED)
    if has_window and isinstance(window, int) and flat["model_type"] in _UNWINDOWED:
        found.append(
            f"the model attends over {window} tokens, llama.cpp over all: beyond {window} tokens answers can differ"
        )
    if kind in ("longrope", "su"):
        original = rope.original_context(flat)
        found.append(
            f"llama.cpp takes the long rope factors whenever its context is set to more than {original} tokens, the "
            "model only when the text is as long: for short texts, set the context to that or less"
        )
    if kind == "yarn" and rope.settings(flat).get("truncate") is False:
        found.append("llama.cpp rounds the bounds between yarn's slow and fast rotations, the model does not")
    return found


def to_gguf(config: Config, tensors: Sequence[LazyTensor], *, vocab_rows: int) -> GgufModel:
    """The GGUF form of a model given by its config.json and its tensors under their HF names.

    Fields are `general.architecture` and those that begin with the architecture's name. `vocab_rows` is how many
    tokens the tokenizer knows; the embedding may have more rows, for tokens without a text. Raises ModelError for
    a model type without an entry, for a config that llama.cpp would read differently from its meaning, and for
    tensors that are missing, unknown or of the wrong shape: all problems at once.
    """
    architecture = architecture_of(config)
    config = normalize_config(flat_config(config))
    sizes, problems = read_sizes(config, architecture.rotated)
    if not problems:
        problems = architecture.problems(config, sizes)
        problems += rope.problems(config, architecture.rope_types, is_partly_rotated=architecture.is_partly_rotated)
    if problems:
        raise ModelError(
            join_problems(f"config.json: this {config['model_type']} cannot become a GGUF file:", problems)
        )
    if architecture.linear_layer:
        sizes |= linear_attention.sizes(config)
    by_name = _prepared(config, tensors)
    _settle_vocabulary(architecture, config, by_name, vocab_rows)
    sizes["vocab"] = by_name[_EMBEDDING].shape[0]
    fields = architecture.fields(config, sizes)
    return GgufModel(
        architecture.name,
        {
            "general.architecture": architecture.name,
            **{f"{architecture.name}.{key}": value for key, value in fields.items()},
        },
        [*_rope_tensors(architecture, config, sizes), *_converted(architecture, config, sizes, by_name)],
    )


def module_rule(config: Config, module: str) -> tuple[str, Callable[[Array], Array] | None]:
    """(GGUF name without ".weight", the change of its rows) of a linear module by its HF name.

    The second is None where the rows stay in their order. Raises ModelError for a module that has no matrix of
    its own in GGUF: it is unknown, one of several experts, or taken apart as in linear attention.
    """
    architecture = architecture_of(config)
    sizes, problems = read_sizes(normalize_config(flat_config(config)))
    if problems:
        raise ModelError(join_problems("config.json: the sizes of the model are wrong:", problems))
    match = _LAYER.fullmatch(_WRAPPED.sub("model.", module))
    rules = architecture.per_layer if match else architecture.whole
    name = match[2] if match else module
    stem = next((stem for stem, rule in rules.items() if rule.name == name), None)
    if stem is None or len(rules[stem].shape) != 2:
        raise ModelError(
            f"{module} has no matrix of its own, in its own order, in a GGUF file of {architecture.name}; "
            "merge the adapter into the model instead"
        )
    heads = rules[stem].heads
    change = partial(interleave, heads=sizes[heads]) if heads else None
    return (f"blk.{match[1]}.{stem}" if match else stem), change


def _prepared(config: Config, tensors: Sequence[LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors by name: without computed ones, experts stacked, all in types that GGUF knows."""
    kept = [tensor for tensor in tensors if not _COMPUTED.search(tensor.name)]
    for rule in ARCHITECTURES[config["model_type"]].preparation:
        kept = rule.to_mlx(config, kept)
    kept = [renamed(tensor, _WRAPPED.sub("model.", tensor.name)) for tensor in kept]
    if ARCHITECTURES[config["model_type"]].linear_layer:
        kept = linear_attention.prepared(config, kept)
    result = {}
    for tensor in kept:
        name = f"{tensor.name}.weight" if tensor.name.endswith(".sinks") else tensor.name
        known_type = tensor if tensor.dtype.name in _FLOATS else cast(tensor, _FLOAT32)
        result[name] = renamed(known_type, name)
    return result


def _settle_vocabulary(
    architecture: Architecture, config: Config, by_name: dict[str, LazyTensor], vocab_rows: int
) -> None:
    """Remove a tied head from `by_name`, or add one; cut rows without tokens where llama.cpp's converter does."""
    embedding = by_name.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{_EMBEDDING} is missing: these are not the tensors of a language model in HF layout")
    if vocab_rows > embedding.shape[0]:
        raise ModelError(
            f"the tokenizer has {vocab_rows} tokens, but {_EMBEDDING} only {embedding.shape[0]} rows: the tokenizer "
            "is not this model's, or tokens were added without resizing the model; take the tokenizer files that the "
            "model was trained with, or resize its embedding"
        )
    said = config.get("tie_word_embeddings", True if architecture.is_always_tied else None)
    is_tied = bool(said) if said is not None else _HEAD not in by_name
    if architecture.is_always_tied and not is_tied:
        raise ModelError(
            f"config.json: tie_word_embeddings is false, but llama.cpp always ties the head of {architecture.name}"
        )
    if is_tied and _HEAD in by_name:
        by_name[_EMBEDDING] = _same_as(embedding, by_name.pop(_HEAD))
    if is_tied and architecture.is_never_tied:
        by_name[_HEAD] = renamed(by_name[_EMBEDDING], _HEAD)
    for name in (_EMBEDDING, _HEAD):
        if architecture.cuts_vocabulary and name in by_name:
            by_name[name] = reordered(by_name[name], np.arange(vocab_rows))
    if not is_tied and _HEAD not in by_name:
        raise ModelError(f"{_HEAD} is missing, though config.json says tie_word_embeddings: false")


def _rope_tensors(architecture: Architecture, config: Config, sizes: Sizes) -> list[LazyTensor]:
    if architecture.rope_types == rope.LONGROPE:
        return rope.longrope(config, sizes["rotated"])[1]
    return rope.llama3_tensors(config, sizes["head_dim"])


def _converted(
    architecture: Architecture, config: Config, sizes: Sizes, by_name: Mapping[str, LazyTensor]
) -> list[LazyTensor]:
    """Every tensor of the architecture, converted from the model's; all problems in one ModelError."""
    rows = architecture.tensors(config, sizes["layers"], has_head=_HEAD in by_name)
    expected = {name: (hf_name.replace(EXPERT, _STACKED), rule) for name, (hf_name, rule) in rows.items()}
    shapes = {name: tensor.shape for name, tensor in by_name.items()}
    problems = shape_problems(config["model_type"], dict(expected.values()), shapes, sizes)
    if problems:
        headline = f"the tensors do not make a {config['model_type']} model:"
        raise ModelError(join_problems(headline, sorted(problems)))
    result = []
    for name, (hf_name, rule) in expected.items():
        tensor = by_name[hf_name]
        moved = interleaved(tensor, sizes[rule.heads]) if rule.heads else tensor
        result.append(renamed(_plus_one(moved) if rule.is_shifted else moved, name))
    return result


def _plus_one(tensor: LazyTensor) -> LazyTensor:
    """1 + the tensor in float32, as GGUF holds all norms, so that nothing is rounded to 16 bits on the way."""
    return mapped(tensor, tensor.name, tensor.shape, lambda rows: rows.astype(np.float32) + np.float32(1), _FLOAT32)


def _same_as(tensor: LazyTensor, copy: LazyTensor) -> LazyTensor:
    """`tensor`, compared with its copy while it is read; ModelError where they differ."""
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
