"""From a .gguf model to a folder in Hugging Face layout: config, weights, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from macft.errors import ModelError, join_faults
from macft.files import new_dir, write_json
from macft.weights.gguf_file import GgufFile, GgufTensor, read_gguf
from macft.weights.gguf_tokenizer import GgufVocabulary, read_vocabulary, write_tokenizer
from macft.weights.model_config import normalise_config
from macft.weights.stream import TensorSlot, write_safetensors

# GGUF types that keep their numbers as they are
_HALF = np.dtype(np.float16)
_KEPT: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": _HALF,
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SLAB = 1 << 17  # elements dequantized at a time: small enough for the CPU's cache

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class _Rule:
    """One kind of tensor: its HF name, its shape in words, and which heads its rows are permuted by."""

    name: str
    shape: tuple[str, ...]
    heads: str = ""


@dataclass(frozen=True)
class _Architecture:
    model_type: str
    class_name: str
    hidden_act: str
    whole: dict[str, _Rule]
    per_layer: dict[str, _Rule]


_LLAMA = _Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    hidden_act="silu",
    whole={
        "token_embd": _Rule("model.embed_tokens", ("vocab", "hidden")),
        "output_norm": _Rule("model.norm", ("hidden",)),
        "output": _Rule("lm_head", ("vocab", "hidden")),
    },
    per_layer={
        "attn_norm": _Rule("input_layernorm", ("hidden",)),
        "attn_q": _Rule("self_attn.q_proj", ("q", "hidden"), heads="heads"),
        "attn_k": _Rule("self_attn.k_proj", ("kv", "hidden"), heads="kv_heads"),
        "attn_v": _Rule("self_attn.v_proj", ("kv", "hidden")),
        "attn_output": _Rule("self_attn.o_proj", ("hidden", "q")),
        "ffn_norm": _Rule("post_attention_layernorm", ("hidden",)),
        "ffn_gate": _Rule("mlp.gate_proj", ("ffn", "hidden")),
        "ffn_up": _Rule("mlp.up_proj", ("ffn", "hidden")),
        "ffn_down": _Rule("mlp.down_proj", ("hidden", "ffn")),
    },
)
_ARCHITECTURES = {"llama": _LLAMA}


@dataclass(frozen=True)
class _Weight:
    """One tensor of the output; `heads` is 0 where rows keep their order."""

    name: str
    tensor: GgufTensor
    heads: int


def import_gguf(path: Path, destination: Path) -> None:
    """Write the folder `destination`; F32 and BF16 tensors keep their type, all others become float16.

    Raises ModelError for a file that is damaged or of an architecture that is not in the table.
    """
    source = read_gguf(path)
    architecture = _architecture(source)
    vocabulary = read_vocabulary(source)
    sizes = _sizes(source)
    config = _config(source, architecture, vocabulary, sizes)
    weights = _weights(source, architecture, config, sizes)
    with new_dir(destination) as folder:
        write_json(folder / "config.json", normalise_config(config))
        write_json(folder / "generation_config.json", _generation_config(vocabulary))
        write_tokenizer(source, vocabulary, folder)
        slots = [TensorSlot(w.name, _dtype(w.tensor), w.tensor.shape) for w in weights]
        write_safetensors(folder / "model.safetensors", slots, _arrays(source, weights))


def _architecture(source: GgufFile) -> _Architecture:
    name = source.text("general.architecture")
    if name not in _ARCHITECTURES:
        raise ModelError(
            f"{source.path}: GGUF architecture {name!r} cannot be read "
            f"(accepted: {', '.join(_ARCHITECTURES)}): use the original model's folder or hub id"
        )
    if source.number("split.count", 1) > 1:
        raise ModelError(f"{source.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    if source.number(f"{name}.expert_count", 0):
        raise ModelError(f"{source.path}: a mixture of experts; use the original model's folder or hub id")
    return _ARCHITECTURES[name]


def _sizes(source: GgufFile) -> dict[str, int]:
    """The numbers tensor shapes are made of, by the words the rules use."""
    prefix = source.fields["general.architecture"]
    keys = {
        "layers": "block_count",
        "hidden": "embedding_length",
        "ffn": "feed_forward_length",
        "heads": "attention.head_count",
    }
    sizes: dict[str, int] = {}
    faults = []
    for word, key in keys.items():
        value = source.fields.get(f"{prefix}.{key}")
        if not isinstance(value, int) or value < 1:
            faults.append(f"{prefix}.{key} is {value!r}, a positive whole number was expected")
        else:
            sizes[word] = value
    if sizes.get("layers", 0) > len(source.tensors):
        faults.append(f"{sizes['layers']} layers in {len(source.tensors)} tensors")
    if faults:
        raise ModelError(join_faults(f"{source.path}: this file cannot be read as {prefix}:", faults))
    sizes["kv_heads"] = source.number(f"{prefix}.attention.head_count_kv", sizes["heads"])
    sizes["head_dim"] = source.number(f"{prefix}.attention.key_length", sizes["hidden"] // sizes["heads"])
    faults = _odd_heads(source, prefix, sizes)
    if faults:
        raise ModelError(join_faults(f"{source.path}: this file cannot be read as {prefix}:", faults))
    sizes["q"] = sizes["heads"] * sizes["head_dim"]
    sizes["kv"] = sizes["kv_heads"] * sizes["head_dim"]
    embedding = source.tensors.get("token_embd.weight")
    sizes["vocab"] = embedding.shape[0] if embedding else 0
    return sizes


def _odd_heads(source: GgufFile, prefix: str, sizes: dict[str, int]) -> list[str]:
    faults = []
    if not isinstance(sizes["kv_heads"], int) or sizes["kv_heads"] < 1 or sizes["heads"] % sizes["kv_heads"]:
        faults.append(f"head_count_kv is {sizes['kv_heads']!r}, a divisor of {sizes['heads']} was expected")
    for key in ("attention.value_length", "rope.dimension_count"):
        value = source.fields.get(f"{prefix}.{key}", sizes["head_dim"])
        if value != sizes["head_dim"]:
            faults.append(f"{prefix}.{key} is {value!r}, the head size {sizes['head_dim']} was expected")
    return faults


def _config(
    source: GgufFile, architecture: _Architecture, vocabulary: GgufVocabulary, sizes: dict[str, int]
) -> dict[str, Any]:
    prefix = source.fields["general.architecture"]
    if sizes["vocab"] != len(vocabulary.tokens):
        raise ModelError(
            f"{source.path}: token_embd.weight has {sizes['vocab']} rows for {len(vocabulary.tokens)} tokens"
        )
    parameters = _rope_parameters(source, prefix, sizes["head_dim"])
    embedding = source.tensors["token_embd.weight"]
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": _dtype(embedding).name,
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "hidden_act": architecture.hidden_act,
        "rms_norm_eps": _shortest(source.number(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": source.number(f"{prefix}.context_length", 2048),
        "rope_parameters": parameters,
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in source.tensors,
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


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_parameters(source: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    theta = _shortest(source.number(f"{prefix}.rope.freq_base", 10_000.0))
    kind = source.text(f"{prefix}.rope.scaling.type") or "none"
    factors = source.tensors.get("rope_freqs.weight")
    if factors is not None:
        return {"rope_theta": theta, **_llama3_scaling(source, factors, theta, head_dim)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        factor = _shortest(source.number(f"{prefix}.rope.scaling.factor", 1.0))
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    raise ModelError(
        f"{source.path}: {prefix}.rope.scaling.type is {kind!r}; none and linear can be read: "
        "use the original model's folder or hub id"
    )


def _llama3_scaling(source: GgufFile, tensor: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the llama3 scaling behind a table of factors [head_dim / 2], and check that it gives this table.

    Slow rotations are divided by `factor`, fast ones kept, those between blended (Llama 3.1 model card).
    """
    found = source.packed(tensor).reshape(-1).view(np.float32) if tensor.kind.name == "F32" else np.zeros(0)
    low, high, context = 1.0, 4.0, 8192
    wavelengths = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(found.max(initial=1.0))
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5, atol=0):
        raise ModelError(
            f"{source.path}: rope_freqs.weight holds another scaling than Llama 3's; "
            "use the original model's folder or hub id"
        )
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _weights(
    source: GgufFile, architecture: _Architecture, config: dict[str, Any], sizes: dict[str, int]
) -> list[_Weight]:
    """Pair every tensor the architecture wants with one of the file; all faults in one ModelError."""
    wanted = _wanted(architecture, config, sizes["layers"])
    weights = []
    unknown = source.tensors.keys() - wanted.keys() - {"rope_freqs.weight"}
    faults = [f"{name} is not a tensor of {architecture.model_type}" for name in unknown]
    for name, (hf_name, rule) in wanted.items():
        tensor = source.tensors.get(name)
        shape = tuple(sizes[word] for word in rule.shape)
        if name.endswith(".bias"):
            shape = shape[:1]
        if tensor is None:
            faults.append(f"{name} is missing")
        elif tensor.shape != shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, {list(shape)} was expected")
        elif not _is_readable(tensor.kind):
            faults.append(f"{name} has type {tensor.kind.name}, which cannot be dequantized")
        else:
            weights.append(_Weight(hf_name, tensor, sizes[rule.heads] if rule.heads else 0))
    if faults:
        headline = f"{source.path}: the tensors do not make a {architecture.model_type} model:"
        raise ModelError(join_faults(headline, sorted(faults)))
    return weights


