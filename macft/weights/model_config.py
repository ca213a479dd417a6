"""Read a model's config.json and normalize it so that mlx-lm and transformers read it alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.errors import ModelError

Config = Mapping[str, Any]  # what a config.json holds

# Keys that transformers v5 renamed (new, old); each library reads only one of the two.
_RENAMED = (("dtype", "torch_dtype"), ("num_local_experts", "num_experts"))
# What transformers assumes when a config names no rope base; mlx-lm assumes other numbers.
_DEFAULT_THETA = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "qwen3_moe"), 10_000.0),
    "mixtral": 1_000_000.0,
    "smollm3": 2_000_000.0,
    "gemma3_text": 1_000_000.0,
}
_LOCAL_THETA = 10_000.0
# What transformers assumes where a config says nothing: rms_norm_eps, max_position_embeddings, tie_word_embeddings.
ASSUMED: dict[str, tuple[float, int, bool]] = {
    "llama": (1e-06, 2048, False),
    "mistral": (1e-06, 131_072, False),
    "mixtral": (1e-05, 131_072, False),
    "qwen2": (1e-06, 32_768, False),
    "qwen2_moe": (1e-06, 32_768, False),
    "qwen3": (1e-06, 32_768, False),
    "qwen3_moe": (1e-06, 32_768, False),
    "qwen3_next": (1e-06, 32_768, False),
    "qwen3_5_text": (1e-06, 32_768, False),
    "gemma": (1e-06, 8192, True),
    "gemma2": (1e-06, 8192, True),
    "gemma3_text": (1e-06, 131_072, True),
    "phi3": (1e-05, 4096, False),
    "smollm3": (1e-06, 32_768, True),
    "glm4": (1.5625e-07, 131_072, False),
    "gpt_oss": (1e-05, 131_072, False),
    "olmo2": (1e-05, 2048, False),
    "olmo3": (1e-05, 2048, False),
    "olmoe": (1e-05, 4096, False),
    "granite": (1e-06, 2048, False),
    "granitemoe": (1e-06, 2048, False),
    "seed_oss": (1e-06, 524_288, False),
    "helium": (1e-08, 4096, False),
    "hunyuan_v1_dense": (1e-05, 2048, False),
    "ernie4_5": (1e-05, 131_072, True),
}
# and where mlx-lm would assume something else, or refuse
_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen3_next": {"norm_topk_prob": True},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "seed_oss": {"attention_bias": True},
}
# Model types whose sliding window mlx-lm ignores: always on, or on with "use_sliding_window".
_WINDOW_ALWAYS = frozenset({"mistral", "mixtral", "gemma2", "phi3", "starcoder2"})
_WINDOW_BY_FLAG = frozenset({"qwen2", "qwen3", "qwen2_moe", "qwen3_moe"})


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder`/config.json; ModelError when it is missing, is not JSON or names no model_type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder needs config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} line {error.lineno}: not JSON: {error.msg}; download the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}, expected a JSON object")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f'{path}: "model_type" is {config.get("model_type")!r}, expected a name such as "llama"')
    return config


def embedding_rows(config: dict[str, Any]) -> int | None:
    """How many rows the embedding has, one for each token id from 0; None if the config does not say."""
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def check_text_model(config: dict[str, Any]) -> None:
    """Raise ModelError for a model that wraps a text model: the engines name the parts of such a model differently."""
    wrapped = next((key for key in ("text_config", "vision_config", "audio_config") if key in config), None)
    if wrapped is not None:
        raise ModelError(
            f"config.json: model_type {config['model_type']} has a {wrapped}; only plain text models can be "
            "trained: take the text-only variant of this model"
        )


def normalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy that holds both spellings of every key on which mlx-lm and transformers v5 differ, and what v5 assumes.

    Raises ModelError where a config holds both spellings already and they disagree.
    """
    normalized = dict(config)
    for new, old in _RENAMED:
        _mirror(normalized, new, old)
    _rope(normalized)
    for key, value in _assumed(normalized).items():
        normalized.setdefault(key, value)
    if normalized.get("model_type") == "gemma3_text" and normalized.get("layer_types"):
        pattern = _window_pattern(normalized)
        if pattern is not None:
            normalized["sliding_window_pattern"] = pattern
    return normalized


def ties_by_default(config: Config) -> bool:
    """Whether transformers ties the head of this model type where its config does not say."""
    return ASSUMED.get(str(config.get("model_type")), (0, 0, False))[2]


