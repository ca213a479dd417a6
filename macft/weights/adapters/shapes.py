"""Group an adapter's tensors by module, check them, and give all modules the same rank and scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from macft.weights.tensors.lazy import Array

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
COPY = "base_layer.weight"  # PEFT stores the base's own matrix with an adapter on an embedding or head
_SUFFIXES = (*LINEAR, *EMBEDDING, MAGNITUDE, COPY)

# module, such as model.layers.0.self_attn.q_proj -> suffix -> array
Modules = dict[str, dict[str, Array]]

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """The one rank and alpha of an adapter: W + alpha / rank * B A, or alpha / sqrt(rank) for rsLoRA."""

    rank: int
    alpha: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return scale_of(self.rank, self.alpha, self.use_rslora)


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def split_modules(state: Mapping[str, Array], use_dora: bool, problems: list[str]) -> Modules:
    """The tensors by module, in PEFT's names; unknown ones and incomplete modules are added to `problems`."""
    found = by_module(state, problems)
    for module, parts in found.items():
        if problem := module_problem(parts, use_dora):
            problems.append(f"{module}: {problem}")
    return found


def by_module(state: Mapping[str, Array], problems: list[str]) -> Modules:
    """The tensors by module, complete or not, in PEFT's names; unknown ones are added to `problems`."""
    found: Modules = {}
    for name, array in state.items():
        suffix = suffix_of(name)
        if suffix is None or not name.startswith(PREFIX):
            problems.append(f"{name} is not a tensor of a LoRA adapter")
            continue
        found.setdefault(name[len(PREFIX) : -len(suffix) - 1], {})[suffix] = array
    return found


def suffix_of(name: str) -> str | None:
    """The part of a tensor's name after its module, or None for one that is not of LoRA."""
    return next((suffix for suffix in _SUFFIXES if name.endswith(f".{suffix}")), None)


def module_problem(parts: Mapping[str, Array], use_dora: bool) -> str | None:
    """What a module lacks or should not have, or None."""
    names = pair_of(parts)
    expected = {*names, MAGNITUDE} if use_dora else {*names}
    if set(parts) - {COPY} != expected:
        return f"has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}"
    if any(parts[name].ndim != 2 for name in names) or parts[names[0]].shape[0] != parts[names[1]].shape[1]:
        first, second = (list(parts[name].shape) for name in names)
        return f"{names[0]} {first} and {names[1]} {second} have no rank in common"
    return None


def join_modules(modules: Modules) -> dict[str, Array]:
    """The reverse of `split_modules`."""
    return {f"{PREFIX}{module}.{suffix}": array for module, parts in modules.items() for suffix, array in parts.items()}


def pair_of(parts: Mapping[str, Array]) -> tuple[str, str]:
    """The suffixes of A and B that a module with these parts has."""
    return EMBEDDING if EMBEDDING[0] in parts or EMBEDDING[1] in parts else LINEAR


def uniform(modules: Modules, shapes: Mapping[str, Shape], default: Shape) -> tuple[Modules, Shape]:
    """Give all modules one rank and scale: A and B are padded with zeros, and B is multiplied by the ratio of scales.

    If all have the shape `default`, nothing changes.
    """
    if all(shape.rank == default.rank and shape.scale == default.scale for shape in shapes.values()):
        return modules, default
    rank = max(shape.rank for shape in shapes.values())
    # the largest, so that no ratio makes a number larger
    scale = max({shape.scale for shape in shapes.values()}, key=abs)
    changed: Modules = {}
    for module, parts in modules.items():
        first, second = pair_of(parts)
        extra = rank - shapes[module].rank
        ratio = np.float32(shapes[module].scale / scale) if scale else np.float32(1)
        changed[module] = {
            **parts,
            first: np.pad(parts[first], ((0, extra), (0, 0))),
            second: np.pad(parts[second] * ratio, ((0, 0), (0, extra))),
        }
    return changed, Shape(rank, scale * rank, use_rslora=False)


def pattern_shapes(raw: Mapping[str, Any], default: Shape) -> Callable[[str], Shape]:
    """The shape that PEFT gives a module by rank_pattern and alpha_pattern, whose keys are ends of its name as regex.

    Source: PEFT's get_pattern_key; the first key that matches counts. Raises re.error for a key that is not a regex.
    """
    ranks, alphas = (
        [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (raw.get(name) or {}).items()]
        for name in ("rank_pattern", "alpha_pattern")
    )

    def shape_of(module: str) -> Shape:
        rank = next((value for key, value in ranks if key.match(module)), default.rank)
        alpha = next((value for key, value in alphas if key.match(module)), default.alpha)
        return Shape(rank, float(alpha), default.use_rslora)

    return shape_of


def pattern_problems(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with rank_pattern, alpha_pattern and layers_to_transform themselves."""
    problems = []
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = raw.get(name) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{name} is {patterns!r}, expected an object of module names")
            continue
        for key, value in patterns.items():
            if isinstance(value, bool) or not isinstance(value, kinds) or (kinds is int and value < 1):
                problems.append(f"{name} of {key} is {value!r}, expected a number above 0")
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"{name}: {key!r} is not a regular expression ({error})")
    layers = raw.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int and number >= 0 for number in numbers):
        problems.append(f"layers_to_transform is {layers!r}, expected layer numbers")
    return problems


def layer_problems(raw: Mapping[str, Any], modules: Modules) -> list[str]:
    """Layers that layers_to_transform names and the tensors lack, or the reverse."""
    layers = raw.get("layers_to_transform")
    # PEFT does not look at it when target_modules is a regular expression
    if layers is None or layers == [] or isinstance(raw.get("target_modules"), str):
        return []
    expected = set(layers if isinstance(layers, list) else [layers])
    found = layers_of(modules)
    if found == expected:
        return []
    return [f"layers_to_transform is {sorted(expected)}, but the tensors are of the layers {sorted(found)}"]


def layers_of(modules: Modules) -> set[int]:
    """The numbers of the layers that the modules are in."""
    return {int(match[1]) for module in modules if (match := _LAYER.match(module))}
