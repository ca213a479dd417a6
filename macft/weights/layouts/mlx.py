"""Convert a model's tensors and config between the HF layout and mlx-lm's, by a table of architectures.

mlx-lm renames, stacks, shifts or drops tensors when it loads a model of some architectures (`Model.sanitize`)
and saves them so; the table says what it does for each, so that it can be undone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from macft.errors import ModelError
from macft.weights.layouts import mlx_experts as experts
from macft.weights.layouts.mlx_rules import (
    ALWAYS_TIED,
    CONV_AXIS,
    DROP_MTP,
    DROP_ROTARY,
    DROP_VISION,
    NEVER_TIED,
    PREFIX,
    SHIFT_NORMS,
    TIED_HEAD,
    LayoutRule,
    ties_head,
)
from macft.weights.model_config import Config
from macft.weights.source import Source
from macft.weights.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class MlxLayout:
    """The differences between a model's two layouts: `rules` apply in order towards MLX, in reverse to HF.

    `hf_type` and `mlx_type` are the model types to write where the two libraries have different names for a model.
    `eight_bits` are ends of module paths that mlx-lm always quantizes to 8 bits in groups of 64.
    """

    rules: tuple[LayoutRule, ...] = (DROP_ROTARY, TIED_HEAD)
    hf_type: str = ""
    mlx_type: str = ""
    eight_bits: tuple[str, ...] = ()


_MLX_NAME = re.compile(r"\.switch_mlp\.|^language_model\.")
_EXPERTS = experts.stack_experts("mlp")
_ROUTERS = ("mlp.gate", "shared_expert_gate")
_GRANITE = ("self_attn.o_proj", "mlp.down_proj", "lm_head")
_HYBRID = (DROP_ROTARY, DROP_MTP, TIED_HEAD, SHIFT_NORMS, CONV_AXIS)
_QWEN3_5 = MlxLayout((DROP_VISION, *_HYBRID, PREFIX), hf_type="qwen3_5_text", mlx_type="qwen3_5")
_QWEN3_5_MOE = MlxLayout(
    (DROP_VISION, *_HYBRID, _EXPERTS, PREFIX), hf_type="qwen3_5_moe_text", mlx_type="qwen3_5_moe", eight_bits=_ROUTERS
)
_PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "starcoder2",
    "olmo2", "olmo3", "helium", "seed_oss", "ernie4_5", "nemotron", "hunyuan_v1_dense",
)  # fmt: skip

# Taken from mlx_lm/models/<model_type>.py of 0.32.2; tests compare the two.
LAYOUTS: dict[str, MlxLayout] = {
    **dict.fromkeys(_PLAIN, MlxLayout()),
    # a head in the file is kept, and unties the model, whatever config.json says
    "gemma3_text": MlxLayout((DROP_ROTARY,)),
    **dict.fromkeys(("gemma", "gemma2", "cohere", "cohere2"), MlxLayout((DROP_ROTARY, ALWAYS_TIED))),
    **dict.fromkeys(("phi", "stablelm", "glm4"), MlxLayout((DROP_ROTARY, NEVER_TIED))),
    "granite": MlxLayout(eight_bits=_GRANITE),
    "granitemoe": MlxLayout(
        (DROP_ROTARY, TIED_HEAD, experts.GRANITE_EXPERTS), eight_bits=(*_GRANITE, "block_sparse_moe.router.layer")
    ),
    "qwen2_moe": MlxLayout((DROP_ROTARY, NEVER_TIED, _EXPERTS)),
    "qwen3_moe": MlxLayout((DROP_ROTARY, TIED_HEAD, _EXPERTS), eight_bits=("mlp.gate",)),
    "olmoe": MlxLayout((DROP_ROTARY, TIED_HEAD, _EXPERTS)),
    "mixtral": MlxLayout(
        (DROP_ROTARY, TIED_HEAD, experts.SPARSE_BLOCK, experts.stack_experts("block_sparse_moe", ("w1", "w3", "w2"))),
    ),
    "gpt_oss": MlxLayout((DROP_ROTARY, NEVER_TIED, experts.OSS_EXPERTS), eight_bits=("router",)),
    "qwen3_next": MlxLayout((*_HYBRID, _EXPERTS), eight_bits=_ROUTERS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _QWEN3_5),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), _QWEN3_5_MOE),
}


def layout_of(config: Config) -> MlxLayout:
    """The table's entry for a config.json; ModelError, with the known model types, for one that is not in it."""
    found = LAYOUTS.get(config["model_type"])
    if found is None:
        raise ModelError(
            f"model_type {config['model_type']}: how MLX lays out its weights is not known here, so they cannot be "
            f"converted; known are {', '.join(sorted(LAYOUTS))}"
        )
    return found


