"""Translate the rope settings of a config into fields and tensors that make llama.cpp rotate the same way."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any

import numpy as np

from macft.errors import ModelError
from macft.gguf.format import Field
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, LazyTensor, from_array

# `dynamic` begins to differ from no scaling beyond max_position_embeddings, which becomes the file's context length
PLAIN = frozenset({"default", "dynamic", "linear", "yarn"})
WITH_LLAMA3 = PLAIN | {"llama3"}
_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor",
)  # fmt: skip
LONGROPE = frozenset({"default", "longrope", "su"})


def settings(config: Config) -> dict[str, Any]:
    """The rope settings of the layers with full attention, of a config with both spellings (`normalize_config`)."""
    found = config.get("rope_parameters") or {}
    whole: dict[str, Any] = dict(found.get("full_attention") or found)
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if config.get(key) is not None:
            whole.setdefault(key, config[key])
    return whole


def rope_type(config: Config) -> str:
    """The type of scaling; "default" where the config names none."""
    rope = settings(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def problems(config: Config, allowed: frozenset[str], *, is_partly_rotated: bool) -> list[str]:
    """What llama.cpp would compute differently from the model: a type it does not read, a part of each head."""
    rope, kind = settings(config), rope_type(config)
    found = []
    if kind not in allowed:
        found.append(f"rope_type is {kind!r}; llama.cpp reads {', '.join(sorted(allowed))} for this model")
    needed = ("rope_theta", "factor") if kind in ("linear", "yarn", "llama3") else ("rope_theta",)
    for key in dict.fromkeys((*needed, *_NUMBERS)):
        value = rope.get(key)
        if (value is not None or key in needed) and not (isinstance(value, int | float) and value > 0):
            found.append(f"{key} of the rope settings is {value!r}, a positive number was expected")
    # gpt-oss asks for it too, and all its GGUF files have the rounded bounds
    if kind == "yarn" and rope.get("truncate") is False and config["model_type"] != "gpt_oss":
        found.append("truncate is false; llama.cpp rounds the bounds between yarn's slow and fast rotations")
    part = rope.get("partial_rotary_factor")
    if part not in (None, 1.0) and not is_partly_rotated:
        found.append(f"partial_rotary_factor is {part}, which llama.cpp does not read for this model")
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        found.append(f"rope_type of the sliding layers is {local['rope_type']!r}, llama.cpp does not scale them")
    return found


def fields(config: Config) -> dict[str, Field]:
    """Fields without the architecture's prefix: scaling, base, and the base of layers with a window."""
    rope, kind = settings(config), rope_type(config)
    result: dict[str, Field] = {}
    if kind == "linear":
        result["rope.scaling.type"] = "linear"
        result["rope.scaling.factor"] = float(rope["factor"])
    elif kind == "yarn":
        result |= _yarn(config, rope)
    result["rope.freq_base"] = float(rope["rope_theta"])
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_theta") is not None:
        result["rope.freq_base_swa"] = float(local["rope_theta"])
    return result


def _yarn(config: Config, rope: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of yarn; llama.cpp itself scales by 1 + ln(factor) / 10, so attn_factor is relative to that."""
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    result: dict[str, Field] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }
    own = _mscale(factor, 1.0)
    expected = rope.get("attention_factor")
    if expected is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        expected = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    if expected is not None and expected != own:
        result["rope.scaling.attn_factor"] = float(expected) / own
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            result[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return result


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0


def llama3_tensors(config: Config, head_dim: int) -> list[LazyTensor]:
    """Llama 3's scaling as a table of divisors [head_dim / 2]; nothing for other types.

    Slow rotations are divided by `factor`, fast ones kept, those between blended (Llama 3.1 model card).
    """
    rope = settings(config)
    if rope_type(config) != "llama3":
        return []
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(rope["rope_theta"]), steps, dtype=np.float32)
    factor, low, high = (rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0))
    context = rope.get("original_max_position_embeddings", 8192)
    waves = np.float32(2 * pi) / frequencies
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    blended = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    divisors = np.where(waves < context / high, 1.0, np.where(waves > context / low, factor, blended))
    return [_constant("rope_freqs.weight", divisors)]


def longrope(config: Config, rotated: int) -> tuple[dict[str, Field], list[LazyTensor]]:
    """Phi-3's two tables of divisors [rotated / 2] and the factor of attention; nothing without tables."""
    rope = settings(config)
    if rope_type(config) == "default":
        return {}, []
    tables = {length: rope.get(f"{length}_factor") for length in ("long", "short")}
    for length, table in tables.items():
        if not isinstance(table, list) or len(table) != rotated // 2:
            count = len(table) if isinstance(table, list) else "no"
            raise ModelError(f"config.json: {length}_factor has {count} numbers, {rotated // 2} were expected")
    original = original_context(config)
    scale = config["max_position_embeddings"] / original
    factor = rope.get("attention_factor")
    if factor is None:
        factor = sqrt(1 + log(scale) / log(original)) if scale > 1 else 1.0
    tensors = [_constant(f"rope_factors_{length}.weight", np.asarray(table)) for length, table in tables.items()]
    return {"rope.scaling.attn_factor": float(factor)}, tensors


def original_context(config: Config) -> int:
    """How many positions Phi-3 was first trained on; 4096 where the config does not say."""
    return int(settings(config).get("original_max_position_embeddings") or 4096)


def _constant(name: str, numbers: Array) -> LazyTensor:
    """A float32 tensor that no file of the model holds."""
    return from_array(name, np.asarray(numbers, np.float32))
