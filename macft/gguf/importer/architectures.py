"""From the name of a GGUF architecture to the names and shapes of its tensors, here and in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from macft.gguf.format import GgufFile
from macft.gguf.importer import config as gguf_config


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: its HF name, its shape in words of `gguf_config.read_sizes`, what GGUF did to it.

    `heads`: rows are interleaved within so many heads. `is_shifted`: 1 was added. `bias`: "always" beside the
    weight, or when the config has this flag. "{expert}" in the name: one HF tensor for each of a stack.
    """

    name: str
    shape: tuple[str, ...]
    heads: str = ""
    bias: str = ""
    is_shifted: bool = False


@dataclass(frozen=True)
class Architecture:
    """`own` gives the config entries that only this model type has; `rope_tensors` are those it reads."""

    model_type: str
    class_name: str
    whole: dict[str, Rule]
    per_layer: dict[str, Rule]
    own: Callable[[GgufFile, dict[str, int]], dict[str, Any]]
    rope_tensors: frozenset[str] = frozenset()
    has_experts: bool = False
    is_partly_rotated: bool = False  # rotary positions may cover a part of each head


def _norm(name: str, size: str = "hidden") -> Rule:
    return Rule(name, (size,))


_WHOLE = {
    "token_embd": Rule("model.embed_tokens", ("vocab", "hidden")),
    "output_norm": _norm("model.norm"),
    "output": Rule("lm_head", ("vocab", "hidden")),
}
_ATTENTION = {
    "attn_norm": _norm("input_layernorm"),
    "attn_q": Rule("self_attn.q_proj", ("q", "hidden")),
    "attn_k": Rule("self_attn.k_proj", ("kv", "hidden")),
    "attn_v": Rule("self_attn.v_proj", ("kv", "hidden")),
    "attn_output": Rule("self_attn.o_proj", ("hidden", "q")),
}
_FEED_FORWARD = {
    "ffn_norm": _norm("post_attention_layernorm"),
    "ffn_gate": Rule("mlp.gate_proj", ("ffn", "hidden")),
    "ffn_up": Rule("mlp.up_proj", ("ffn", "hidden")),
    "ffn_down": Rule("mlp.down_proj", ("hidden", "ffn")),
}
_EXPERTS = {
    "ffn_norm": _norm("post_attention_layernorm"),
    "ffn_gate_inp": Rule("mlp.gate", ("experts", "hidden")),
    "ffn_gate_exps": Rule("mlp.experts.{expert}.gate_proj", ("experts", "expert_ffn", "hidden")),
    "ffn_up_exps": Rule("mlp.experts.{expert}.up_proj", ("experts", "expert_ffn", "hidden")),
    "ffn_down_exps": Rule("mlp.experts.{expert}.down_proj", ("experts", "hidden", "expert_ffn")),
}
_HEAD_NORMS = {
    "attn_q_norm": _norm("self_attn.q_norm", "head_dim"),
    "attn_k_norm": _norm("self_attn.k_norm", "head_dim"),
}


def _interleaved(rules: dict[str, Rule]) -> dict[str, Rule]:
    """llama.cpp's converter stores q and k in the row order of the original llama code."""
    return {
        **rules,
        "attn_q": replace(rules["attn_q"], heads="heads"),
        "attn_k": replace(rules["attn_k"], heads="kv_heads"),
    }


def _biased(rules: dict[str, Rule], flag: str, stems: tuple[str, ...]) -> dict[str, Rule]:
    return {stem: replace(rule, bias=flag) if stem in stems else rule for stem, rule in rules.items()}


def _shifted(rules: dict[str, Rule]) -> dict[str, Rule]:
    """Gemma multiplies by 1 + weight; GGUF holds the sum."""
    return {stem: replace(rule, is_shifted=True) if len(rule.shape) == 1 else rule for stem, rule in rules.items()}


_QKV = ("attn_q", "attn_k", "attn_v")
_SMOLLM3_LAYER = _interleaved({**_ATTENTION, **_FEED_FORWARD})
_LLAMA_LAYER = _biased(
    _biased(_SMOLLM3_LAYER, "attention_bias", (*_QKV, "attn_output")),
    "mlp_bias",
    ("ffn_gate", "ffn_up", "ffn_down"),
)
_QWEN3_ATTENTION = {**_ATTENTION, **_HEAD_NORMS}
# in gemma the norm before the MLP is not the one after attention
_GEMMA2_LAYER = {
    **_ATTENTION,
    "post_attention_norm": _norm("post_attention_layernorm"),
    **_FEED_FORWARD,
    "ffn_norm": _norm("pre_feedforward_layernorm"),
    "post_ffw_norm": _norm("post_feedforward_layernorm"),
}
_PHI3_LAYER = {
    "attn_norm": _norm("input_layernorm"),
    "attn_qkv": Rule("self_attn.qkv_proj", ("qkv", "hidden")),
    "attn_output": Rule("self_attn.o_proj", ("hidden", "q")),
    "ffn_norm": _norm("post_attention_layernorm"),
    "ffn_up": Rule("mlp.gate_up_proj", ("two_ffn", "hidden")),
    "ffn_down": Rule("mlp.down_proj", ("hidden", "ffn")),
}

# By `general.architecture`. A mistral file says "llama": without its window it is one.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _WHOLE, _LLAMA_LAYER, gguf_config.llama, frozenset({"rope_freqs.weight"})
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        _WHOLE,
        _biased({**_ATTENTION, **_FEED_FORWARD}, "always", _QKV),
        gguf_config.qwen,
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _WHOLE, {**_QWEN3_ATTENTION, **_FEED_FORWARD}, gguf_config.qwen),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _WHOLE,
        {**_QWEN3_ATTENTION, **_EXPERTS},
        gguf_config.qwen_moe,
        has_experts=True,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _shifted(_WHOLE), _shifted(_GEMMA2_LAYER), gguf_config.gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _shifted(_WHOLE),
        _shifted({**_GEMMA2_LAYER, **_HEAD_NORMS}),
        gguf_config.gemma3,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _WHOLE,
        _PHI3_LAYER,
        gguf_config.phi3,
        frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
        is_partly_rotated=True,
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _WHOLE, _SMOLLM3_LAYER, gguf_config.smollm3),
}
