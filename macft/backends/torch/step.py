"""Batches in, log-probabilities out, and the optimizer over the trainable parameters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from macft.backends.base import OptimizerSpec, is_decayed
from macft.backends.torch.model import RowGather
from macft.data.batches import NumpyBatch


def token_logps(
    model: torch.nn.Module,
    gather: RowGather | None,
    batch: NumpyBatch,
    positions: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """float32 [B, T-1]: log p(token_{t+1} | tokens up to t) at `positions`, 0 elsewhere.

    The head sees K rows only. Inputs lose their last token: nothing follows it. Padding is on the
    right and attention is causal, so no mask is needed.
    """
    tokens = torch.from_numpy(batch.tokens).to(device).long()
    rows = torch.from_numpy(np.flatnonzero(positions)).to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)[rows]
    if gather is None:
        logits = model(input_ids=inputs).logits
        logits = logits.reshape(-1, logits.shape[-1])[rows]
    else:
        with gather.only(rows):
            logits = model(input_ids=inputs).logits[0]
    logps = -F.cross_entropy(logits.float(), targets, reduction="none")
    dense = torch.zeros(inputs.numel(), dtype=torch.float32, device=device)
    return dense.index_add(0, rows, logps).reshape(inputs.shape)


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
