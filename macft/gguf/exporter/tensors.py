"""A model in the layout of Hugging Face in; its GGUF architecture, number fields and tensors, unread, out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from macft.errors import ModelError, join_problems
from macft.gguf.exporter import linear_attention, rope
from macft.gguf.exporter import row_order as moves
from macft.gguf.exporter.hyper_parameters import read_sizes
from macft.gguf.exporter.table import EXPORTS, Export
from macft.gguf.format import GgufModel
from macft.gguf.importer.architectures import Rule
from macft.weights.layouts.mlx import LAYOUTS, flat_config
from macft.weights.model_config import normalize_config
from macft.weights.tensors.lazy import Array, LazyTensor, cast, renamed

Config = Mapping[str, Any]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The rules that leave out what llama.cpp does not read, and that bring the experts of a layer into one tensor for
# each projection, however a file holds them.
_FIRST = ("DROP_VISION", "DROP_MTP", "SPARSE_BLOCK", "STACK_EXPERTS", "OSS_EXPERTS")
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_WRAPPED = re.compile(r"^model\.language_model\.")
_SUFFIX = {"ssm_a": "", "ssm_dt": ".bias"}  # all other tensors of a rule are called weights
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FLOATS = ("float32", "float16", "bfloat16")
_ON_BY_DEFAULT = ("always", "qkv_bias")
# whose window llama.cpp ignores: those that have one where a config says how wide, those that have one on demand
_ALWAYS_WINDOWED = ("mistral", "mixtral", "phi3")
_UNWINDOWED = (*_ALWAYS_WINDOWED, "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")


def check_known(config: Config) -> None:
    """ModelError, with the list, for a model type without an entry."""
    _export_of(config)


def known() -> list[tuple[str, str]]:
    """(HF model_type, GGUF architecture) of all that can be exported, for the documents."""
    return [(model_type, export.architecture) for model_type, export in EXPORTS.items()]


def notes(config: Config) -> list[str]:
    """Sentences on where llama.cpp will compute otherwise than the model, for what has no exact form in GGUF."""
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
            "model only when the text is as long: for short texts give it a context of no more"
        )
    if kind == "yarn" and rope.settings(flat).get("truncate") is False:
        found.append("llama.cpp rounds the bounds between yarn's slow and fast rotations, the model does not")
    return found


def to_gguf(config: Config, tensors: Sequence[LazyTensor], *, vocab_rows: int) -> GgufModel:
    """The GGUF form of a model given by its config.json and its tensors under their HF names.

    Fields are `general.architecture` and those that begin with the architecture's name. `vocab_rows` is how many
    tokens the tokenizer knows; the embedding may have more rows, for tokens without a text. Raises ModelError for
    a model type without an entry, for a config that llama.cpp would read otherwise than it is meant, and for
    tensors that are missing, unknown or of the wrong shape: all problems at once.
    """
    export = _export_of(config)
    config = normalize_config(flat_config(config))
    sizes, problems = read_sizes(config, export.rotated)
    if not problems:
        problems = export.problems(config, sizes)
        problems += rope.problems(config, export.rope_types, is_partly_rotated=export.is_partly_rotated)
    if problems:
        raise ModelError(
            join_problems(f"config.json: this {config['model_type']} cannot become a GGUF file:", problems)
        )
    if export.linear_layer:
        sizes |= linear_attention.sizes(config)
    by_name = _prepared(config, tensors)
    _settle_vocabulary(export, config, by_name, vocab_rows)
    sizes["vocab"] = by_name[_EMBEDDING].shape[0]
    fields = export.fields(config, sizes)
    return GgufModel(
        export.architecture,
        {
            "general.architecture": export.architecture,
            **{f"{export.architecture}.{key}": value for key, value in fields.items()},
        },
        [*_rope_tensors(export, config, sizes), *_converted(export, config, sizes, by_name)],
    )


def module_rule(config: Config, module: str) -> tuple[str, Callable[[Array], Array] | None]:
    """(GGUF name without ".weight", what becomes of the rows of its output) of a linear module by its HF name.

    The second is None where the rows stay in their order. Raises ModelError for a module that has no matrix of
    its own in GGUF: it is unknown, one of several experts, or taken apart as in linear attention.
    """
    export = _export_of(config)
    sizes, problems = read_sizes(normalize_config(flat_config(config)))
    if problems:
        raise ModelError(join_problems("config.json: the sizes of the model are wrong:", problems))
    match = _LAYER.fullmatch(_WRAPPED.sub("model.", module))
    rules = export.per_layer if match else export.whole
    name = match[2] if match else module
    stem = next((stem for stem, rule in rules.items() if rule.name == name), None)
    if stem is None or len(rules[stem].shape) != 2:
        raise ModelError(
            f"{module} has no matrix of its own, in its own order, in a GGUF file of {export.architecture}; "
            "merge the adapter into the model instead"
        )
    heads = rules[stem].heads
    change = partial(moves.interleave, heads=sizes[heads]) if heads else None
    return (f"blk.{match[1]}.{stem}" if match else stem), change


def _export_of(config: Config) -> Export:
    model_type = config.get("model_type")
    if model_type not in EXPORTS:
        raise ModelError(
            f"config.json: model_type {model_type!r} cannot become a GGUF file (known: {', '.join(EXPORTS)}); write a "
            "model in HF layout instead (macft export merged), and see whether llama.cpp's own converter takes that"
        )
    return EXPORTS[model_type]


def _prepared(config: Config, tensors: Sequence[LazyTensor]) -> dict[str, LazyTensor]:
    """By name: without what is computed, experts in one tensor, all in types that GGUF knows."""
    kept = [tensor for tensor in tensors if not _COMPUTED.search(tensor.name)]
    for rule in LAYOUTS[config["model_type"]].rules:
        if rule.name in _FIRST:
            kept = rule.to_mlx(config, kept)
    kept = [renamed(tensor, _WRAPPED.sub("model.", tensor.name)) for tensor in kept]
    if EXPORTS[config["model_type"]].linear_layer:
        kept = linear_attention.prepared(config, kept)
    result = {}
    for tensor in kept:
        name = f"{tensor.name}.weight" if tensor.name.endswith(".sinks") else tensor.name
        known_type = tensor if tensor.dtype.name in _FLOATS else cast(tensor, np.dtype(np.float32))
        result[name] = renamed(known_type, name)
    return result


def _settle_vocabulary(export: Export, config: Config, by_name: dict[str, LazyTensor], vocab_rows: int) -> None:
    """Take a tied head out of `by_name`, or put one in; cut rows without tokens where llama.cpp's converter does."""
    embedding = by_name.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{_EMBEDDING} is missing: these are not the tensors of a language model in HF layout")
    if vocab_rows > embedding.shape[0]:
        raise ModelError(
            f"the tokenizer has {vocab_rows} tokens, but {_EMBEDDING} only {embedding.shape[0]} rows: the tokenizer "
            "is not this model's, or tokens were added without resizing the model; take the tokenizer files that the "
            "model was trained with, or resize its embedding"
        )
    said = config.get("tie_word_embeddings", True if export.is_always_tied else None)
    is_tied = bool(said) if said is not None else _HEAD not in by_name
    if export.is_always_tied and not is_tied:
        raise ModelError(
            f"config.json: tie_word_embeddings is false, but llama.cpp always ties the head of {export.architecture}"
        )
    if is_tied and _HEAD in by_name:
        by_name[_EMBEDDING] = moves.same_as(embedding, by_name.pop(_HEAD))
    if is_tied and export.is_never_tied:
        by_name[_HEAD] = renamed(by_name[_EMBEDDING], _HEAD)
    for name in (_EMBEDDING, _HEAD):
        if export.cuts_vocabulary and name in by_name:
            by_name[name] = moves.first_rows(by_name[name], vocab_rows)
    if not is_tied and _HEAD not in by_name:
        raise ModelError(f"{_HEAD} is missing, though config.json says tie_word_embeddings: false")


