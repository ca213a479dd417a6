"""Read and write adapter folders in mlx-lm's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from macft.errors import ModelError, raise_problems
from macft.files import write_json
from macft.weights.adapters import shapes
from macft.weights.adapters.experts import has_experts, is_expert
from macft.weights.adapters.peft import CONFIG_NAME, Adapter, AdapterConfig, metadata_of, read_json_config, read_tensors
from macft.weights.adapters.shapes import COPY, EMBEDDING, LINEAR, MAGNITUDE, Modules
from macft.weights.layouts.mlx import layout_of
from macft.weights.layouts.mlx_experts import EXPERTS_APART
from macft.weights.layouts.mlx_rules import Change, LayoutRule
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, from_array
from macft.weights.tensors.safetensors import write_state

MLX_WEIGHTS_NAME = "adapters.safetensors"
EMBED, HEAD = "embed_tokens", "lm_head"

_PARTS = ("lora_a", "lora_b", "m")
_NAMING = ("PREFIX", *EXPERTS_APART)  # the rules of a layout that affect names of adapted modules


def read_mlx_adapter(folder: Path, base_config: Config | None) -> Adapter:
    """Read an mlx-lm adapter as PEFT would hold it; ModelError names everything that cannot be used."""
    raw = read_json_config(folder)
    config = _mlx_config(folder, raw)
    state, base_hash = read_tensors(folder, MLX_WEIGHTS_NAME)
    problems: list[str] = []
    parts = _mlx_modules(state, config, problems)
    if not problems:
        parts = _hf_names(parts, base_config, problems)
    modules: Modules = {}
    if not problems:
        for name, found in parts.items():
            modules |= _peft_module(name, found, config, base_config, problems)
        shapes.split_modules(shapes.join_modules(modules), config.use_dora, problems)
        problems += _num_layers_problems(raw, modules, base_config)
    raise_problems(f"{folder / MLX_WEIGHTS_NAME}: this adapter cannot be used as it is", problems)
    return Adapter(folder, replace(config, target_modules=tuple(modules)), shapes.join_modules(modules), base_hash)


def _mlx_config(folder: Path, raw: Mapping[str, Any]) -> AdapterConfig:
    kind, shape = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind == "full":
        raise ModelError(
            f"{folder}: fine_tune_type is full: these are the weights of a whole model, not an adapter; write the "
            "model with mlx_lm.fuse"
        )
    problems = []
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type is {kind!r}, expected lora or dora")
    if not isinstance(shape, dict):
        problems.append(f"lora_parameters is {shape!r}, expected an object with rank, scale and dropout")
        shape = {"rank": 1, "scale": 1.0}
    rank, scale, dropout = shape.get("rank"), shape.get("scale"), shape.get("dropout", 0.0)
    if type(rank) is not int or rank < 1:
        problems.append(f"lora_parameters.rank is {rank!r}, expected a rank above 0")
    if not _is_number(scale):
        hint = "; alpha is not read by mlx-lm, scale is alpha / rank" if "alpha" in shape else ""
        problems.append(f"lora_parameters.scale is {scale!r}, expected a number{hint}")
    if not _is_number(dropout):
        problems.append(f"lora_parameters.dropout is {dropout!r}, expected a number")
    raise_problems(f"{folder / CONFIG_NAME}: this adapter cannot be used as it is", problems)
    assert isinstance(rank, int) and isinstance(scale, int | float)
    base = raw.get("model")
    return AdapterConfig(
        base=base if isinstance(base, str) else "",
        rank=rank,
        alpha=float(scale) * rank,
        dropout=float(dropout),
        target_modules=(),
        use_dora=kind == "dora",
    )


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _mlx_modules(state: Mapping[str, Array], config: AdapterConfig, problems: list[str]) -> Modules:
    """The tensors by module, checked against each other and the rank."""
    modules: Modules = {}
    for name, array in state.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS or not module:
            problems.append(f"{name} is not a tensor of a LoRA adapter of mlx-lm (lora_a, lora_b, m)")
        else:
            modules.setdefault(module, {})[part] = array
    if not modules:
        problems.append("holds no LoRA tensors")
    expected = set(_PARTS) if config.use_dora else {"lora_a", "lora_b"}
    for module, parts in modules.items():
        if set(parts) != expected:
            problems.append(f"{module} has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
            continue
        a, b = parts["lora_a"], parts["lora_b"]
        # of experts [E, rank, in] and [E, out, rank], else [in, rank] and [rank, out]
        ranks = (a.shape[1], b.shape[2]) if a.ndim == b.ndim == 3 else (a.shape[-1], b.shape[0])
        if a.ndim not in (2, 3) or a.ndim != b.ndim or ranks != (config.rank, config.rank):
            problems.append(
                f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are not of rank {config.rank}, which "
                f"{CONFIG_NAME} says"
            )
    return modules


def _hf_names(modules: Modules, config: Config | None, problems: list[str]) -> Modules:
    """The modules named as in the HF layout, one for each expert with A [rank, in] and B [out, rank]."""
    if config is None:
        unclear = [name for name, parts in modules.items() if parts["lora_a"].ndim == 3 or name.startswith("language_")]
        problems += [f"{name}: its name in the HF layout depends on the model; name the base" for name in unclear]
        return modules
    if any(parts["lora_a"].ndim == 3 for parts in modules.values()) and not has_experts(config):
        problems.append(
            f"adapters on the experts of {config['model_type']} cannot be converted; merge with mlx_lm.fuse"
        )
        return modules
    return _converted(modules, config, [rule.to_hf for rule in reversed(_naming_rules(config))])


def _naming_rules(config: Config) -> list[LayoutRule]:
    return [rule for rule in layout_of(config).rules if rule.name in _NAMING]


def _converted(modules: Modules, config: Config, changes: list[Change]) -> Modules:
    """The modules after these changes of layout, each applied to the tensors of one part at a time."""
    result: Modules = {}
    for part in _PARTS:
        tensors = [from_array(f"{name}.weight", parts[part]) for name, parts in modules.items() if part in parts]
        for change in changes:
            tensors = change(config, tensors)
        for tensor in tensors:
            result.setdefault(tensor.name.removesuffix(".weight"), {})[part] = tensor.read()
    return result


def _peft_module(
    name: str, parts: Mapping[str, Array], config: AdapterConfig, base: Config | None, problems: list[str]
) -> Modules:
    """One module of mlx-lm, under its HF name, as PEFT has it."""
    a, b = parts["lora_a"], parts["lora_b"]
    if is_expert(name):
        return {name: {LINEAR[0]: a, LINEAR[1]: b}}
    if name.rpartition(".")[2] != EMBED:
        pair = {LINEAR[0]: _turned(a), LINEAR[1]: _turned(b)}
        return {name: {**pair, MAGNITUDE: parts["m"]} if config.use_dora else pair}
    if config.use_dora:
        problems.append(
            f"{name}: DoRA on an embedding has a norm for each token in mlx-lm, for each column in PEFT; fuse it"
        )
        return {}
    tied = None if base is None else base.get("tie_word_embeddings")
    if tied is None:
        problems.append(
            f"{name}: whether it is the head as well depends on the base; name one whose config.json says it"
        )
        return {}
    embedding = {name: {EMBEDDING[0]: _turned(a), EMBEDDING[1]: _turned(b)}}
    # in mlx-lm the adapter of a tied embedding acts in the head too: x b^T a^T
    return {**embedding, HEAD: {LINEAR[0]: b, LINEAR[1]: a}} if tied else embedding


def _turned(array: Array) -> Array:
    return np.ascontiguousarray(array.T)


def _num_layers_problems(raw: Mapping[str, Any], modules: Modules, base: Config | None) -> list[str]:
    """Layers that are not among the last `num_layers`, which mlx-lm would refuse, or that the base lacks."""
    total = base.get("num_hidden_layers") if base is not None else None
    if not isinstance(total, int):
        return []
    count, keys = raw.get("num_layers"), raw["lora_parameters"].get("keys") or []
    layers = shapes.layers_of(modules)
    if beyond := sorted(layer for layer in layers if layer >= total):
        return [f"has tensors for layer {beyond[-1]}, the base has {total} layers"]
    is_relative = not any(".layers." in str(key) for key in keys)
    if is_relative and isinstance(count, int) and 0 < count < total and layers and min(layers) < total - count:
        return [f"num_layers is {count}, the last of {total}, but there are tensors for layer {min(layers)}"]
    return []


def write_mlx_adapter(folder: Path, adapter: Adapter, base_config: Config | None = None) -> None:
    """Write adapters.safetensors and adapter_config.json as mlx-lm reads them into an existing folder.

    Raises ModelError naming everything that mlx-lm cannot represent. `base_config` is needed for embeddings, heads
    and experts.
    """
    problems = _own_problems(adapter, has_base=base_config is not None)
    modules = shapes.split_modules(adapter.state, adapter.config.use_dora, problems)
    if not problems:
        modules = _tied_once(modules, adapter, base_config, problems)
    parts: Modules = {}
    if not problems:
        parts = {name: _mlx_parts(name, found, adapter, problems) for name, found in modules.items()}
    if not problems:
        parts = _mlx_names(parts, base_config, problems)
    raise_problems(_cannot_represent(adapter), problems)
    config = adapter.config
    scale = shapes.scale_of(config.rank, config.alpha, config.use_rslora)
    content = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "lora_parameters": {
            "rank": config.rank,
            "scale": scale,
            # mlx-lm reads only scale, Ollama only alpha
            "alpha": scale * config.rank,
            "dropout": config.dropout,
            "keys": list(parts),
        },
        "model": config.base,
        "num_layers": -1,
    }
    state = {f"{name}.{part}": array for name, found in parts.items() for part, array in found.items()}
    write_state(folder / MLX_WEIGHTS_NAME, state, metadata=metadata_of("mlx", adapter.base_hash))
    write_json(folder / CONFIG_NAME, content)


def refuse_own_tensors(adapter: Adapter) -> None:
    """Raise ModelError for tensors of the model itself, which fit no base where the vocabulary grew."""
    raise_problems(_cannot_represent(adapter), _own_problems(adapter, has_base=True))


def _own_problems(adapter: Adapter, *, has_base: bool) -> list[str]:
    hint = "" if has_base else "; a copy of the base's is left out where the base is named"
    return [f"{name} is of the model itself, for which mlx-lm has no place{hint}" for name in adapter.own.names]


def _cannot_represent(adapter: Adapter) -> str:
    merge = f"merge it instead: macft export merged BASE --adapter {adapter.folder} --output NEW"
    return f"{adapter.folder}: mlx-lm cannot represent this adapter; {merge}"


def _tied_once(modules: Modules, adapter: Adapter, base: Config | None, problems: list[str]) -> Modules:
    """The modules without the head where it is the embedding, which in mlx-lm has one adapter for both uses."""
    embedding = next((name for name in modules if name.rpartition(".")[2] == EMBED), None)
    if embedding is None and HEAD not in modules:
        return modules
    tied = None if base is None else base.get("tie_word_embeddings")
    if tied is None:
        problems.append(f"{embedding or HEAD}: whether head and embedding are one depends on the base; name it")
        return modules
    if not tied:
        return modules
    both, head = modules.get(embedding or "", {}), modules.get(HEAD, {})
    if EMBEDDING[0] in both and LINEAR[0] in head and not adapter.config.use_dora:
        first, second = (both[name] for name in EMBEDDING)
        a, b = (head[name] for name in LINEAR)
        if np.array_equal(second.T, a) and np.array_equal(first.T, b):
            return {name: parts for name, parts in modules.items() if name != HEAD}
    problems.append(
        f"{embedding or HEAD}: the base ties its head to its embedding; in mlx-lm an adapter changes both alike, this "
        "one does not"
    )
    return modules


def _mlx_parts(name: str, parts: Mapping[str, Array], adapter: Adapter, problems: list[str]) -> dict[str, Array]:
    """One module of PEFT as mlx-lm has it; A and B of an expert stay as they are, to be stacked."""
    if COPY in parts:
        problems.append(f"{name}: holds a {COPY} of its own, for which mlx-lm has no place")
    if EMBEDDING[0] in parts:
        if adapter.config.use_dora:
            problems.append(
                f"{name}: DoRA on an embedding has a norm for each column in PEFT, for each token in mlx-lm"
            )
        return {"lora_a": _turned(parts[EMBEDDING[0]]), "lora_b": _turned(parts[EMBEDDING[1]])}
    if is_expert(name):
        if adapter.config.use_dora:
            problems.append(f"{name}: mlx-lm has no DoRA on experts")
        return {"lora_a": parts[LINEAR[0]], "lora_b": parts[LINEAR[1]]}
    pair = {"lora_a": _turned(parts[LINEAR[0]]), "lora_b": _turned(parts[LINEAR[1]])}
    return {**pair, "m": parts[MAGNITUDE]} if adapter.config.use_dora else pair


def _mlx_names(modules: Modules, config: Config | None, problems: list[str]) -> Modules:
    """The modules named as in the MLX layout, the experts of a layer stacked."""
    if config is None:
        problems += [
            f"{name}: how MLX stacks experts depends on the base; name it" for name in modules if is_expert(name)
        ]
        return modules
    if any(is_expert(name) for name in modules) and not has_experts(config):
        problems.append(f"adapters on the experts of {config['model_type']} cannot be converted")
        return modules
    return _converted(modules, config, [rule.to_mlx for rule in _naming_rules(config)])
