"""Compute log-probabilities, gradients and AdamW steps of an MLX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from macft.backends.base import OptimizerSpec
from macft.backends.mlx.lora import MAGNITUDE, Dropout
from macft.backends.mlx.ops import MlxOps, exact_sum
from macft.backends.mlx.split import Columns, SplitModel
from macft.backends.shared import is_decayed
from macft.objectives.batch import Batch
from macft.objectives.losses import Objective

Parameters = dict[str, mx.array]  # path in the model -> float32 value
GradientStep = Callable[..., tuple[mx.array, dict[str, mx.array], Parameters]]


def token_logps(split: SplitModel, columns: Columns, shape: tuple[int, int], *, with_gradient: bool) -> mx.array:
    """float32 `shape` [rows, T-1]: log-probabilities at a layout's positions, 0 elsewhere."""
    logps = split.logps(columns, with_gradient=with_gradient)
    return mx.zeros(shape[0] * shape[1]).at[columns["scatter_index"]].add(logps).reshape(shape)


def whole_logits(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V]: the logits after each token."""
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


def gradient_step(split: SplitModel, dropout: Dropout | None, objective: Objective, dtype: mx.Dtype) -> GradientStep:
    """Make a pure function (parameters, batch, layout, dropout keys, 1 / total weight) -> loss, metrics, gradients.

    It has no state, so that it can be compiled: parameters come in as float32 and are cast to
    the compute type on the way into the model. Batch and layout are given as their columns by name.
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
    """Cast parameters to the compute type, but not DoRA magnitudes, whose ratio to a norm must be 1 at the start."""
    return {path: value if path.endswith(MAGNITUDE) else value.astype(dtype) for path, value in parameters.items()}


def trainable_parameters(model: nn.Module) -> Parameters:
    """The trainable parameters in float32."""
    return {path: value.astype(mx.float32) for path, value in tree_flatten(model.trainable_parameters())}


def place(model: nn.Module, parameters: Parameters) -> None:
    """Put values into the model at their paths."""
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
        self.moments: dict[str, Parameters] = {"exp_avg": {}, "exp_avg_sq": {}}

    def update(self, parameters: Parameters, gradients: Parameters, lr: float) -> Parameters:
        """Return the parameters after one step.

        m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
        p = p (1 - lr wd) - lr / (1-b1^t) * m / (sqrt(v / (1-b2^t)) + eps)   (arXiv 1711.05101)
        """
        self.steps += 1
        spec = self.spec
        rate = lr / (1 - spec.beta1**self.steps)
        root = (1 - spec.beta2**self.steps) ** 0.5
        exp_avg, exp_avg_sq = self.moments["exp_avg"], self.moments["exp_avg_sq"]
        updated = {}
        for path, value in parameters.items():
            g = gradients[path]
            zero = mx.zeros_like(g)
            m = spec.beta1 * exp_avg.get(path, zero) + (1 - spec.beta1) * g
            v = spec.beta2 * exp_avg_sq.get(path, zero) + (1 - spec.beta2) * mx.square(g)
            exp_avg[path], exp_avg_sq[path] = m, v
            decay = 1 - lr * spec.weight_decay if is_decayed(value.shape) else 1.0
            updated[path] = value * decay - rate * m / (mx.sqrt(v) / root + spec.epsilon)
        return updated
