"""Prepare a model without weights from a config.json with some entries replaced."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.errors import ConfigError, join_problems
from macft.files import cache_dir, write_bytes, write_json
from macft.models.locate import resolve_model
from macft.weights.folder import ModelFolder
from macft.weights.model_config import check_text_model, normalize_config, read_config

# Whole numbers above 0 that define the shape of every decoder.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
# Entries that may be set although the file leaves them to the default.
_KNOWN = (
    *_SIZES, *_OPTIONAL_SIZES, "tie_word_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "hidden_act",
    "rope_parameters", "rope_scaling", "attention_bias", "mlp_bias", "layer_types", "use_sliding_window", "dtype",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_only_shape(name: str) -> bool:
    """Whether a model's name is a folder with a config.json and no file of weights, nor an index of them."""
    path = Path(name).expanduser()
    return (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in _WEIGHTS)


def locate_shape(name: str, hub: str | None = None) -> ModelFolder:
    """The folder whose config.json gives a new model its shape: any folder, whatever its weights, or a model's."""
    path = Path(name).expanduser()
    return ModelFolder(name, path) if (path / "config.json").is_file() else resolve_model(name, hub)


def new_model(
    shape: ModelFolder, overrides: Mapping[str, Any], tokens: Mapping[str, int], vocabulary: int
) -> ModelFolder:
    """A folder in the cache with only the config.json of a model to be trained from scratch.

    `tokens` are the bos, eos and pad ids of a tokenizer that is not the model's own; `overrides` take precedence
    over them. Raises ConfigError naming everything that does not fit: entries that the config does not know,
    heads that do not divide the width, key-value heads that do not divide the heads, a `vocabulary` that is
    larger than the model's.
    """
    before = read_config(shape.path)
    check_text_model(before)
    config = {key: value for key, value in before.items() if key not in ("quantization", "quantization_config")}
    config |= {key: tokens[key] for key in _TOKENS if key in tokens}
    config |= overrides
    _update_dependents(config, overrides)
    problems = [*_unknown(before, overrides), *shape_problems(config)]
    size = config.get("vocab_size")
    if isinstance(size, int) and size < vocabulary:
        problems.append(f"vocab_size {size}: the tokenizer has {vocabulary} tokens; set it to that or more")
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(join_problems(f"{shape.name}: {len(problems)} problems in its shape", problems))
    config = normalize_config(config)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "scratch" / digest[:16]
    write_json(folder / "config.json", config)
    generation = shape.path / "generation_config.json"
    if generation.is_file() and not tokens:
        write_bytes(folder / generation.name, generation.read_bytes())
    return ModelFolder(shape.name, folder)


def shape_problems(config: Mapping[str, Any]) -> list[str]:
    """Why a config cannot be a model's: one line per problem."""
    wrong = {key: config.get(key) for key in _SIZES if not _is_size(config.get(key))}
    wrong |= {key: config[key] for key in _OPTIONAL_SIZES if config.get(key) is not None and not _is_size(config[key])}
    problems = [f"{key} {value!r}: expected a whole number above 0" for key, value in wrong.items()]
    width, heads, kv_heads = (
        None if key in wrong else config.get(key)
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head = None if "head_dim" in wrong else config.get("head_dim")
    if width and heads and head is None:
        if width % heads:
            problems.append(f"num_attention_heads {heads} does not divide hidden_size {width}")
        elif width // heads % 2:
            problems.append(
                f"hidden_size {width} gives {heads} heads of {width // heads}: expected an even width of a head"
            )
    if head is not None and head % 2:
        problems.append(f"head_dim {head}: expected an even number")
    if heads and kv_heads and heads % kv_heads:
        problems.append(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if isinstance(kinds, list) and "num_hidden_layers" not in wrong and len(kinds) != layers:
        problems.append(f"layer_types has {len(kinds)} entries for {layers} layers; give one per layer")
    spread = config.get("initializer_range", 0.02)
    if not isinstance(spread, (int, float)) or isinstance(spread, bool) or not 0 < spread < 10:
        problems.append(f"initializer_range {spread!r}: expected a number above 0")
    return problems


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unknown(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    known = {*config, *_KNOWN} - {"model_type", "architectures"}
    problems = []
    for key in overrides:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"model_overrides: {key} is not an entry of config.json that can be replaced{hint}")
    return problems


def _update_dependents(config: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Update what depends on the overrides: other spellings of an entry, and the kinds of layers of a deeper model."""
    rope = config.get("rope_parameters")
    if "rope_theta" in overrides and isinstance(rope, dict) and "rope_parameters" not in overrides:
        config["rope_parameters"] = {**rope, "rope_theta": overrides["rope_theta"]}
    if "dtype" in overrides and "torch_dtype" not in overrides:
        config.pop("torch_dtype", None)
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(kinds, list) or not kinds or "layer_types" in overrides or not isinstance(layers, int):
        return
    periods = (n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    config["layer_types"] = (kinds[: next(periods)] * layers)[:layers]
