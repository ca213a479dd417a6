"""From an HF model type to all that its GGUF file needs: tensor names and shapes, fields, what llama.cpp assumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from macft.gguf.exporter import hyper_parameters as numbers
from macft.gguf.exporter import linear_attention, rope
from macft.gguf.format import Field
from macft.gguf.importer.architectures import ARCHITECTURES, Rule

Config = Mapping[str, Any]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Export:
    """One architecture. `problems` says where a config contradicts what llama.cpp assumes of it.

    `linear_layer` has the rules of layers with linear attention. `rope_types` are those that llama.cpp reads for
    it; `rotated` is the part of each head with rotary positions when the config names none. `is_always_tied`:
    llama.cpp reads no head; `is_never_tied`: it wants one in any case. `cuts_vocabulary`: rows of the embedding
    beyond the tokenizer's tokens are left out.
    """

    architecture: str
    whole: Mapping[str, Rule]
    per_layer: Mapping[str, Rule]
    fields: Callable[[Config, Sizes], dict[str, Field]]
    problems: Callable[[Config, Sizes], list[str]] = numbers.plain_problems
    rope_types: frozenset[str] = rope.PLAIN
    linear_layer: Mapping[str, Rule] = field(default_factory=dict)
    is_partly_rotated: bool = False
    rotated: float = 1.0
    is_always_tied: bool = False
    is_never_tied: bool = False
    cuts_vocabulary: bool = False


Rules = dict[str, Rule]


def _rules(architecture: str) -> Rules:
    """The rules by which such a file is imported, with a layer's experts in one tensor under mlx-lm's name."""
    rules = ARCHITECTURES[architecture].per_layer
    return {
        stem: replace(rule, name=rule.name.replace("experts.{expert}", "switch_mlp")) for stem, rule in rules.items()
    }


def _only(rules: Rules, prefix: str) -> Rules:
    return {stem: rule for stem, rule in rules.items() if stem.startswith(prefix)}


def _in_block(rules: Rules, old: str, new: str) -> Rules:
    """Modules of the block `old` as those of the block `new`."""
    return {
        stem: replace(rule, name=f"{new}.{rule.name.removeprefix(f'{old}.')}")
        if rule.name.startswith(f"{old}.")
        else rule
        for stem, rule in rules.items()
    }


def _after_attention(rules: Rules) -> Rules:
    """Where llama.cpp calls the norm before the MLP one after attention."""
    return {"post_attention_norm" if stem == "ffn_norm" else stem: rule for stem, rule in rules.items()}


def _shifted(rules: Rules) -> Rules:
    """With norms that hold 1 + weight."""
    return {stem: replace(rule, is_shifted=True) if len(rule.shape) == 1 else rule for stem, rule in rules.items()}


def _biased(rules: Rules, flag: str, *stems: str) -> Rules:
    return {stem: replace(rule, bias=flag) if stem in stems else rule for stem, rule in rules.items()}


_WHOLE = ARCHITECTURES["qwen2"].whole
_QKV = ("attn_q", "attn_k", "attn_v")
_LLAMA, _SPARSE = _rules("llama"), _only(_rules("qwen3moe"), "ffn_")
_MIXTRAL = {**_only(_LLAMA, "attn_"), **_in_block(_SPARSE, "mlp", "block_sparse_moe")}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": Rule("mlp.shared_expert_gate", ("one", "hidden")),
    "ffn_gate_shexp": Rule("mlp.shared_expert.gate_proj", ("shared_ffn", "hidden")),
    "ffn_up_shexp": Rule("mlp.shared_expert.up_proj", ("shared_ffn", "hidden")),
    "ffn_down_shexp": Rule("mlp.shared_expert.down_proj", ("hidden", "shared_ffn")),
}
_QWEN2_MOE = {**_biased(_only(_rules("qwen2"), "attn_"), "qkv_bias", *_QKV), **_SPARSE, **_SHARED_EXPERT}
_GLM4 = {
    **_biased(_only(_rules("qwen2"), "attn_"), "attention_bias", *_QKV),
    "post_attention_norm": Rule("post_self_attn_layernorm", ("hidden",)),
    **_only(_rules("phi3"), "ffn_"),
    "post_ffw_norm": Rule("post_mlp_layernorm", ("hidden",)),
}
_OSS = {
    **_biased(_only(_rules("qwen2"), "attn_"), "always", *_QKV, "attn_output"),
    "attn_sinks": Rule("self_attn.sinks", ("heads",)),
    "post_attention_norm": Rule("post_attention_layernorm", ("hidden",)),
    "ffn_gate_inp": Rule("mlp.router", ("experts", "hidden"), bias="always"),
    "ffn_gate_exps": Rule("mlp.experts.gate_proj", ("experts", "ffn", "hidden"), bias="always"),
    "ffn_up_exps": Rule("mlp.experts.up_proj", ("experts", "ffn", "hidden"), bias="always"),
    "ffn_down_exps": Rule("mlp.experts.down_proj", ("experts", "hidden", "ffn"), bias="always"),
}
_GATED = {**_rules("qwen3"), "attn_q": Rule("self_attn.q_proj", ("two_q", "hidden"))}
_DENSE = _shifted(_after_attention(_only(_rules("qwen3"), "ffn_")))
_MIXED = _shifted(_after_attention({**_SPARSE, **_SHARED_EXPERT}))
_FULL = _shifted(_only(_GATED, "attn_"))

_llama = Export("llama", _WHOLE, _LLAMA, numbers.llama, rope_types=rope.WITH_LLAMA3)

_next = Export(
    "qwen3next",
    _shifted(dict(_WHOLE)),
    {**_FULL, **_MIXED},
    numbers.hybrid,
    numbers.hybrid_problems,
    linear_layer={**linear_attention.NEXT_RULES, **_MIXED},
    is_partly_rotated=True,
    rotated=0.25,
)
_three_five_moe = replace(
    _next,
    architecture="qwen35moe",
    fields=numbers.hybrid_3_5,
    linear_layer={**linear_attention.RULES_3_5, **_MIXED},
)
_three_five = replace(
    _three_five_moe,
    architecture="qwen35",
    per_layer={**_FULL, **_DENSE},
    linear_layer={**linear_attention.RULES_3_5, **_DENSE},
)

# By the model_type of config.json.
EXPORTS: dict[str, Export] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": replace(
        _llama, per_layer=_MIXTRAL, problems=partial(numbers.sparse_problems, normalized=True), rope_types=rope.PLAIN
    ),
    "qwen2": Export("qwen2", _WHOLE, _rules("qwen2"), numbers.common, numbers.square_problems),
    "qwen3": Export("qwen3", _WHOLE, _rules("qwen3"), numbers.common),
    "qwen2_moe": Export(
        "qwen2moe",
        _WHOLE,
        _QWEN2_MOE,
        numbers.mixture,
        numbers.qwen2_moe_problems,
        is_never_tied=True,
    ),
    "qwen3_moe": Export(
        "qwen3moe", _WHOLE, _rules("qwen3moe"), numbers.mixture, partial(numbers.sparse_problems, normalized=True)
    ),
    "gemma2": Export(
        "gemma2", ARCHITECTURES["gemma2"].whole, _rules("gemma2"), numbers.gemma2, numbers.gemma2_problems,
        is_always_tied=True,
    ),
    "gemma3_text": Export(
        "gemma3", ARCHITECTURES["gemma3"].whole, _rules("gemma3"), numbers.gemma3, numbers.gemma3_problems,
        cuts_vocabulary=True,
    ),
    "phi3": Export(
        "phi3", _WHOLE, _rules("phi3"), numbers.phi3, numbers.square_problems,
        rope_types=rope.LONGROPE, is_partly_rotated=True,
    ),
    "smollm3": Export("smollm3", _WHOLE, _rules("smollm3"), numbers.llama, numbers.smollm3_problems),
    "glm4": Export("glm4", _WHOLE, _GLM4, numbers.glm4, is_partly_rotated=True, rotated=0.5),
    "gpt_oss": Export("gpt-oss", _WHOLE, _OSS, numbers.gpt_oss, numbers.gpt_oss_problems, is_never_tied=True),
    "qwen3_next": _next,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), _three_five),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe"), _three_five_moe),
}  # fmt: skip
