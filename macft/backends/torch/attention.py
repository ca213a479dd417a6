"""Attend with the kernels that a GPU has: variable-length ones for packed rows, repeated key heads on older cards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build without it
    varlen_attn = None

_PACKED, _REPEATED = "macft_packed", "macft_repeated"

# before torch 2.12 there must be as many key heads as query heads
_TAKES_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels may be tried: for 16 bits on CUDA, from compute capability 8.0 on."""
    is_able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return varlen_attn is not None and is_able and dtype != torch.float32


def segment_bounds(positions: np.ndarray) -> tuple[np.ndarray, int]:
    """int32 [segments + 1], where the examples of rows [R, L] begin once flattened, and the longest one's length.

    Every position 0 begins an example, or the padding behind the last.
    """
    starts = np.append(np.flatnonzero(positions.reshape(-1) == 0), positions.size).astype(np.int32)
    return starts, int(np.diff(starts).max())


def needs_repeated_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped key heads would send attention to the kernel that keeps whole score matrices.

    Without flash attention, which wants 16 bits and compute capability 8.0, PyTorch before 2.14 has no other.
    """
    has_flash = dtype != torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return device.type == "cuda" and not has_flash and (major, minor) < (2, 14)


def attend_repeated(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[R, L, H, D]: scaled dot-product attention with as many key heads as query heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    # a module that says nothing of groups
    whole = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(whole, query, key, value, attention_mask, dropout, scaling, **kwargs)


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[R, L, H, D]: attention as transformers calls it; given `cu_seq_lens_q`, of each example by itself."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("variable-length attention has no soft cap")
    rows, heads, length, width = query.shape
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    groups = heads // key.shape[1]
    if groups > 1 and not _TAKES_GROUPS:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    flat = [x.transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[-1]).to(dtype) for x in (query, key, value)]
    longest, window = kwargs["max_length_q"], kwargs.get("sliding_window")
    output = varlen_attn(
        *flat,
        *(bounds, bounds, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": groups > 1} if _TAKES_GROUPS else {}),
    )
    return output.reshape(rows, length, heads, width), None


def use_packed(model: torch.nn.Module) -> None:
    """Let a model's layers call `attend_packed`, with the masks of scaled dot-product attention."""
    _use(model, _PACKED, attend_packed)


def use_repeated(model: torch.nn.Module) -> None:
    """Let a model's layers call `attend_repeated`, if they call scaled dot-product attention."""
    if model.config._attn_implementation == "sdpa":
        _use(model, _REPEATED, attend_repeated)


def _use(model: torch.nn.Module, name: str, function: Callable[..., tuple[torch.Tensor, None]]) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name
