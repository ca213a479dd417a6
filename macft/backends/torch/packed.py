"""Attend within each example of packed rows by variable-length kernels, where the GPU has them."""

from __future__ import annotations

import inspect
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

NAME = "macft_packed"

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


def attend(
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


def install(model: torch.nn.Module) -> None:
    """Let a model's layers call `attend`, with the masks of scaled dot-product attention."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
