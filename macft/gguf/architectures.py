"""List the architectures of GGUF files: the model types behind them, their tensors, and how to read and write each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from macft.gguf import tensor_rules as rules
from macft.gguf.dimensions import Sizes
from macft.gguf.exporter import hyper_parameters as write
from macft.gguf.exporter import rope
from macft.gguf.format import Field, GgufFile
from macft.gguf.importer import config as read
from macft.gguf.tensor_rules import EXPERT, TensorRule, TensorRules
from macft.weights.layouts.mlx_experts import OSS_EXPERTS, SPARSE_BLOCK, stack_experts
from macft.weights.layouts.mlx_rules import DROP_MTP, DROP_VISION, LayoutRule
from macft.weights.model_config import Config

_SUFFIX = {"ssm_a": "", "ssm_dt": ".bias"}  # all other tensors of a rule are called weights
_ON_BY_DEFAULT = ("always", "qkv_bias")
_ROPE_TENSORS = {
    "llama3": ("rope_freqs.weight",),
    "longrope": ("rope_factors_long.weight", "rope_factors_short.weight"),
}


@dataclass(frozen=True)
class Import:
    """How config.json is made of a file; `entries` are those that only this model type has."""

    class_name: str
    entries: Callable[[GgufFile, Sizes], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A model type and its architecture in GGUF.

    `linear_layer` has the rules of layers with linear attention. `fields` gives the number fields, `problems` says
    where a config contradicts what llama.cpp assumes. `rope_types` are those that llama.cpp reads for it; `rotated`
    is the part of each head with rotary positions when the config names none. `is_always_tied`: llama.cpp reads no
    head; `is_never_tied`: it needs one in any case. `cuts_vocabulary`: rows of the embedding beyond the tokenizer's
    tokens are left out. `preparation` are rules of MLX's layout: they drop what llama.cpp does not read, and put the
    experts of a layer into one tensor for each projection. Without `imports` files cannot be read.
    """

    name: str
    per_layer: TensorRules
    fields: Callable[[Config, Sizes], dict[str, Field]]
    problems: Callable[[Config, Sizes], list[str]] = write.plain_problems
    whole: TensorRules = field(default_factory=lambda: rules.WHOLE)
    linear_layer: TensorRules = field(default_factory=dict)
    rope_types: frozenset[str] = rope.PLAIN
    is_partly_rotated: bool = False
    rotated: float = 1.0
    is_always_tied: bool = False
    is_never_tied: bool = False
    cuts_vocabulary: bool = False
    preparation: tuple[LayoutRule, ...] = ()
    imports: Import | None = None

    @property
    def has_experts(self) -> bool:
        """Whether layers hold several experts, each with tensors of its own in the HF layout."""
        return any(EXPERT in rule.name for rule in self.per_layer.values())

    @property
    def rope_tensors(self) -> frozenset[str]:
        """The GGUF names of tables for rotary positions, which have no counterpart among the HF tensors."""
        return frozenset(name for kind in self.rope_types for name in _ROPE_TENSORS.get(kind, ()))

    def tensors(self, config: Config, layers: int, *, has_head: bool) -> dict[str, tuple[str, TensorRule]]:
        """GGUF name to HF name and rule of every tensor of a model with this config."""
        found = {}
        for stem, rule in self.whole.items():
            if stem != "output" or has_head:
                found[f"{stem}.weight"] = (f"{rule.name}.weight", rule)
        interval = config.get("full_attention_interval") or 4  # in configs of transformers 4, without layer_types
        kinds = config.get("layer_types") or ["linear_attention" if (n + 1) % interval else "" for n in range(layers)]
        for layer in range(layers):
            is_linear = bool(self.linear_layer) and kinds[layer] == "linear_attention"
            for stem, rule in (self.linear_layer if is_linear else self.per_layer).items():
                name = f"model.layers.{layer}.{rule.name}"
                found[f"blk.{layer}.{stem}{_SUFFIX.get(stem, '.weight')}"] = (f"{name}.weight", rule)
                if rule.bias and config.get(rule.bias, rule.bias in _ON_BY_DEFAULT):
                    found[f"blk.{layer}.{stem}.bias"] = (f"{name}.bias", rule)
        return found