def _wanted(architecture: _Architecture, config: dict[str, Any], num_layers: int) -> dict[str, tuple[str, _Rule]]:
    wanted = {}
    for stem, rule in architecture.whole.items():
        if stem != "output" or not config["tie_word_embeddings"]:
            wanted[f"{stem}.weight"] = (f"{rule.name}.weight", rule)
    for layer in range(num_layers):
        for stem, rule in architecture.per_layer.items():
            name = f"model.layers.{layer}.{rule.name}"
            wanted[f"blk.{layer}.{stem}.weight"] = (f"{name}.weight", rule)
            has_bias = config["attention_bias"] if "self_attn" in name else config["mlp_bias"]
            if has_bias and len(rule.shape) == 2:
                wanted[f"blk.{layer}.{stem}.bias"] = (f"{name}.bias", rule)
    return wanted


def _is_readable(kind: GGMLQuantizationType) -> bool:
    if kind.name in _KEPT:
        return True
    block_bytes = GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dtype(tensor: GgufTensor) -> np.dtype[Any]:
    return _KEPT.get(tensor.kind.name, _HALF)


def _arrays(source: GgufFile, weights: list[_Weight]) -> Iterator[np.ndarray[Any, Any]]:
    for weight in weights:
        try:
            with np.errstate(over="raise"):
                yield _array(source.packed(weight.tensor), weight)
        except FloatingPointError:
            raise ModelError(
                f"{source.path}: {weight.tensor.name} holds numbers beyond float16 (65504); "
                "give a BF16 or F32 file of the model"
            ) from None