def to_mlx(config: Config, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """HF-layout tensors as mlx-lm would save them after loading; `mlx_config` returns their config.json.

    Raises ModelError for a model type that is not in the table and for a model that is incomplete, already in
    MLX's layout, or one that MLX cannot represent. `lost_in_mlx` names the tensors that are dropped for good.
    """
    layout, flat = layout_of(config), flat_config(config)
    found = next((tensor.name for tensor in tensors if _MLX_NAME.search(tensor.name)), None)
    if found is not None:
        raise ModelError(f"{found} is a name of the MLX layout, expected the HF layout: the model is converted already")
    for rule in layout.rules:
        tensors = rule.to_mlx(flat, tensors)
    return tensors


def to_hf(config: Config, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """MLX-layout tensors (dequantized) as transformers saves them; `hf_config` returns their config.json.

    Raises ModelError for a model type that is not in the table and for tensors that are not in MLX's layout.
    """
    layout, flat = layout_of(config), flat_config(config)
    for rule in reversed(layout.rules):
        tensors = rule.to_hf(flat, tensors)
    return tensors


def as_hf(source: Source) -> tuple[dict[str, Any], list[LazyTensor]]:
    """(config, tensors) of a model in the HF layout, whichever layout it is stored in."""
    if source.layout == "hf":
        return source.config, source.tensors
    return hf_config(source.config, source.tensors), to_hf(source.config, source.tensors)


def with_experts_apart(config: Config, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """HF-layout tensors with a module for each expert; transformers can also save a layer's experts as one tensor."""
    if not any(experts.FUSED_EXPERTS.search(tensor.name) for tensor in tensors):
        return tensors
    flat = flat_config(config)
    rules = [rule for rule in layout_of(config).rules if rule.name in experts.EXPERTS_APART]
    for change in (*(rule.to_mlx for rule in rules), *(rule.to_hf for rule in reversed(rules))):
        tensors = change(flat, tensors)
    return tensors


def lost_in_mlx(config: Config, tensors: list[LazyTensor]) -> list[str]:
    """Names of HF-layout tensors for which the MLX layout has no place, so that converting back cannot restore them."""
    patterns = [rule.lost for rule in layout_of(config).rules if rule.lost is not None]
    return [tensor.name for tensor in tensors if any(pattern.search(tensor.name) for pattern in patterns)]


def flat_config(config: Config) -> dict[str, Any]:
    """A copy of a config, with the text part lifted out of `text_config` if it is wrapped."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return dict(config)
    own = {key: value for key, value in config.items() if key not in ("text_config", "vision_config", "architectures")}
    return {**own, **text, "model_type": config["model_type"]}


def mlx_config(config: Config, tensors: list[LazyTensor]) -> dict[str, Any]:
    """The config.json for `to_mlx` of these HF-layout tensors (ModelError when MLX cannot run what it says)."""
    layout, flat = layout_of(config), flat_config(config)
    flat["model_type"] = layout.mlx_type or flat["model_type"]
    flat["tie_word_embeddings"] = ties_head(flat, tensors, default=True if ALWAYS_TIED in layout.rules else None)
    kinds = flat.get("layer_types") or []
    if "linear_attention" in kinds:
        flat["full_attention_interval"] = _interval(kinds)
    return flat


def _interval(kinds: list[str]) -> int:
    """N if every Nth layer has full attention, the only pattern that mlx-lm knows."""
    interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != (index % interval == 0) for index, kind in enumerate(kinds, 1)):
        raise ModelError(
            "config.json: layer_types does not have full_attention on every Nth layer and linear_attention "
            "on the rest, the only pattern that MLX can run"
        )
    return interval


def hf_config(config: Config, tensors: list[LazyTensor]) -> dict[str, Any]:
    """The config.json for `to_hf` of these MLX-layout tensors."""
    layout, flat = layout_of(config), flat_config(config)
    flat["model_type"] = layout.hf_type or flat["model_type"]
    if "tie_word_embeddings" not in flat:
        flat["tie_word_embeddings"] = not any(tensor.name.endswith("lm_head.weight") for tensor in tensors)
    return flat