def _rope_tensors(export: Export, config: Config, sizes: Mapping[str, int]) -> list[LazyTensor]:
    if export.rope_types == rope.LONGROPE:
        return rope.longrope(config, sizes["rotated"])[1]
    return rope.llama3_tensors(config, sizes["head_dim"])


def _wanted(export: Export, config: Config, layers: int, has_head: bool) -> dict[str, tuple[str, Rule]]:
    """GGUF name to HF name and rule."""
    expected = {}
    for stem, rule in export.whole.items():
        if stem != "output" or has_head:
            expected[f"{stem}.weight"] = (f"{rule.name}.weight", rule)
    interval = config.get("full_attention_interval") or 4  # in configs of transformers 4, without layer_types
    kinds = config.get("layer_types") or ["linear_attention" if (n + 1) % interval else "" for n in range(layers)]
    for layer in range(layers):
        is_linear = bool(export.linear_layer) and kinds[layer] == "linear_attention"
        for stem, rule in (export.linear_layer if is_linear else export.per_layer).items():
            name = f"model.layers.{layer}.{rule.name}"
            expected[f"blk.{layer}.{stem}{_SUFFIX.get(stem, '.weight')}"] = (f"{name}.weight", rule)
            if rule.bias and config.get(rule.bias, rule.bias in _ON_BY_DEFAULT):
                expected[f"blk.{layer}.{stem}.bias"] = (f"{name}.bias", rule)
    return expected


def _converted(
    export: Export, config: Config, sizes: Mapping[str, int], by_name: Mapping[str, LazyTensor]
) -> list[LazyTensor]:
    """Every tensor the architecture wants, from the one of the model that it is; all problems in one ModelError."""
    expected = _wanted(export, config, sizes["layers"], _HEAD in by_name)
    unknown = by_name.keys() - {name for name, _ in expected.values()}
    problems = [f"{name} is not a tensor of {config['model_type']}" for name in unknown]
    result = []
    for name, (hf_name, rule) in expected.items():
        tensor = by_name.get(hf_name)
        shape = tuple(sizes[word] for word in rule.shape)
        shape = shape[:-1] if hf_name.endswith(".bias") else shape
        if tensor is None:
            problems.append(f"{hf_name} is missing")
        elif tensor.shape != shape:
            problems.append(f"{hf_name} has shape {list(tensor.shape)}, {list(shape)} was expected")
        else:
            moved = moves.interleaved(tensor, sizes[rule.heads]) if rule.heads else tensor
            result.append(renamed(moves.plus_one(moved) if rule.is_shifted else moved, name))
    if problems:
        headline = f"the tensors do not make a {config['model_type']} model:"
        raise ModelError(join_problems(headline, sorted(problems)))
    return result
