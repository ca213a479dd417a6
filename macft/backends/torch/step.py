"""Batches in, log-probabilities out, and the optimizer over the trainable parameters."""

from __future__ import annotations

import torch

from macft.backends.base import OptimizerSpec, is_decayed
from macft.backends.batch_layout import Layout
from macft.backends.torch.split import SplitModel


def token_logps(split: SplitModel, layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 `shape` [rows, T-1]: log-probabilities at a layout's places, 0 elsewhere."""
    columns = split.columns(layout)
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=split.device)
    return dense.index_add(0, columns["places"], split.logps(columns)).reshape(shape)


def make_optimizer(parameters: list[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if is_decayed(p.shape)], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if not is_decayed(p.shape)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(spec.beta1, spec.beta2), eps=spec.epsilon
    )


def clip(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
