"""Import a .gguf model as a folder in Hugging Face layout: config, weights, tokenizer, chat template."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GgmlType

from macft.errors import ModelError, join_problems
from macft.files import new_dir, write_json
from macft.gguf.architectures import ARCHITECTURES, IMPORTED
from macft.gguf.dimensions import Sizes
from macft.gguf.format import PLAIN, GgufFile, GgufTensor, Shape, read_gguf
from macft.gguf.importer import config as gguf_config
from macft.gguf.importer.tokenizer import GgufVocabulary, read_gguf_vocabulary, write_tokenizer
from macft.gguf.row_order import deinterleave
from macft.gguf.tensor_rules import EXPERT, TensorRule, shape_problems
from macft.weights.model_config import Config, normalize_config
from macft.weights.tensors.lazy import Array, LazyTensor
from macft.weights.tensors.safetensors import write_safetensors

log = logging.getLogger("macft")

_HALF = np.dtype(np.float16)  # for tensors of all other types
_CHUNK = 1 << 17  # elements dequantized at a time: small enough for the CPU's cache


def import_gguf(path: Path, destination: Path) -> None:
    """Write the folder `destination`; F32 and BF16 tensors keep their type, all others become float16.

    Raises ModelError for a file that is damaged or of an architecture that is not in the table.
    """
    source = read_gguf(path)
    model_type = _model_type(source)
    architecture = ARCHITECTURES[model_type]
    vocabulary = read_gguf_vocabulary(source)
    sizes = gguf_config.read_sizes(
        source, has_experts=architecture.has_experts, is_partly_rotated=architecture.is_partly_rotated
    )
    config = _config(source, model_type, vocabulary, sizes)
    tensors = _tensors(source, config, sizes)
    with new_dir(destination) as folder:
        write_json(folder / "config.json", normalize_config(config))
        named = {key: value for key, value in _special_ids(vocabulary).items() if value is not None}
        write_json(folder / "generation_config.json", named)
        write_tokenizer(source, vocabulary, folder)
        write_safetensors(folder / "model.safetensors", tensors)


def _model_type(source: GgufFile) -> str:
    name = source.text("general.architecture")
    if name not in IMPORTED:
        raise ModelError(
            f"{source.path}: GGUF architecture {name!r} cannot be read "
            f"(accepted: {', '.join(IMPORTED)}): use the original model's folder or hub id"
        )
    model_type = IMPORTED[name]
    if source.number("split.count", 1) > 1:
        raise ModelError(f"{source.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    if source.number(f"{name}.expert_count", 0) and not ARCHITECTURES[model_type].has_experts:
        readable = ", ".join(name for name, row in IMPORTED.items() if ARCHITECTURES[row].has_experts)
        raise ModelError(
            f"{source.path}: mixture-of-experts models can only be imported for {readable}, not {name}; "
            "use the original model's folder or hub id"
        )
    return model_type


def _config(source: GgufFile, model_type: str, vocabulary: GgufVocabulary, sizes: Sizes) -> dict[str, Any]:
    if sizes["vocab"] != len(vocabulary.tokens):
        raise ModelError(
            f"{source.path}: token_embd.weight has {sizes['vocab']} rows for {len(vocabulary.tokens)} tokens"
        )
    imports = ARCHITECTURES[model_type].imports
    assert imports is not None, model_type
    config = {
        "architectures": [imports.class_name],
        "model_type": model_type,
        "dtype": _dtype(source.tensors["token_embd.weight"]).name,
        **gguf_config.common(source, sizes),
        **imports.entries(source, sizes),
        **_special_ids(vocabulary),
    }
    window = source.number(f"{source.fields['general.architecture']}.attention.sliding_window", 0)
    if window and not config.get("sliding_window"):
        log.warning(
            "%s: its window of %d tokens is left out, as llama.cpp does for %s", source.path, window, model_type
        )
    return config


def _special_ids(vocabulary: GgufVocabulary) -> dict[str, Any]:
    ids = vocabulary.ids
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot") if role in ids))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
        "pad_token_id": ids.get("padding"),
    }


def _tensors(source: GgufFile, config: Config, sizes: Sizes) -> list[LazyTensor]:
    """Pair every tensor of the architecture with one of the file; all problems in one ModelError."""
    architecture = ARCHITECTURES[config["model_type"]]
    expected = architecture.tensors(config, sizes["layers"], has_head=not config["tie_word_embeddings"])
    found = {name: tensor for name, tensor in source.tensors.items() if name not in architecture.rope_tensors}
    rules = {name: rule for name, (_, rule) in expected.items()}
    problems = shape_problems(
        config["model_type"], rules, {name: tensor.shape for name, tensor in found.items()}, sizes
    )
    problems += [
        f"{name} has type {tensor.kind.name}, which cannot be dequantized"
        for name, tensor in found.items()
        if name in expected and not _is_readable(tensor.kind)
    ]
    if problems:
        headline = f"{source.path}: the tensors do not make a {config['model_type']} model:"
        raise ModelError(join_problems(headline, sorted(problems)))
    return [one for name, row in expected.items() for one in _lazy(source, found[name], *row, sizes)]


def _is_readable(kind: GgmlType) -> bool:
    if kind in PLAIN:
        return True
    block_bytes = GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dtype(tensor: GgufTensor) -> np.dtype[Any]:
    return PLAIN.get(tensor.kind, _HALF)


def _lazy(source: GgufFile, tensor: GgufTensor, hf_name: str, rule: TensorRule, sizes: Sizes) -> list[LazyTensor]:
    """One tensor, or one for each expert of a stack [experts, rows, columns]."""
    shape, parts = tensor.shape, [slice(None)]
    if EXPERT in hf_name:
        shape = tensor.shape[1:]
        parts = [slice(expert * shape[0], (expert + 1) * shape[0]) for expert in range(tensor.shape[0])]
    heads = sizes[rule.heads] if rule.heads else 0
    tensors = []
    for expert, part in enumerate(parts):
        read = partial(_read, source, tensor, part, shape, heads, rule.is_shifted)
        tensors.append(LazyTensor(hf_name.format(expert=expert), _dtype(tensor), shape, read))
    return tensors


def _read(source: GgufFile, tensor: GgufTensor, part: slice, shape: Shape, heads: int, is_shifted: bool) -> Array:
    packed = source.packed(tensor)[part]
    if tensor.name.endswith(".bias"):
        packed = packed.reshape(shape[0], -1)
    if heads:
        packed = deinterleave(packed, heads)
    try:
        with np.errstate(over="raise"):
            array = _numbers(packed, tensor, shape)
    except FloatingPointError:
        raise ModelError(
            f"{source.path}: {tensor.name} holds numbers beyond float16 (65504); give a BF16 or F32 file of the model"
        ) from None
    return (array.astype(np.float32) - 1).astype(array.dtype) if is_shifted else array


def _numbers(packed: Array, tensor: GgufTensor, shape: Shape) -> Array:
    """Rows as stored, [rows, bytes per row], as an array of `shape`."""
    kind, dtype = tensor.kind, _dtype(tensor)
    if kind in PLAIN:
        return packed.reshape(-1).view(dtype).reshape(shape)
    columns = shape[-1]
    array = np.empty((packed.shape[0], columns), dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, packed.shape[0], step):
        # as one long row: gguf cuts its work by rows, in pieces too small for speed
        chunk = packed[start : start + step]
        array[start : start + step] = gguf.dequantize(chunk.reshape(1, -1), kind).reshape(-1, columns)
    return array.reshape(shape)
