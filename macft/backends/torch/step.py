"""Compute log-probabilities of a PyTorch model, and make the optimizer of its trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from macft.backends.base import OptimizerSpec
from macft.backends.batch_layout import BatchLayout
from macft.backends.shared import is_decayed
from macft.backends.torch.split import SplitModel


def token_logps(split: SplitModel, layout: BatchLayout, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 `shape` [rows, T-1]: log-probabilities at a layout's positions, 0 elsewhere."""
    columns = split.columns(layout)
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=split.device)
    return dense.index_add(0, columns["scatter_index"], split.logps(columns)).reshape(shape)


def whole_logits(model: torch.nn.Module, device: torch.device, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V]: the logits after each token."""
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)], device=device))
    found = output if isinstance(output, torch.Tensor) else output.logits
    return found[0].float().cpu().numpy()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `dtype` within the block, whatever the parameters are kept in."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def make_optimizer(parameters: list[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """Make an AdamW of two groups: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if is_decayed(p.shape)], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if not is_decayed(p.shape)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        # one kernel for all parameters instead of a dozen
        fused=parameters[0].device.type == "cuda" or None,
    )


def unscale(parameters: list[torch.nn.Parameter], scale: float) -> None:
    """Divide the gradients by the factor that the loss was multiplied by."""
    if scale != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / scale)


def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
