"""Numpy batches in, an updated MLX model out: log-probabilities, gradients, clipping and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from macft.backends.base import OptimizerSpec, is_decayed
from macft.backends.mlx.lora import MAGNITUDE, Dropout
from macft.backends.mlx.model import RowGather
from macft.backends.mlx.ops import MlxOps, cross_entropy, exact_sum
from macft.data.batches import Batch, NumpyBatch
from macft.objectives.losses import Objective

Parameters = dict[str, mx.array]  # path in the model -> float32 value


def padded(batch: NumpyBatch, positions: np.ndarray, multiple: int) -> tuple[NumpyBatch, np.ndarray, np.ndarray]:
    """Pad to few different shapes; returns the batch, its row indices and their validity.

    rows: int32 [K], flat indices into [B, T-1] of the positions whose next token is scored;
    valid: float32 [K], 0 for the padding of `rows`.
    """
    length = batch.tokens.shape[1] - 1
    extra = -length % multiple
    if extra:
        pad = ((0, 0), (0, extra))
        batch = Batch(tokens=np.pad(batch.tokens, pad), loss_mask=np.pad(batch.loss_mask, pad), lengths=batch.lengths)
        positions = np.pad(positions, pad)
    rows = np.flatnonzero(positions).astype(np.int32)
    valid = np.zeros(max(1, len(rows) + -len(rows) % multiple), dtype=np.float32)
    valid[: len(rows)] = 1.0
    return batch, np.pad(rows, (0, len(valid) - len(rows))), valid


def token_logps(
    model: nn.Module, gather: RowGather | None, tokens: mx.array, rows: mx.array, valid: mx.array
) -> mx.array:
    """float32 [B, T-1]: log p(token_{t+1} | tokens up to t) at `rows`, 0 elsewhere.

    The head sees K rows only. Inputs lose their last token: nothing follows it.
    """
    batch_size, length = tokens.shape[0], tokens.shape[1] - 1
    inputs = tokens[:, :-1]
    targets = mx.stop_gradient(tokens[:, 1:].reshape(-1)[rows])
    if gather is None:
        logits = model(inputs)
        logits = logits.reshape(-1, logits.shape[-1])[rows]
    else:
        with gather.only(rows):
            logits = model(inputs)[0]
    logps = -cross_entropy(logits, targets) * valid
    return mx.zeros(batch_size * length).at[rows].add(logps).reshape(batch_size, length)


GradientStep = Callable[..., tuple[mx.array, dict[str, mx.array], Parameters]]


def gradient_step(
    model: nn.Module, gather: RowGather | None, dropout: Dropout | None, objective: Objective, dtype: mx.Dtype
) -> GradientStep:
    """A pure function (parameters, batch arrays, dropout keys, 1 / total weight) -> loss, metrics, gradients.

    It holds no state, so that it can be compiled: parameters come in as float32 and are cast to
    the compute type on the way into the model.
    """
    ops = MlxOps()

    def loss(
        parameters: Parameters,
        tokens: mx.array,
        loss_mask: mx.array,
        lengths: mx.array,
        rows: mx.array,
        valid: mx.array,
        keys: mx.array | None,
        scale: mx.array,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        place(model, cast(parameters, dtype))
        if dropout is not None:
            dropout.keys = keys
        logps = token_logps(model, gather, tokens, rows, valid)
        total, metrics = objective(ops, logps, Batch(tokens, loss_mask, lengths))
        return total * scale, {name: value * scale for name, value in metrics.items()}

    run = mx.value_and_grad(loss)

    def step(*arrays: Any) -> tuple[mx.array, dict[str, mx.array], Parameters]:
        (value, metrics), gradients = run(*arrays)
        return value, metrics, gradients

    return step


def cast(parameters: Parameters, dtype: mx.Dtype) -> Parameters:
    """Parameters in the compute type; DoRA magnitudes stay float32, whose ratio to a norm must be 1 at the start."""
    return {path: value if path.endswith(MAGNITUDE) else value.astype(dtype) for path, value in parameters.items()}


def place(model: nn.Module, parameters: Parameters) -> None:
    """Put values into the model under their paths."""
    model.update(tree_unflatten(list(parameters.items())))


def clip(gradients: Parameters, max_norm: float) -> tuple[Parameters, mx.array]:
    """Scale gradients so that their global norm is at most `max_norm` (0: leave them); also the norm."""
    norm = mx.sqrt(exact_sum(mx.stack([exact_sum(mx.square(g)) for g in gradients.values()])))
    if max_norm <= 0:
        return gradients, norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {path: g * factor for path, g in gradients.items()}, norm


class AdamW:
    """AdamW as in PyTorch: moments in float32, bias corrections computed in double precision."""

    def __init__(self, spec: OptimizerSpec):
        self.spec = spec
        self.steps = 0
        self.exp_avg: Parameters = {}
        self.exp_avg_sq: Parameters = {}

    def update(self, parameters: Parameters, gradients: Parameters, lr: float) -> Parameters:
        """The parameters after one step.

        m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
        p = p (1 - lr wd) - lr / (1-b1^t) * m / (sqrt(v / (1-b2^t)) + eps)   (arXiv 1711.05101)
        """
        self.steps += 1
        spec = self.spec
        rate = lr / (1 - spec.beta1**self.steps)
        root = (1 - spec.beta2**self.steps) ** 0.5
        updated = {}
        for path, value in parameters.items():
            g = gradients[path]
            zero = mx.zeros_like(g)
            m = spec.beta1 * self.exp_avg.get(path, zero) + (1 - spec.beta1) * g
            v = spec.beta2 * self.exp_avg_sq.get(path, zero) + (1 - spec.beta2) * mx.square(g)
            self.exp_avg[path], self.exp_avg_sq[path] = m, v
            decay = 1 - lr * spec.weight_decay if is_decayed(value.shape) else 1.0
            updated[path] = value * decay - rate * m / (mx.sqrt(v) / root + spec.epsilon)
        return updated