_normalized = partial(write.sparse_problems, normalized=True)
_shifted_whole = rules.shifted(rules.WHOLE)
_experts = stack_experts("mlp")

_llama = Architecture(
    "llama", rules.LLAMA, write.llama, rope_types=rope.WITH_LLAMA3, imports=Import("LlamaForCausalLM", read.llama)
)
_next = Architecture(
    "qwen3next",
    rules.HYBRID_FULL_MOE,
    write.hybrid,
    write.hybrid_problems,
    whole=_shifted_whole,
    linear_layer=rules.NEXT_LINEAR_MOE,
    is_partly_rotated=True,
    rotated=0.25,
    preparation=(DROP_MTP, _experts),
)
_qwen3_5_moe = replace(
    _next,
    name="qwen35moe",
    fields=write.hybrid_3_5,
    linear_layer=rules.QWEN3_5_LINEAR_MOE,
    preparation=(DROP_VISION, DROP_MTP, _experts),
)
_qwen3_5 = replace(
    _qwen3_5_moe,
    name="qwen35",
    per_layer=rules.HYBRID_FULL,
    linear_layer=rules.QWEN3_5_LINEAR,
    preparation=(DROP_VISION, DROP_MTP),
)

# By the model_type of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama,
    "mistral": replace(_llama, imports=None),  # its files say "llama"
    "mixtral": Architecture(
        "llama", rules.MIXTRAL, write.llama, _normalized,
        preparation=(SPARSE_BLOCK, stack_experts("block_sparse_moe", ("w1", "w3", "w2"))),
    ),
    "qwen2": Architecture(
        "qwen2", rules.QWEN2, write.common, write.square_problems, imports=Import("Qwen2ForCausalLM", read.qwen)
    ),
    "qwen3": Architecture("qwen3", rules.QWEN3, write.common, imports=Import("Qwen3ForCausalLM", read.qwen)),
    "qwen2_moe": Architecture(
        "qwen2moe", rules.QWEN2_MOE, write.mixture, write.qwen2_moe_problems,
        is_never_tied=True, preparation=(_experts,),
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", rules.QWEN3_MOE, write.mixture, _normalized,
        preparation=(_experts,), imports=Import("Qwen3MoeForCausalLM", read.qwen_moe),
    ),
    "gemma2": Architecture(
        "gemma2", rules.GEMMA2, write.gemma2, write.gemma2_problems, _shifted_whole,
        is_always_tied=True, imports=Import("Gemma2ForCausalLM", read.gemma2),
    ),
    "gemma3_text": Architecture(
        "gemma3", rules.GEMMA3, write.gemma3, write.gemma3_problems, _shifted_whole,
        cuts_vocabulary=True, imports=Import("Gemma3ForCausalLM", read.gemma3),
    ),
    "phi3": Architecture(
        "phi3", rules.PHI3, write.phi3, write.square_problems,
        rope_types=rope.LONGROPE, is_partly_rotated=True, imports=Import("Phi3ForCausalLM", read.phi3),
    ),
    "smollm3": Architecture(
        "smollm3", rules.SMOLLM3, write.llama, write.smollm3_problems,
        imports=Import("SmolLM3ForCausalLM", read.smollm3),
    ),
    "glm4": Architecture("glm4", rules.GLM4, write.glm4, is_partly_rotated=True, rotated=0.5),
    "gpt_oss": Architecture(
        "gpt-oss", rules.GPT_OSS, write.gpt_oss, write.gpt_oss_problems,
        is_never_tied=True, preparation=(OSS_EXPERTS,),
    ),
    "qwen3_next": _next,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), _qwen3_5),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe"), _qwen3_5_moe),
}  # fmt: skip

# The model types that files can be imported as, by `general.architecture`.
IMPORTED: dict[str, str] = {row.name: model_type for model_type, row in ARCHITECTURES.items() if row.imports}