def check_window(config: dict[str, Any], cutoff_len: int) -> None:
    """Raise ModelError for what mlx-lm would silently compute wrongly.

    That is: sequences longer than a sliding window it ignores, an order of layers or a rope it does not know.
    """
    model_type, window = config.get("model_type"), config.get("sliding_window")
    is_on = model_type in _WINDOW_ALWAYS or (model_type in _WINDOW_BY_FLAG and bool(config.get("use_sliding_window")))
    if is_on and isinstance(window, int) and cutoff_len > window:
        raise ModelError(
            f"cutoff_len is {cutoff_len}, but {model_type} attends over {window} tokens and the MLX backend "
            f"would ignore that window; set cutoff_len to {window} or less, or use --backend torch"
        )
    if model_type == "gemma3_text" and config.get("layer_types") and _window_pattern(config) is None:
        raise ModelError(
            "config.json: layer_types does not have full_attention on every Nth layer, the only pattern that the MLX "
            "backend can run for gemma3_text; use --backend torch"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if model_type == "phi3" and rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        raise ModelError(
            "config.json: the rope type is longrope, of which the MLX backend knows only the long factors; "
            "use --backend torch"
        )


def _assumed(config: Config) -> dict[str, Any]:
    """All but the tie of the head, which the files show."""
    model_type = str(config.get("model_type"))
    if model_type not in ASSUMED:
        return {}
    eps, positions, _ = ASSUMED[model_type]
    return {"rms_norm_eps": eps, "max_position_embeddings": positions, **_OTHER_DEFAULTS.get(model_type, {})}


def _mirror(config: dict[str, Any], new: str, old: str) -> None:
    first, second = config.get(new), config.get(old)
    if first is not None and second is not None and first != second:
        raise ModelError(f"config.json: {new} is {first!r} but {old} is {second!r}; remove the wrong one")
    value = first if first is not None else second
    if value is not None:
        config[new] = config[old] = value


def _rope(config: dict[str, Any]) -> None:
    parameters = config.get("rope_parameters")
    if parameters is None and (parameters := _parameters_from_old_keys(config)) is None:
        return
    if not isinstance(parameters, dict):
        raise ModelError(f"config.json: rope_parameters is {parameters!r}, an object was expected")
    if "full_attention" in parameters:
        config["rope_parameters"] = parameters
        whole = parameters["full_attention"]
        local = parameters.get("sliding_attention") or {}
        _set(config, "rope_local_base_freq", local.get("rope_theta", _LOCAL_THETA))
    elif any(isinstance(value, dict) for value in parameters.values()):
        return  # per-layer kinds of a model type that has no old spelling
    else:
        theta = parameters.get("rope_theta", config.get("rope_theta", _default_theta(config)))
        whole = {**parameters, "rope_theta": theta} if theta is not None else parameters
        config["rope_parameters"] = whole
    for key in ("rope_theta", "partial_rotary_factor"):
        if whole.get(key) is not None:
            _set(config, key, whole[key])
    rope_type = whole.get("rope_type", whole.get("type", "default"))
    if rope_type != "default":
        config["rope_scaling"] = {**whole, "rope_type": rope_type, "type": rope_type}


def _parameters_from_old_keys(config: dict[str, Any]) -> dict[str, Any] | None:
    theta = config.get("rope_theta", _default_theta(config))
    if theta is None:
        return None
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json: rope_scaling is {scaling!r}, an object was expected")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    whole = {**scaling, "rope_theta": theta, "rope_type": rope_type}
    if config.get("partial_rotary_factor") is not None:
        whole["partial_rotary_factor"] = config["partial_rotary_factor"]
    if "rope_local_base_freq" not in config and config.get("model_type") != "gemma3_text":
        return whole
    local = {"rope_theta": config.get("rope_local_base_freq", _LOCAL_THETA), "rope_type": "default"}
    return {"full_attention": whole, "sliding_attention": local}


def _default_theta(config: dict[str, Any]) -> float | None:
    return _DEFAULT_THETA.get(str(config.get("model_type")))


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    if config.get(key, value) not in (value, None):
        raise ModelError(f"config.json: {key} is {config[key]!r} but rope_parameters says {value!r}; remove one")
    config[key] = value


def _window_pattern(config: dict[str, Any]) -> int | None:
    """N if every Nth layer of `layer_types` is global, the pattern that mlx-lm knows; None if there is no such N."""
    layer_types = config["layer_types"]
    if "full_attention" not in layer_types:
        return None
    pattern: int = layer_types.index("full_attention") + 1
    kinds = ("full_attention", *["sliding_attention"] * (pattern - 1))
    expected = [kinds[(index + 1) % pattern] for index in range(len(layer_types))]
    return pattern if layer_types == expected else None
