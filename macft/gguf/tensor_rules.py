"""State each kind of tensor once: its GGUF and Hugging Face names, its shape, and how the numbers differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

EXPERT = "experts.{expert}"  # in a name: one HF tensor for each expert of a stack


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor: its HF name, its shape in words of `sizes`, and what GGUF changes.

    `heads`: rows are interleaved within so many heads. `is_shifted`: 1 is added. `bias`: there is one beside the
    weight "always", or when the config has this flag.
    """

    name: str
    shape: tuple[str, ...]
    heads: str = ""
    bias: str = ""
    is_shifted: bool = False


TensorRules = Mapping[str, TensorRule]  # by the GGUF name, without layer and suffix


def norm(name: str, size: str = "hidden") -> TensorRule:
    """A vector of weights."""
    return TensorRule(name, (size,))


def shape_problems(
    model_type: str, rules: TensorRules, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> list[str]:
    """What keeps tensors of these shapes from being those of the rules, both by their names."""
    problems = [f"{name} is not a tensor of {model_type}" for name in shapes.keys() - rules.keys()]
    for name, rule in rules.items():
        shape = tuple(sizes[word] for word in (rule.shape[:-1] if name.endswith(".bias") else rule.shape))
        if name not in shapes:
            problems.append(f"{name} is missing")
        elif shapes[name] != shape:
            problems.append(f"{name} has shape {list(shapes[name])}, {list(shape)} was expected")
    return problems


# --- changes of a group of rules


def interleaved(rules: TensorRules) -> dict[str, TensorRule]:
    """With q and k in the row order of the original llama code, as llama.cpp's converter stores them."""
    heads = {"attn_q": "heads", "attn_k": "kv_heads"}
    return {stem: replace(rule, heads=heads.get(stem, "")) for stem, rule in rules.items()}


def biased(rules: TensorRules, flag: str, *stems: str) -> dict[str, TensorRule]:
    """With biases beside these weights."""
    return {stem: replace(rule, bias=flag) if stem in stems else rule for stem, rule in rules.items()}


def shifted(rules: TensorRules) -> dict[str, TensorRule]:
    """With norms that multiply by 1 + weight, of which GGUF holds the sum."""
    return {stem: replace(rule, is_shifted=True) if len(rule.shape) == 1 else rule for stem, rule in rules.items()}


def after_attention(rules: TensorRules) -> dict[str, TensorRule]:
    """With the norm before the MLP under the name of one after attention."""
    return {"post_attention_norm" if stem == "ffn_norm" else stem: rule for stem, rule in rules.items()}


# --- groups

QKV = ("attn_q", "attn_k", "attn_v")
WHOLE: TensorRules = {
    "token_embd": TensorRule("model.embed_tokens", ("vocab", "hidden")),
    "output_norm": norm("model.norm"),
    "output": TensorRule("lm_head", ("vocab", "hidden")),
}
_ATTENTION = {
    "attn_norm": norm("input_layernorm"),
    "attn_q": TensorRule("self_attn.q_proj", ("q", "hidden")),
    "attn_k": TensorRule("self_attn.k_proj", ("kv", "hidden")),
    "attn_v": TensorRule("self_attn.v_proj", ("kv", "hidden")),
    "attn_output": TensorRule("self_attn.o_proj", ("hidden", "q")),
}
_FEED_FORWARD = {
    "ffn_norm": norm("post_attention_layernorm"),
    "ffn_gate": TensorRule("mlp.gate_proj", ("ffn", "hidden")),
    "ffn_up": TensorRule("mlp.up_proj", ("ffn", "hidden")),
    "ffn_down": TensorRule("mlp.down_proj", ("hidden", "ffn")),
}
_FUSED_FEED_FORWARD = {
    "ffn_norm": _FEED_FORWARD["ffn_norm"],
    "ffn_up": TensorRule("mlp.gate_up_proj", ("two_ffn", "hidden")),
    "ffn_down": _FEED_FORWARD["ffn_down"],
}
_EXPERTS = {
    "ffn_norm": norm("post_attention_layernorm"),
    "ffn_gate_inp": TensorRule("mlp.gate", ("experts", "hidden")),
    "ffn_gate_exps": TensorRule(f"mlp.{EXPERT}.gate_proj", ("experts", "expert_ffn", "hidden")),
    "ffn_up_exps": TensorRule(f"mlp.{EXPERT}.up_proj", ("experts", "expert_ffn", "hidden")),
    "ffn_down_exps": TensorRule(f"mlp.{EXPERT}.down_proj", ("experts", "hidden", "expert_ffn")),
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": TensorRule("mlp.shared_expert_gate", ("one", "hidden")),
    "ffn_gate_shexp": TensorRule("mlp.shared_expert.gate_proj", ("shared_ffn", "hidden")),
    "ffn_up_shexp": TensorRule("mlp.shared_expert.up_proj", ("shared_ffn", "hidden")),
    "ffn_down_shexp": TensorRule("mlp.shared_expert.down_proj", ("hidden", "shared_ffn")),
}
_HEAD_NORMS = {
    "attn_q_norm": norm("self_attn.q_norm", "head_dim"),
    "attn_k_norm": norm("self_attn.k_norm", "head_dim"),
}
_LINEAR_ATTENTION = {
    "attn_norm": TensorRule("input_layernorm", ("hidden",), is_shifted=True),
    "attn_qkv": TensorRule("linear_attn.in_proj_qkv", ("channels", "hidden")),
    "attn_gate": TensorRule("linear_attn.in_proj_z", ("value_channels", "hidden")),
    "ssm_a": TensorRule("linear_attn.A", ("value_heads",)),
    "ssm_dt": TensorRule("linear_attn.dt", ("value_heads",)),
    "ssm_conv1d": TensorRule("linear_attn.conv1d", ("channels", "kernel")),
    "ssm_norm": norm("linear_attn.norm", "value_dim"),
    "ssm_out": TensorRule("linear_attn.out_proj", ("hidden", "value_channels")),
}

# --- layers

SMOLLM3 = interleaved({**_ATTENTION, **_FEED_FORWARD})
LLAMA = biased(biased(SMOLLM3, "attention_bias", *QKV, "attn_output"), "mlp_bias", "ffn_gate", "ffn_up", "ffn_down")
MIXTRAL = {
    **{stem: rule for stem, rule in LLAMA.items() if stem.startswith("attn_")},
    **{stem: replace(rule, name=rule.name.replace("mlp.", "block_sparse_moe.")) for stem, rule in _EXPERTS.items()},
}
QWEN2 = biased({**_ATTENTION, **_FEED_FORWARD}, "always", *QKV)
QWEN3 = {**_ATTENTION, **_HEAD_NORMS, **_FEED_FORWARD}
QWEN2_MOE = {**biased(_ATTENTION, "qkv_bias", *QKV), **_EXPERTS, **_SHARED_EXPERT}
QWEN3_MOE = {**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}
# in gemma the norm before the MLP is not the one after attention
_GEMMA = {
    **_ATTENTION,
    "post_attention_norm": norm("post_attention_layernorm"),
    **_FEED_FORWARD,
    "ffn_norm": norm("pre_feedforward_layernorm"),
    "post_ffw_norm": norm("post_feedforward_layernorm"),
}
GEMMA2 = shifted(_GEMMA)
GEMMA3 = shifted({**_GEMMA, **_HEAD_NORMS})
PHI3 = {
    "attn_norm": norm("input_layernorm"),
    "attn_qkv": TensorRule("self_attn.qkv_proj", ("qkv", "hidden")),
    "attn_output": TensorRule("self_attn.o_proj", ("hidden", "q")),
    **_FUSED_FEED_FORWARD,
}
GLM4 = {
    **biased(_ATTENTION, "attention_bias", *QKV),
    "post_attention_norm": norm("post_self_attn_layernorm"),
    **_FUSED_FEED_FORWARD,
    "post_ffw_norm": norm("post_mlp_layernorm"),
}
GPT_OSS = {
    **biased(_ATTENTION, "always", *QKV, "attn_output"),
    "attn_sinks": norm("self_attn.sinks", "heads"),
    "post_attention_norm": norm("post_attention_layernorm"),
    "ffn_gate_inp": TensorRule("mlp.router", ("experts", "hidden"), bias="always"),
    "ffn_gate_exps": TensorRule("mlp.experts.gate_proj", ("experts", "ffn", "hidden"), bias="always"),
    "ffn_up_exps": TensorRule("mlp.experts.up_proj", ("experts", "ffn", "hidden"), bias="always"),
    "ffn_down_exps": TensorRule("mlp.experts.down_proj", ("experts", "hidden", "ffn"), bias="always"),
}
# Qwen3-Next and Qwen3.5: every Nth layer has full attention, whose q comes with a gate, the others linear attention.
_GATED_ATTENTION = {**_ATTENTION, **_HEAD_NORMS, "attn_q": TensorRule("self_attn.q_proj", ("two_q", "hidden"))}
_NEXT_LINEAR = {**_LINEAR_ATTENTION, "ssm_ba": TensorRule("linear_attn.in_proj_ba", ("two_value_heads", "hidden"))}
_QWEN3_5_LINEAR = {
    **_LINEAR_ATTENTION,
    "ssm_alpha": TensorRule("linear_attn.in_proj_a", ("value_heads", "hidden")),
    "ssm_beta": TensorRule("linear_attn.in_proj_b", ("value_heads", "hidden")),
}
_FULL = shifted(_GATED_ATTENTION)
_DENSE = shifted(after_attention(_FEED_FORWARD))
_MIXED = shifted(after_attention({**_EXPERTS, **_SHARED_EXPERT}))
HYBRID_FULL, HYBRID_FULL_MOE = {**_FULL, **_DENSE}, {**_FULL, **_MIXED}
NEXT_LINEAR_MOE = {**_NEXT_LINEAR, **_MIXED}
QWEN3_5_LINEAR, QWEN3_5_LINEAR_MOE = {**_QWEN3_5_LINEAR, **_DENSE}, {**_QWEN3_5_LINEAR, **_MIXED}
