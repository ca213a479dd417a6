"""Define the rules by which families of mixture-of-experts models store experts in the HF and the MLX layout."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.layouts.mlx_rules import Change, LayoutRule, Tensors, mapped, same, swap_last
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows, renamed

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
EXPERTS_APART = ("SPARSE_BLOCK", "STACK_EXPERTS")  # the rules that say how the experts of a layer are stored


def expert_count(config: Config) -> int:
    """How many experts a layer has; ModelError when config.json does not say."""
    count = config.get("num_local_experts") or config.get("num_experts")
    if not isinstance(count, int):
        raise ModelError(f"config.json: num_experts is {count!r}, expected the number of experts of a layer")
    return count


def stack_experts(block: str, names: tuple[str, str, str] = _PROJECTIONS) -> LayoutRule:
    """Experts of a layer as one tensor per projection in MLX; in HF one per expert, with projections called `names`.

    HF files that hold all experts of a layer in `experts.gate_up_proj` and `experts.down_proj`, as transformers
    has them in memory, can be read too.
    """
    called = dict(zip(names, _PROJECTIONS, strict=True))
    single = re.compile(rf"(.*\.{block})\.experts\.(\d+)\.({'|'.join(names)})\.weight")
    fused = re.compile(rf"(.*\.{block})\.experts\.(gate_up_proj|down_proj)")
    stacked = re.compile(rf"(.*\.{block})\.switch_mlp\.({'|'.join(_PROJECTIONS)})\.weight")

    def to_mlx(config: Config, tensors: Tensors) -> Tensors:
        count = expert_count(config)
        result: list[LazyTensor | str] = []
        groups: dict[str, dict[int, LazyTensor]] = defaultdict(dict)
        for tensor in tensors:
            if match := single.fullmatch(tensor.name):
                target = f"{match[1]}.switch_mlp.{called[match[3]]}.weight"
                if target not in groups:
                    result.append(target)
                groups[target][int(match[2])] = tensor
            elif match := fused.fullmatch(tensor.name):
                result += _unfused(tensor, f"{match[1]}.switch_mlp")
            else:
                result.append(tensor)
        _check_groups(groups, count)
        return [_stack(item, groups[item]) if isinstance(item, str) else item for item in result]

    def to_hf(_: Config, tensors: Tensors) -> Tensors:
        result: Tensors = []
        for tensor in tensors:
            if match := stacked.fullmatch(tensor.name):
                result += _unstack(tensor, f"{match[1]}.experts", names[_PROJECTIONS.index(match[2])])
            else:
                result.append(tensor)
        return result

    each = f"{block}.experts.N.{{{','.join(names)}}}"
    return LayoutRule("STACK_EXPERTS", f"{each} are stacked as {block}.switch_mlp", to_mlx, to_hf)


def _check_groups(groups: dict[str, dict[int, LazyTensor]], count: int) -> None:
    problems = []
    for target, experts in groups.items():
        if missing := sorted(set(range(count)) - set(experts)):
            problems.append(f"{target}: no expert {', '.join(map(str, missing))} of {count}")
        if extra := sorted(set(experts) - set(range(count))):
            problems.append(f"{target}: expert {', '.join(map(str, extra))}, but config.json has {count}")
        kinds = sorted({f"{tensor.dtype} {list(tensor.shape)}" for tensor in experts.values()})
        if len(kinds) > 1:
            problems.append(f"{target}: experts are of different kinds: {', '.join(kinds)}")
    raise_problems("these experts cannot be stacked:", problems)


def _stack(name: str, experts: dict[int, LazyTensor]) -> LazyTensor:
    shape = (len(experts), *experts[0].shape)

    def rows(start: int, stop: int) -> Array:
        return np.stack([experts[index].read() for index in range(start, stop)])

    return from_rows(name, experts[0].dtype, shape, rows)


def _unstack(tensor: LazyTensor, prefix: str, name: str) -> Tensors:
    def one(index: int) -> LazyTensor:
        return LazyTensor(
            f"{prefix}.{index}.{name}.weight",
            tensor.dtype,
            tensor.shape[1:],
            lambda: read_rows(tensor, index, index + 1)[0],
        )

    return [one(index) for index in range(tensor.shape[0])]


def _unfused(tensor: LazyTensor, prefix: str) -> Tensors:
    """Gate over up [experts, 2 * width, columns] as two tensors; down as it is."""
    if tensor.name.endswith("down_proj"):
        return [renamed(tensor, f"{prefix}.down_proj.weight")]
    return _halves(tensor, f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")


def _halves(tensor: LazyTensor, first: str, second: str) -> Tensors:
    count, height, width = tensor.shape
    middle = height // 2
    return [
        mapped(tensor, first, (count, middle, width), lambda rows: rows[:, :middle]),
        mapped(tensor, second, (count, height - middle, width), lambda rows: rows[:, middle:]),
    ]


def _joined(name: str, first: LazyTensor, second: LazyTensor) -> LazyTensor:
    count, height, width = first.shape

    def rows(start: int, stop: int) -> Array:
        return np.concatenate([read_rows(part, start, stop) for part in (first, second)], axis=1)

    return from_rows(name, first.dtype, (count, height + second.shape[1], width), rows)


def _pair_of(tensors: Tensors, gate: str) -> LazyTensor:
    """The up projection that belongs to a gate projection."""
    expected = gate.replace("gate_proj", "up_proj")
    found = next((tensor for tensor in tensors if tensor.name == expected), None)
    if found is None:
        raise ModelError(f"{gate} has no matching {expected}; the model is incomplete")
    return found


# converts one tensor of a block of experts, named by what follows the block's own name
Convert = Callable[[str, str, LazyTensor, Tensors], Tensors]


def _in_block(marker: str, convert: Convert) -> Change:
    """`convert`(block with the marker, name in it, tensor, all tensors) of each tensor in a block of experts."""

    def change(_: Config, tensors: Tensors) -> Tensors:
        result: Tensors = []
        for tensor in tensors:
            before, found, name = tensor.name.rpartition(marker)
            result += convert(f"{before}{marker}", name, tensor, tensors) if found else [tensor]
        return result

    return change


def _granite_to_mlx(block: str, name: str, tensor: LazyTensor, _: Tensors) -> Tensors:
    switch = f"{block}switch_mlp."
    if name == "input_linear.weight":
        return _halves(tensor, f"{switch}gate_proj.weight", f"{switch}up_proj.weight")
    return [renamed(tensor, f"{switch}down_proj.weight") if name == "output_linear.weight" else tensor]


def _granite_to_hf(block: str, name: str, tensor: LazyTensor, tensors: Tensors) -> Tensors:
    block = block.removesuffix("switch_mlp.")
    if name == "gate_proj.weight":
        return [_joined(f"{block}input_linear.weight", tensor, _pair_of(tensors, tensor.name))]
    if name == "down_proj.weight":
        return [renamed(tensor, f"{block}output_linear.weight")]
    return [] if name == "up_proj.weight" else [tensor]


GRANITE_EXPERTS = LayoutRule(
    "GRANITE_EXPERTS",
    "block_sparse_moe.{input_linear,output_linear} are split into switch_mlp.{gate_proj,up_proj,down_proj}",
    _in_block(".block_sparse_moe.", _granite_to_mlx),
    _in_block(".switch_mlp.", _granite_to_hf),
)


def _transposed(tensor: LazyTensor, name: str) -> LazyTensor:
    count, rows, columns = tensor.shape
    return mapped(tensor, name, (count, columns, rows), swap_last)


def _oss_to_mlx(block: str, name: str, tensor: LazyTensor, _: Tensors) -> Tensors:
    if name == "gate_up_proj":
        count, columns, height = tensor.shape
        shape: tuple[int, ...] = (count, height // 2, columns)
        return [
            mapped(tensor, f"{block}gate_proj.weight", shape, lambda rows: swap_last(rows[..., ::2])),
            mapped(tensor, f"{block}up_proj.weight", shape, lambda rows: swap_last(rows[..., 1::2])),
        ]
    if name == "gate_up_proj_bias":
        shape = (tensor.shape[0], tensor.shape[1] // 2)
        return [
            mapped(tensor, f"{block}gate_proj.bias", shape, lambda rows: rows[:, ::2]),
            mapped(tensor, f"{block}up_proj.bias", shape, lambda rows: rows[:, 1::2]),
        ]
    if name == "down_proj":
        return [_transposed(tensor, f"{block}down_proj.weight")]
    if name == "down_proj_bias":
        return [renamed(tensor, f"{block}down_proj.bias")]
    raise _not_oss(tensor)


def _oss_to_hf(block: str, name: str, tensor: LazyTensor, tensors: Tensors) -> Tensors:
    if name == "gate_proj.weight":
        return [_interleaved(f"{block}gate_up_proj", tensor, _pair_of(tensors, tensor.name))]
    if name == "gate_proj.bias":
        return [_interleaved(f"{block}gate_up_proj_bias", tensor, _pair_of(tensors, tensor.name))]
    if name == "down_proj.weight":
        return [_transposed(tensor, f"{block}down_proj")]
    if name == "down_proj.bias":
        return [renamed(tensor, f"{block}down_proj_bias")]
    if name.startswith("up_proj."):
        return []
    raise _not_oss(tensor)


def _not_oss(tensor: LazyTensor) -> ModelError:
    return ModelError(f"{tensor.name} is not one of the unquantized experts of gpt_oss; pass the bfloat16 model")


def _interleaved(name: str, gate: LazyTensor, up: LazyTensor) -> LazyTensor:
    """Gate and up column by column: [experts, columns, 2 * rows] from two weights [experts, rows, columns].

    Biases are [experts, rows] and become [experts, 2 * rows].
    """
    count, *rest = gate.shape
    *front, last = reversed(rest)

    def rows(start: int, stop: int) -> Array:
        parts = [read_rows(part, start, stop) for part in (gate, up)]
        turned = [swap_last(part) if front else part for part in parts]
        return np.stack(turned, axis=-1).reshape(stop - start, *front, 2 * last)

    return from_rows(name, gate.dtype, (count, *front, 2 * last), rows)


OSS_EXPERTS = LayoutRule(
    "OSS_EXPERTS",
    "mlp.experts.gate_up_proj and down_proj are transposed; gate and up, interleaved in HF, are apart",
    _in_block(".mlp.experts.", _oss_to_mlx),
    _in_block(".mlp.experts.", _oss_to_hf),
)


def _block_to_mlx(_: Config, tensors: Tensors) -> Tensors:
    return [renamed(tensor, tensor.name.replace(".mlp.", ".block_sparse_moe.")) for tensor in tensors]


# transformers calls the block mlp in memory, and in files written as it is in memory
SPARSE_BLOCK = LayoutRule(
    "SPARSE_BLOCK", "mlp, as transformers calls the block in memory, is block_sparse_moe", _block_to_mlx, same
)
