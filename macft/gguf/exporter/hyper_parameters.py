"""Read the sizes of a model from config.json, and write the number fields of each GGUF architecture."""

from __future__ import annotations

import numpy as np

from macft.gguf import dimensions
from macft.gguf.dimensions import Sizes
from macft.gguf.exporter import linear_attention, rope
from macft.gguf.format import Field
from macft.weights.model_config import Config

_NEEDED = ("layers", "hidden", "ffn", "heads", "context")
_QWEN3_5_SECTIONS = (11, 11, 10)
_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh", "gelu_new")


def read_sizes(config: Config, rotated: float = 1.0) -> tuple[dict[str, int], list[str]]:
    """(the sizes by the words that the tensor rules use, what is wrong with them); `vocab` is not among them.

    `rotated` is the part of each head with rotary positions where the config names none.
    """
    sizes: dict[str, int] = {"one": 1}
    problems = []
    for word, keys in dimensions.KEYS.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes[word] = value
        elif word == "ffn" and config.get("moe_intermediate_size"):
            continue  # all layers have experts
        elif word in _NEEDED or value not in (None, 0):  # 0 experts: none
            problems.append(f"{keys[0]} is {value!r}, a positive whole number was expected")
    if not isinstance(config.get("rms_norm_eps"), float):
        problems.append(f"rms_norm_eps is {config.get('rms_norm_eps')!r}, a number was expected")
    if problems:
        return sizes, problems
    sizes.setdefault("expert_ffn", sizes.get("ffn", 0))
    sizes.setdefault("kv_heads", sizes["heads"])
    sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    if sizes["heads"] % sizes["kv_heads"] or sizes["head_dim"] % 2:
        problems.append(f"{sizes['heads']} heads of {sizes['head_dim']} do not go with {sizes['kv_heads']} key heads")
    sizes = dimensions.with_products(sizes)
    part = rope.settings(config).get("partial_rotary_factor", rotated)
    sizes["rotated"] = int(part * sizes["head_dim"]) if isinstance(part, int | float) else 0
    return sizes, problems