def _array(packed: Bytes, weight: _Weight) -> np.ndarray[Any, Any]:
    if weight.tensor.name.endswith(".bias"):
        packed = packed.reshape(weight.tensor.shape[0], -1)
    if weight.heads:
        packed = _unpermute(packed, weight.heads)
    kind, dtype = weight.tensor.kind, _dtype(weight.tensor)
    if kind.name in _KEPT:
        return packed.reshape(-1).view(dtype).reshape(weight.tensor.shape)
    columns = weight.tensor.shape[-1]
    array = np.empty((packed.shape[0], columns), dtype)
    step = max(1, _SLAB // columns)
    for start in range(0, packed.shape[0], step):
        # as one long row: gguf cuts its work by rows, in pieces too small for speed
        slab = packed[start : start + step]
        array[start : start + step] = gguf.dequantize(slab.reshape(1, -1), kind).reshape(-1, columns)
    return array.reshape(weight.tensor.shape)


def _unpermute(rows: Bytes, heads: int) -> Bytes:
    """GGUF interleaves the two halves of each head's rows, [h, d/2, 2, ...]; HF has [h, 2, d/2, ...]."""
    pairs: Bytes = rows.reshape(heads, -1, 2, rows.shape[1])
    halves: Bytes = pairs.swapaxes(1, 2).reshape(rows.shape)
    return halves
