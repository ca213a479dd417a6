"""Split PEFT's adapters on all experts of a layer into one A and B per expert, and fuse them again.

transformers holds a layer's experts in two parameters, experts.gate_up_proj and experts.down_proj. PEFT's
target_parameters give each A [experts * rank, in] and B [out, rank * experts], under one name: the wrapper of
the second parameter holds the first as its base_layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from macft.weights.adapters.shapes import LINEAR, Modules
from macft.weights.layouts.mlx import LAYOUTS
from macft.weights.layouts.mlx_experts import expert_count
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array

_A, _B = LINEAR
_FUSED = re.compile(r"(.*\.mlp)\.experts(\.base_layer)?")
_SINGLE = re.compile(r"(.*)\.(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_ROUTER = re.compile(r"(.*)\.(mlp|block_sparse_moe)\.gate")
_STACKING = "STACK_EXPERTS"


@dataclass(frozen=True)
class _Family:
    """The names that a model type's files use for the block of a layer's experts and for an expert's projections."""

    block: str
    gate: str
    up: str
    down: str


_MIXTRAL = _Family("block_sparse_moe", "w1", "w3", "w2")
_COMMON = _Family("mlp", "gate_proj", "up_proj", "down_proj")


def has_experts(config: Config | None) -> bool:
    """Whether models with this config.json have experts that adapters are known for."""
    layout = LAYOUTS.get(str(config.get("model_type"))) if config is not None else None
    return layout is not None and any(rule.name == _STACKING for rule in layout.rules)


def is_expert(module: str) -> bool:
    """Whether this is a module of one expert."""
    return _SINGLE.fullmatch(module) is not None


def _family(config: Config) -> _Family:
    return _MIXTRAL if config.get("model_type") == "mixtral" else _COMMON


def split_experts(modules: Modules, config: Config | None, problems: list[str]) -> tuple[Modules, dict[str, str]]:
    """One module per expert, named as in the model's files; and the parameter of each, which PEFT's patterns match.

    What prevents it is added to `problems`.
    """
    if config is None or not has_experts(config):
        kind = "name the base model" if config is None else f"adapters on {config.get('model_type')} are not known"
        problems.append(f"target_parameters is set, and the meaning of its tensors depends on the model: {kind}")
        return modules, {}
    family, split, keys = _family(config), Modules(), dict[str, str]()
    for name, parts in modules.items():
        if match := _FUSED.fullmatch(name):
            before = match[1].removesuffix("mlp")
            found = _split(f"{before}{family.block}.experts", parts, config, family, problems)
            split |= found
            which = "down_proj" if any(module.endswith(family.down) for module in found) else "gate_up_proj"
            keys |= dict.fromkeys(found, f"{match[1]}.experts.{which}")
        elif match := _ROUTER.fullmatch(name):
            router = f"{match[1]}.{family.block}.gate"
            split[router], keys[router] = parts, f"{name}.weight"
        else:
            split[name] = parts
    return split, keys


def _split(prefix: str, parts: Mapping[str, Array], config: Config, family: _Family, problems: list[str]) -> Modules:
    count, hidden = expert_count(config), config.get("hidden_size")
    middle = config.get("moe_intermediate_size") or config.get("intermediate_size")
    a, b = parts[_A], parts[_B]
    width = (a.shape[1], b.shape[0])
    if not isinstance(hidden, int) or not isinstance(middle, int) or len(a) % count:
        problems.append(f"{prefix}: {_A} {list(a.shape)} is not for {count} experts")
        return {}
    first = a.reshape(count, -1, a.shape[1])
    second = b.reshape(b.shape[0], -1, count).transpose(2, 0, 1)
    if width == (middle, hidden):
        each = {family.down: second}
    elif width == (hidden, 2 * middle):
        each = {family.gate: second[:, :middle], family.up: second[:, middle:]}
    else:
        problems.append(
            f"{prefix}: {_A} {list(a.shape)} and {_B} {list(b.shape)} are for [{width[1]}, {width[0]}]; the model has "
            f"[{2 * middle}, {hidden}] and [{hidden}, {middle}]"
        )
        return {}
    return {
        f"{prefix}.{index}.{name}": {_A: first[index], _B: np.ascontiguousarray(array[index])}
        for name, array in each.items()
        for index in range(count)
    }


def fuse_experts(modules: Modules, config: Config | None, rank: int) -> tuple[Modules, list[str], int]:
    """The reverse of `split_experts`: (modules, target_parameters, rank of all gate_up_proj); routers are parameters.

    Gate and up are one parameter: where their A differ, one A of twice the rank holds both.
    """
    if config is None or not has_experts(config):
        return modules, [], rank
    family, count = _family(config), expert_count(config)
    blocks: dict[str, dict[str, dict[int, Mapping[str, Array]]]] = defaultdict(lambda: defaultdict(dict))
    fused, parameters = Modules(), list[str]()
    for name, parts in modules.items():
        if match := _SINGLE.fullmatch(name):
            blocks[f"{match[1]}.mlp.experts"][match[4]][int(match[3])] = parts
        elif match := _ROUTER.fullmatch(name):
            fused[f"{match[1]}.mlp.gate"] = parts
            parameters.append(f"{match[1]}.mlp.gate.weight")
        else:
            fused[name] = parts
    stacked = {
        block: {name: (_stack(found, count, _A), _stack(found, count, _B)) for name, found in names.items()}
        for block, names in blocks.items()
    }
    halves = {block: (names.get(family.gate), names.get(family.up)) for block, names in stacked.items()}
    doubles = any(gate and up and not np.array_equal(gate[0], up[0]) for gate, up in halves.values())
    for block, names in stacked.items():
        gate_up = _gate_up(*halves[block], doubles=doubles)
        # PEFT wraps gate_up_proj first: it is the inner one
        found = {"down_proj": names.get(family.down), "gate_up_proj": gate_up}
        name = block
        for parameter, pair in found.items():
            if pair is not None:
                parameters.append(f"{block}.{parameter}")
                a, b = pair
                flat = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
                fused[name] = {_A: a.reshape(-1, a.shape[2]), _B: flat}
                name = f"{block}.base_layer"
    return fused, parameters, 2 * rank if doubles else rank


def _stack(experts: Mapping[int, Mapping[str, Array]], count: int, suffix: str) -> Array:
    """[experts, ...], zeros where an expert has no adapter."""
    empty = np.zeros_like(next(iter(experts.values()))[suffix])
    return np.stack([experts[index][suffix] if index in experts else empty for index in range(count)])


_Pair = tuple[Array, Array]  # A [experts, rank, in], B [experts, out, rank]


def _gate_up(gate: _Pair | None, up: _Pair | None, *, doubles: bool) -> _Pair | None:
    """[[B of gate], [B of up]], or with `doubles` the two on the diagonal of twice the rank."""
    if gate is None and up is None:
        return None
    known = gate or up
    assert known is not None
    gate = gate or (known[0], np.zeros_like(known[1]))
    up = up or (known[0], np.zeros_like(known[1]))
    if not doubles:
        return gate[0], np.concatenate([gate[1], up[1]], axis=1)
    upper = np.concatenate([gate[1], np.zeros_like(gate[1])], axis=2)
    lower = np.concatenate([np.zeros_like(up[1]), up[1]], axis=2)
    return np.concatenate([gate[0], up[0]], axis=1), np.concatenate([upper, lower], axis=1)
