"""Arrange the tensors of linear attention (Qwen3-Next, Qwen3.5) as llama.cpp's state-space code reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from macft.gguf.row_order import mapped, reordered
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, LazyTensor, renamed

_MODULE = re.compile(r"(.*\.linear_attn\.)(\w+?)(\.weight)?$")
_SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


def sizes(config: Config) -> dict[str, int]:
    """The sizes by which the tensor rules of linear attention state shapes."""
    key_heads, value_heads, key_dim, value_dim = (int(config[key]) for key in _SIZES)
    keys, values = key_heads * key_dim, value_heads * value_dim
    return {
        "key_heads": key_heads,
        "value_heads": value_heads,
        "two_value_heads": 2 * value_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "value_channels": values,
        "channels": 2 * keys + values,
        "kernel": int(config["linear_conv_kernel_dim"]),
    }


def problems(config: Config) -> list[str]:
    """Sizes that are missing, or that llama.cpp cannot express, a line each."""
    found = [
        f"{key} is {config.get(key)!r}, a positive whole number was expected"
        for key in (*_SIZES, "linear_conv_kernel_dim")
        if not isinstance(config.get(key), int) or config[key] < 1
    ]
    if found:
        return found
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        found.append("linear_key_head_dim and linear_value_head_dim differ; llama.cpp has one size for both")
    if config["linear_num_value_heads"] % config["linear_num_key_heads"]:
        found.append("linear_num_value_heads is not a multiple of linear_num_key_heads")
    return found


def prepared(config: Config, tensors: list[LazyTensor]) -> list[LazyTensor]:
    """The tensors under the names of the rules, and in llama.cpp's order of rows.

    Qwen3-Next holds q, k, v and z of each key head together; they are separated. Qwen3.5 has the value heads of
    each key head together; llama.cpp repeats key heads in turns, so they are reordered: 0, r, 2r ..., 1, r + 1 ...
    """
    found = sizes(config)
    change = _next if config["model_type"] == "qwen3_next" else _three_five
    result: list[LazyTensor] = []
    for tensor in tensors:
        match = _MODULE.fullmatch(tensor.name)
        result += change(match[1], match[2], tensor, found) if match else [tensor]
    return result


def _next(prefix: str, name: str, tensor: LazyTensor, found: Mapping[str, int]) -> list[LazyTensor]:
    if name != "in_proj_qkvz":
        return [_plain(prefix, name, tensor)]
    keys, values = found["key_dim"], found["value_channels"] // found["key_heads"]
    rows = np.arange(tensor.shape[0]).reshape(found["key_heads"], -1)
    ends = np.cumsum([keys, keys, values])
    if rows.shape[1] != 2 * (keys + values):
        return [tensor]  # the wrong shape is reported later
    *parts, gate = np.split(rows, ends, axis=1)
    order = np.concatenate([part.reshape(-1) for part in parts])
    return [
        renamed(reordered(tensor, order), f"{prefix}in_proj_qkv.weight"),
        renamed(reordered(tensor, gate.reshape(-1)), f"{prefix}in_proj_z.weight"),
    ]


def _three_five(prefix: str, name: str, tensor: LazyTensor, found: Mapping[str, int]) -> list[LazyTensor]:
    changed = _plain(prefix, name, tensor)
    wide = _dealt(found["key_heads"], found["value_heads"], found["value_dim"])
    narrow = _dealt(found["key_heads"], found["value_heads"], 1)
    if name in ("in_proj_qkv", "conv1d"):
        before = found["channels"] - found["value_channels"]
        order = np.concatenate([np.arange(before), before + wide])
    elif name == "in_proj_z":
        order = wide
    elif name in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        order = narrow
    elif name == "out_proj" and tensor.shape[1:] == wide.shape:
        return [mapped(changed, changed.name, changed.shape, lambda rows: rows[:, wide])]
    else:
        return [changed]
    is_whole = tensor.shape[0] == len(order)  # the wrong shape is reported later
    return [renamed(reordered(changed, order), changed.name) if is_whole else changed]


def _dealt(key_heads: int, value_heads: int, size: int) -> Array:
    """The order that takes rows of value heads, stored key head by key head, in turns of the key heads."""
    rows = np.arange(value_heads * size).reshape(key_heads, value_heads // key_heads, size)
    dealt: Array = rows.swapaxes(0, 1).reshape(-1)
    return dealt


def _plain(prefix: str, name: str, tensor: LazyTensor) -> LazyTensor:
    """The changes that both models need: -exp(A_log), and convolutions without their middle axis."""
    if name == "A_log":
        return mapped(tensor, f"{prefix}A.weight", tensor.shape, _decay, np.dtype(np.float32))
    if name == "dt_bias":
        return renamed(tensor, f"{prefix}dt.weight")
    if name == "conv1d" and len(tensor.shape) == 3 and tensor.shape[1] == 1:
        return mapped(tensor, tensor.name, (tensor.shape[0], tensor.shape[2]), lambda rows: rows[:, 0])
    return tensor


def _decay(rows: Array) -> Array:
    """-exp(rows), computed in float64 so that it is rounded once; llama.cpp's converter is sometimes off by a bit."""
    decay: Array = -np.exp(rows.astype(np.float64))
    return decay.astype(np.float32)
