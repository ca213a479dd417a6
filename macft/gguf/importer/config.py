"""Translate the number fields of a GGUF file into the entries of config.json."""

from __future__ import annotations

import logging
from math import pi
from typing import Any

import numpy as np

from macft.errors import ModelError, join_problems
from macft.gguf import dimensions
from macft.gguf.dimensions import Sizes
from macft.gguf.format import GgufFile, GgufTensor

log = logging.getLogger("macft")

_MISTRAL_7B = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
_NEEDED = ("layers", "hidden", "ffn", "heads")
_EXPERTS = ("experts", "experts_used", "expert_ffn")


def read_sizes(source: GgufFile, *, has_experts: bool, is_partly_rotated: bool) -> dict[str, int]:
    """The sizes by the words that the tensor rules use; all problems in one ModelError."""
    prefix = source.fields["general.architecture"]
    headline = f"{source.path}: this file cannot be read as {prefix}:"
    sizes: dict[str, int] = {}
    problems = []
    for word in (*_NEEDED, *(_EXPERTS if has_experts else ())):
        key = dimensions.FIELDS[word]
        value = source.fields.get(f"{prefix}.{key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{prefix}.{key} is {str(value)[:60]}, a positive whole number was expected")
        else:
            sizes[word] = value
    if sizes.get("layers", 0) > len(source.tensors):
        problems.append(f"{sizes['layers']} layers in {len(source.tensors)} tensors")
    if problems:
        raise ModelError(join_problems(headline, problems))
    sizes["kv_heads"] = source.number(f"{prefix}.{dimensions.FIELDS['kv_heads']}", sizes["heads"])
    sizes["head_dim"] = source.number(f"{prefix}.{dimensions.FIELDS['head_dim']}", sizes["hidden"] // sizes["heads"])
    sizes["rotated"] = source.number(f"{prefix}.rope.dimension_count", sizes["head_dim"])
    problems = _odd_heads(source, prefix, sizes, is_partly_rotated)
    if problems:
        raise ModelError(join_problems(headline, problems))
    embedding = source.tensors.get("token_embd.weight")
    return dimensions.with_products({**sizes, "vocab": embedding.shape[0] if embedding else 0})


def _odd_heads(source: GgufFile, prefix: str, sizes: dict[str, int], is_partly_rotated: bool) -> list[str]:
    problems = []
    if not isinstance(sizes["kv_heads"], int) or sizes["kv_heads"] < 1 or sizes["heads"] % sizes["kv_heads"]:
        problems.append(f"head_count_kv is {sizes['kv_heads']!r}, a divisor of {sizes['heads']} was expected")
    value_dim = source.fields.get(f"{prefix}.attention.value_length", sizes["head_dim"])
    if value_dim != sizes["head_dim"]:
        problems.append(
            f"{prefix}.attention.value_length is {value_dim!r}, the head size {sizes['head_dim']} was expected"
        )
    rotated, expected = sizes["rotated"], f"the head size {sizes['head_dim']}"
    is_part = isinstance(rotated, int) and 0 < rotated < sizes["head_dim"] and rotated % 2 == 0
    if rotated != sizes["head_dim"] and not (is_partly_rotated and is_part):
        expected += " or an even part of it" if is_partly_rotated else ""
        problems.append(f"{prefix}.rope.dimension_count is {rotated!r}, {expected} was expected")
    return problems


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _number(source: GgufFile, key: str, default: float) -> float:
    return shortest(source.number(f"{source.fields['general.architecture']}.{key}", default))


def common(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """The entries that every model type has."""
    prefix = source.fields["general.architecture"]
    return {
        **dimensions.as_config(sizes, "hidden", "ffn", "layers", "heads", "kv_heads", "head_dim"),
        "rms_norm_eps": _number(source, "attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": source.number(f"{prefix}.context_length", 2048),
        "rope_parameters": _rope_parameters(source, prefix, sizes["head_dim"]),
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }


def llama(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """What llama has of its own: flags for biases; a file with a window, which llama has not, is a mistral."""
    if window := source.number("llama.attention.sliding_window", 0):
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return {**mistral, "hidden_act": "silu", "sliding_window": window}
    if _is_early_mistral(source, sizes):
        log.warning(
            "%s: by its name or sizes a Mistral of 2023, which attends over a window of tokens (Mistral 7B v0.1: 4096) "
            "that this file does not record: beyond it the imported model attends to everything, as llama.cpp does; "
            "for longer texts use the original model's folder",
            source.path,
        )
    return {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in source.tensors,
    }


def _is_early_mistral(source: GgufFile, sizes: Sizes) -> bool:
    """By its sizes, or by its name: later ones have no window, and another rope base."""
    if _number(source, "rope.freq_base", 10_000.0) != 10_000.0:
        return False
    names = " ".join(str(value) for key, value in source.fields.items() if key.startswith("general."))
    has_sizes = all(sizes[word] == size for word, size in _MISTRAL_7B.items())
    return has_sizes or "mistral" in names.lower()


def smollm3(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """Every fourth layer has no rotary positions, which no field says (llama.cpp assumes it too)."""
    del source
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": dimensions.SMOLLM3_PERIOD,
        "no_rope_layers": dimensions.smollm3_rope_layers(sizes["layers"]),
        "use_sliding_window": False,
        "sliding_window": None,
    }


def qwen(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """What qwen2 and qwen3 have of their own; the flag is read by qwen3, qwen2 always has biases."""
    del source, sizes
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def qwen_moe(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """As qwen3; every layer is a mixture whose chosen weights are scaled to sum to 1 (llama.cpp assumes both)."""
    return {
        **qwen(source, sizes),
        **dimensions.as_config(sizes, "expert_ffn", "experts", "experts_used"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def gemma2(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """What gemma2 has of its own: soft caps, and a window in every other layer."""
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": _number(source, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _number(source, "final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": dimensions.gemma_query_scalar(sizes, dimensions.GEMMA2_27B),
        "sliding_window": source.number("gemma2.attention.sliding_window", 4096),
        "layer_types": _layer_types(source, sizes["layers"], dimensions.GEMMA2_PERIOD),
    }


def gemma3(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """What gemma3 has of its own: two rope bases, and a window in all but every sixth layer."""
    window = source.number("gemma3.attention.sliding_window", 0)
    whole = _rope_parameters(source, "gemma3", sizes["head_dim"], default_theta=1_000_000.0)
    local = {"rope_theta": _number(source, "rope.freq_base_swa", 10_000.0), "rope_type": "default"}
    all_global = ["full_attention"] * sizes["layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _number(source, "final_logit_softcapping", 0.0) or None,
        "query_pre_attn_scalar": dimensions.gemma_query_scalar(sizes, dimensions.GEMMA3_27B),
        "sliding_window": window or 4096,
        "layer_types": _layer_types(source, sizes["layers"], dimensions.GEMMA3_PERIOD) if window else all_global,
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }


def _layer_types(source: GgufFile, num_layers: int, default_period: int) -> list[str]:
    """Every `period`th layer is global, unless the file names another period."""
    prefix = source.fields["general.architecture"]
    period = source.number(f"{prefix}.attention.sliding_window_pattern", default_period)
    if not isinstance(period, int) or period < 1:
        raise ModelError(
            f"{source.path}: {prefix}.attention.sliding_window_pattern is {period}, 1 or more was expected"
        )
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(num_layers)]


def phi3(source: GgufFile, sizes: Sizes) -> dict[str, Any]:
    """What phi3 has of its own: positions over a part of each head, and two tables of rope factors."""
    context = source.number("phi3.context_length", 4096)
    original = source.number("phi3.rope.scaling.original_context_length", context)
    rope = _rope_parameters(source, "phi3", sizes["head_dim"])
    rope["partial_rotary_factor"] = sizes["rotated"] / sizes["head_dim"]
    tables = {key: source.tensors.get(f"rope_factors_{key}.weight") for key in ("long", "short")}
    if any(tables.values()):
        rope["rope_type"] = "longrope"
        rope["original_max_position_embeddings"] = original
        for key, tensor in tables.items():
            rope[f"{key}_factor"] = _factors(source, tensor, key, sizes["rotated"] // 2)
        if "phi3.rope.scaling.attn_factor" in source.fields:
            rope["attention_factor"] = _number(source, "rope.scaling.attn_factor", 1.0)
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "sliding_window": source.number("phi3.attention.sliding_window", 0) or None,
        "rope_parameters": rope,
    }


def _factors(source: GgufFile, tensor: GgufTensor | None, key: str, count: int) -> list[float]:
    if tensor is None or tensor.shape != (count,) or tensor.kind.name != "F32":
        found = "missing" if tensor is None else f"{tensor.kind.name} {list(tensor.shape)}"
        raise ModelError(f"{source.path}: rope_factors_{key}.weight is {found}, F32 [{count}] was expected")
    return [shortest(float(value)) for value in source.packed(tensor).reshape(-1).view(np.float32)]


def _rope_parameters(
    source: GgufFile, prefix: str, head_dim: int, *, default_theta: float = 10_000.0
) -> dict[str, Any]:
    theta = _number(source, "rope.freq_base", default_theta)
    kind = source.text(f"{prefix}.rope.scaling.type") or "none"
    factors = source.tensors.get("rope_freqs.weight")
    if factors is not None:
        return {"rope_theta": theta, **_llama3_scaling(source, factors, theta, head_dim)}
    if kind == "none" or (kind == "longrope" and prefix == "phi3"):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        factor = _number(source, "rope.scaling.factor", 1.0)
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
        "factor": shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
