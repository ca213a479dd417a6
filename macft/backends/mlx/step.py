"""Numpy batches in, an updated MLX model out: log-probabilities, gradients, clipping and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from macft.backends.base import OptimizerSpec, is_decayed
from macft.backends.mlx.lora import MAGNITUDE, Dropout
from macft.backends.mlx.ops import MlxOps, exact_sum
from macft.backends.mlx.split import SplitModel
from macft.objectives.batch import Batch
from macft.objectives.losses import Objective

Parameters = dict[str, mx.array]  # path in the model -> float32 value


GradientStep = Callable[..., tuple[mx.array, dict[str, mx.array], Parameters]]
Columns = dict[str, mx.array]


def token_logps(split: SplitModel, columns: Columns, shape: tuple[int, int], *, with_gradient: bool) -> mx.array:
    """float32 `shape` [rows, T-1]: log-probabilities at a layout's places, 0 elsewhere."""
    logps = split.logps(columns, with_gradient=with_gradient)
    return mx.zeros(shape[0] * shape[1]).at[columns["places"]].add(logps).reshape(shape)


def gradient_step(split: SplitModel, dropout: Dropout | None, objective: Objective, dtype: mx.Dtype) -> GradientStep:
    """A pure function (parameters, batch, layout, dropout keys, 1 / total weight) -> loss, metrics, gradients.

    It holds no state, so that it can be compiled: parameters come in as float32 and are cast to
    the compute type on the way into the model. Batch and layout are their columns by name.
    """
    ops = MlxOps()

    def loss(
        parameters: Parameters, batch: Columns, layout: Columns, keys: mx.array | None, scale: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        place(split.model, cast(parameters, dtype))
        if dropout is not None:
            dropout.keys = keys
        rows, length = batch["tokens"].shape
        logps = token_logps(split, layout, (rows, length - 1), with_gradient=True)
        total, metrics = objective(ops, logps, Batch(**batch))
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