def common(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of every architecture, in the order of llama.cpp's converter."""
    fields: dict[str, Field] = {
        **dimensions.as_fields(sizes, "layers", "context", "hidden", "ffn", "heads", "kv_heads"),
        **rope.fields(config),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }
    if "experts" in sizes:
        fields |= dimensions.as_fields(sizes, "experts", "experts_used")
    if config.get("head_dim") is not None:
        fields |= _head_sizes(sizes)
    return fields


def _head_sizes(sizes: Sizes) -> dict[str, Field]:
    return {**dimensions.as_fields(sizes, "head_dim"), "attention.value_length": sizes["head_dim"]}


def llama(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of llama, mistral, mixtral and smollm3, which state the vocabulary size and the rotated part: all."""
    return {**common(config, sizes), "vocab_size": sizes["vocab"], "rope.dimension_count": sizes["head_dim"]}


def mixture(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of qwen's mixtures of experts, whose experts have their own width."""
    return {**common(config, sizes), **dimensions.as_fields(sizes, "expert_ffn", "shared_ffn")}


def gemma2(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of Gemma 2: two soft caps, and a window in every other layer."""
    return {
        **common(config, sizes),
        **_head_sizes(sizes),
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        **_window(config, sizes, dimensions.GEMMA2_PERIOD),
    }


def gemma3(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of Gemma 3: two rope bases, and a window in all but every sixth layer."""
    fields = {**common(config, sizes), **_head_sizes(sizes)}
    if config.get("final_logit_softcapping"):
        fields["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return {**fields, **_window(config, sizes, dimensions.GEMMA3_PERIOD)}


def phi3(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of Phi-3; the window is always written, as 0 tells the other Phi-3s from Phi-4."""
    factors, _ = rope.longrope(config, sizes["rotated"])
    return {
        **common(config, sizes),
        "rope.scaling.original_context_length": rope.original_context(config),
        "rope.dimension_count": sizes["rotated"],
        "attention.sliding_window": int(config.get("sliding_window") or 0),
        **factors,
    }


def glm4(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of GLM-4, whose positions cover a part of each head."""
    return {**common(config, sizes), "rope.dimension_count": sizes["rotated"]}


def gpt_oss(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of gpt-oss: experts, and a window in every other layer."""
    return {
        **common(config, sizes),
        **_window(config, sizes, dimensions.GEMMA2_PERIOD),
        dimensions.FIELDS["expert_ffn"]: sizes["ffn"],
    }


def hybrid(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of Qwen3-Next: linear attention in all but every Nth layer, positions over a part of each head."""
    own = mixture(config, sizes) if "experts" in sizes else common(config, sizes)
    state = {
        "conv_kernel": sizes["kernel"],
        "state_size": sizes["key_dim"],
        "group_count": sizes["key_heads"],
        "time_step_rank": sizes["value_heads"],
        "inner_size": sizes["value_channels"],
    }
    return {
        **own,
        **{f"ssm.{key}": value for key, value in state.items()},
        "full_attention_interval": _period(config, sizes["layers"], dimensions.HYBRID_PERIOD) or sizes["layers"] + 1,
        "rope.dimension_count": sizes["rotated"],
    }


def hybrid_3_5(config: Config, sizes: Sizes) -> dict[str, Field]:
    """The fields of Qwen3.5, whose rotary positions have sections, the same for text; llama.cpp expects four."""
    sections = list(rope.settings(config).get("mrope_section") or _QWEN3_5_SECTIONS)
    padded = np.asarray([*sections, 0, 0, 0, 0][:4], np.int32)
    return {**hybrid(config, sizes), "rope.dimension_sections": padded}


def _window(config: Config, sizes: Sizes, default_period: int) -> dict[str, Field]:
    """The window and, where it is not llama.cpp's default, the distance of the layers without one.

    llama.cpp's converter leaves the distance out, so that such a model is read wrongly.
    """
    period = _period(config, sizes["layers"], default_period)
    if period == 1:
        return {}
    fields: dict[str, Field] = {"attention.sliding_window": int(config["sliding_window"])}
    if period != default_period:
        fields["attention.sliding_window_pattern"] = period or 0
    return fields


def _period(config: Config, layers: int, default: int) -> int | None:
    """N when every Nth layer has full attention, trying the default first; 0 when none has; None for another order."""
    kinds: list[str] | None = config.get("layer_types")
    if not kinds:
        return int(config.get("sliding_window_pattern") or config.get("full_attention_interval") or default)
    has_window = [kind != "full_attention" for kind in kinds]
    periods: list[int] = [default, *range(1, layers + 1)]
    for period in periods:
        if has_window == [bool((layer + 1) % period) for layer in range(layers)]:
            return period
    return 0 if False not in has_window else None


# --- problems: where a config contradicts what llama.cpp assumes of an architecture


def _activation(config: Config, expected: tuple[str, ...]) -> list[str]:
    found = config.get("hidden_activation") or config.get("hidden_act") or expected[0]
    return [] if found in expected else [f"hidden_act is {found!r}, llama.cpp computes {expected[0]} for this model"]


def plain_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of llama and its relatives: another activation."""
    del sizes
    return _activation(config, _SILU)


def square_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems where llama.cpp assumes that all heads together are as wide as the model."""
    problems = plain_problems(config, sizes)
    if sizes["q"] != sizes["hidden"]:
        problems.append(f"{sizes['heads']} heads of {sizes['head_dim']} are not hidden_size {sizes['hidden']}")
    return problems


def smollm3_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of SmolLM3: another order of the layers without rotary positions."""
    expected = dimensions.smollm3_rope_layers(sizes["layers"])
    found = config.get("no_rope_layers", expected)
    problems = plain_problems(config, sizes)
    if found and list(found) != expected:
        problems.append("no_rope_layers is not every fourth layer, which llama.cpp assumes")
    return problems


def sparse_problems(config: Config, sizes: Sizes, *, normalized: bool) -> list[str]:
    """Problems of mixtures: layers without experts, weights that are or are not scaled to sum to 1."""
    problems = plain_problems(config, sizes)
    problems += [f"{word} is missing from config.json" for word in ("experts", "experts_used") if word not in sizes]
    if (config.get("decoder_sparse_step") or 1) != 1 or config.get("mlp_only_layers"):
        problems.append(
            "some layers have no experts (mlp_only_layers, decoder_sparse_step); llama.cpp expects them in all"
        )
    found = config.get("norm_topk_prob")
    if found is not None and bool(found) != normalized:
        problems.append(f"norm_topk_prob is {found}, llama.cpp assumes {normalized} for this model")
    return problems


def gemma_problems(config: Config, sizes: Sizes, *, default_period: int, largest: int) -> list[str]:
    """Problems of the gemmas: the scale of attention, the order of layers with a window."""
    problems = _activation(config, _GELU)
    expected = dimensions.gemma_query_scalar(sizes, largest)
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != expected:
        problems.append(f"query_pre_attn_scalar is {scalar}, llama.cpp assumes {expected}")
    if config.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention is true; llama.cpp knows it for embedding models only")
    return problems + _window_problems(config, sizes, default_period)


def _window_problems(config: Config, sizes: Sizes, default_period: int) -> list[str]:
    period = _period(config, sizes["layers"], default_period)
    if period is None:
        return ["layer_types is not every Nth layer full_attention, all that llama.cpp reads"]
    if period != 1 and not isinstance(config.get("sliding_window"), int):
        return [f"sliding_window is {config.get('sliding_window')!r}, a whole number was expected"]
    return []


def gemma2_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of Gemma 2, which always has its soft caps, and a window somewhere."""
    problems = gemma_problems(config, sizes, default_period=dimensions.GEMMA2_PERIOD, largest=dimensions.GEMMA2_27B)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not isinstance(config.get(key), int | float):
            problems.append(f"{key} is {config.get(key)!r}; llama.cpp always caps, a number was expected")
    if _period(config, sizes["layers"], dimensions.GEMMA2_PERIOD) == 1:
        problems.append("no layer has a window (layer_types); llama.cpp gives gemma2 one")
    return problems


def gemma3_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of Gemma 3, which has no cap on attention."""
    problems = gemma_problems(config, sizes, default_period=dimensions.GEMMA3_PERIOD, largest=dimensions.GEMMA3_27B)
    if config.get("attn_logit_softcapping"):
        problems.append(f"attn_logit_softcapping is {config['attn_logit_softcapping']}; llama.cpp has none in gemma3")
    return problems


def qwen2_moe_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of Qwen2 mixtures: heads as wide as the model, and weights that are not scaled to sum to 1."""
    problems = sparse_problems(config, sizes, normalized=False) + square_problems(config, sizes)
    if "shared_ffn" not in sizes:
        problems.append("shared_expert_intermediate_size is missing from config.json")
    return list(dict.fromkeys(problems))


def gpt_oss_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of gpt-oss: missing sizes of experts, the order of layers with a window."""
    problems = [f"{word} is missing from config.json" for word in ("experts", "experts_used") if word not in sizes]
    if _period(config, sizes["layers"], dimensions.GEMMA2_PERIOD) == 1:
        problems.append("no layer has a window (layer_types); llama.cpp gives gpt-oss one")
    return problems + _window_problems(config, sizes, dimensions.GEMMA2_PERIOD)


def hybrid_problems(config: Config, sizes: Sizes) -> list[str]:
    """Problems of Qwen3-Next and Qwen3.5: the order of layers with full attention, layers without experts."""
    problems = sparse_problems(config, sizes, normalized=True) if "experts" in sizes else plain_problems(config, sizes)
    if _period(config, sizes["layers"], dimensions.HYBRID_PERIOD) is None:
        problems.append("layer_types is not every Nth layer full_attention, all that llama.cpp reads")
    return problems + linear_attention.problems(config)
