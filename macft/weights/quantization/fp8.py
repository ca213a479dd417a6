"""Dequantize matrices held in 8-bit floating point with scales, as DeepSeek, Qwen and compressed-tensors do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from macft.errors import raise_problems
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows

FP8 = frozenset(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_SCALES = ("weight_scale_inv", "weight_scale")  # both multiply
# of activations and of the cache of keys and values, which are not quantized here
_UNUSED = ("input_scale", "activation_scale", "q_scale", "k_scale", "v_scale")
_COMPRESSED = ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Fp8:
    """How a folder holds its matrices; `block` is the (rows, columns) that share a scale, if the config names it."""

    block: tuple[int, int] | None


def fp8_of(config: dict[str, Any]) -> Fp8 | None:
    """The fp8 quantization that a config.json describes, or None for any other and for none."""
    found = config.get("quantization_config")
    if config.get("quantization") is not None or not isinstance(found, dict):
        return None
    if found.get("quant_method") == "fp8":
        return Fp8(_block(found.get("weight_block_size")))
    if found.get("quant_method") != "compressed-tensors" or found.get("format") not in _COMPRESSED:
        return None
    groups = found.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    is_fp8 = all(
        (each.get("type"), each.get("num_bits"), each.get("symmetric")) == ("float", 8, True) for each in weights
    )
    blocks = {_block(each.get("block_structure")) for each in weights}
    return Fp8(blocks.pop()) if is_fp8 and len(blocks) == 1 else None


def dequantize_fp8(where: str, fp8: Fp8, tensors: list[LazyTensor], dtype: np.dtype[Any]) -> list[LazyTensor]:
    """The tensors with each `X.weight` in fp8 and its scale turned into one `X.weight` of `dtype`.

    A product is computed in float32. ModelError, under the headline `where`, for scales that are missing or misfit.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    result, problems = [], []
    for tensor in tensors:
        module, _, kind = tensor.name.rpartition(".")
        if kind in _UNUSED or (kind in _SCALES and by_name.get(f"{module}.weight", tensor).dtype in FP8):
            continue
        if tensor.dtype not in FP8:
            result.append(tensor)
            continue
        scale = next((by_name[name] for end in _SCALES if (name := f"{module}.{end}") in by_name), None)
        grid = _grid(tensor, scale, fp8.block) if scale is not None else None
        if scale is None or grid is None:
            found = f"a scale of shape {list(scale.shape)}" if scale is not None else f"no {' or '.join(_SCALES)}"
            problems.append(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)} with {found}")
        else:
            result.append(_product(tensor, scale, grid, dtype))
    raise_problems(where, problems)
    return result


def _block(value: Any) -> tuple[int, int] | None:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else None


def _grid(weight: LazyTensor, scale: LazyTensor, block: tuple[int, int] | None) -> tuple[int, int] | None:
    """The (rows, columns) of a matrix that share a scale; None if the two do not fit each other."""
    if len(weight.shape) != 2 or not _is_number(scale.dtype):
        return None
    rows, columns = weight.shape
    down, across = (1, 1) if scale.shape in ((), (1,)) else scale.shape if len(scale.shape) == 2 else (0, 0)
    for height, width in ([block] if block else []) + ([(rows // down, columns // across)] if down * across else []):
        # the last block of a row or column may be cut short
        if height * width and (-(-rows // height), -(-columns // width)) == (down, across):
            return height, width
    return None


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype in (_E8M0, np.uint8) or dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16))


def _product(weight: LazyTensor, scale: LazyTensor, grid: tuple[int, int], dtype: np.dtype[Any]) -> LazyTensor:
    height, width = grid

    def rows(start: int, stop: int) -> Array:
        found = scale.read()
        factors = (found.view(_E8M0) if found.dtype == np.uint8 else found).astype(np.float32)
        factors = np.atleast_2d(factors)[np.arange(start, stop) // height].repeat(width, axis=1)
        values = read_rows(weight, start, stop).astype(np.float32) * factors[:, : weight.shape[1]]
        return values.astype(dtype, copy=False)

    return from_rows(weight.name, dtype, weight.shape, rows)
