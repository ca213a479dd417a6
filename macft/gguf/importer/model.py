"""Import a .gguf model as a folder in Hugging Face layout: config, weights, tokenizer, chat template."""

from __future__ import annotations

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
from macft.gguf.format import PLAIN, GgufFile, GgufTensor, Shape, read_gguf
from macft.gguf.importer import config as gguf_config
from macft.gguf.importer.tokenizer import GgufVocabulary, read_gguf_vocabulary, write_tokenizer
from macft.gguf.row_order import deinterleave
from macft.gguf.sizes import Config, Sizes
from macft.gguf.tensor_rules import EXPERT, TensorRule
from macft.weights.model_config import normalize_config
from macft.weights.tensors.lazy import Array, LazyTensor
from macft.weights.tensors.safetensors import write_safetensors

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
        write_json(folder / "generation_config.json", _generation_config(vocabulary))
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
    return {
        "architectures": [imports.class_name],
        "model_type": model_type,
        "dtype": _dtype(source.tensors["token_embd.weight"]).name,
        **gguf_config.common(source, sizes),
        **imports.entries(source, sizes),
        **_special_ids(vocabulary),
    }


def _special_ids(vocabulary: GgufVocabulary) -> dict[str, Any]:
    ids = vocabulary.ids
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot") if role in ids))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
        "pad_token_id": ids.get("padding"),
    }


def _generation_config(vocabulary: GgufVocabulary) -> dict[str, Any]:
    return {key: value for key, value in _special_ids(vocabulary).items() if value is not None}


def _tensors(source: GgufFile, config: Config, sizes: Sizes) -> list[LazyTensor]:
    """Pair every tensor of the architecture with one of the file; all problems in one ModelError."""
    architecture = ARCHITECTURES[config["model_type"]]
    expected = architecture.tensors(config, sizes["layers"], has_head=not config["tie_word_embeddings"])
    tensors: list[LazyTensor] = []
    unknown = source.tensors.keys() - expected.keys() - architecture.rope_tensors
    problems = [f"{name} is not a tensor of {config['model_type']}" for name in unknown]
    for name, (hf_name, rule) in expected.items():
        tensor = source.tensors.get(name)
        shape = tuple(sizes[word] for word in rule.shape)
        if name.endswith(".bias"):
            shape = shape[:1]
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, {list(shape)} was expected")
        elif not _is_readable(tensor.kind):
            problems.append(f"{name} has type {tensor.kind.name}, which cannot be dequantized")
        else:
            tensors += _lazy(source, tensor, hf_name, rule, sizes)
    if problems:
        headline = f"{source.path}: the tensors do not make a {config['model_type']} model:"
        raise ModelError(join_problems(headline, sorted(problems)))
    return tensors


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
    dtype = _dtype(tensor)
    if EXPERT not in hf_name:
        heads = sizes[rule.heads] if rule.heads else 0
        read = partial(_read, source, tensor, slice(None), tensor.shape, heads, rule.is_shifted)
        return [LazyTensor(hf_name, dtype, tensor.shape, read)]
    experts = []
    rows = tensor.shape[1]
    for expert in range(tensor.shape[0]):
        part = slice(expert * rows, (expert + 1) * rows)
        read = partial(_read, source, tensor, part, tensor.shape[1:], 0, rule.is_shifted)
        experts.append(LazyTensor(hf_name.format(expert=expert), dtype, tensor.shape[1:], read))
    return experts


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
