"""Compute log-probabilities, gradients and AdamW steps of an MLX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from macft.backends.base import OptimizerSpec
from macft.backends.mlx import device
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


def scored_as_trained(split: SplitModel, columns: Columns, shape: tuple[int, int]) -> mx.array:
    """`token_logps` by the kernels of a training step: what has a gradient, Metal attends to in other ones."""

    def score(_: mx.array) -> list[mx.array]:
        return [token_logps(split, columns, shape, with_gradient=False)]

    [logps], _ = mx.vjp(score, [mx.array(0.0)], [mx.zeros(shape)])
    return logps


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


class CompiledStep:
    """A gradient step that is compiled once for each shape of its arrays."""

    # MLX forgets no shape, and each costs 9 MB in a model of 30 layers (measured): when full, all are dropped.
    most_shapes = 48

    def __init__(self, step: GradientStep):
        self._step = step
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._compiled = mx.compile(step)

    def __call__(self, parameters: Parameters, batch: Columns, layout: Columns, *rest: Any) -> Any:
        shape = tuple(array.shape for array in (*batch.values(), *layout.values()))
        if shape not in self.shapes and len(self.shapes) == self.most_shapes:
            self.shapes, self._compiled = set(), mx.compile(self._step)
        self.shapes.add(shape)
        return self._compiled(parameters, batch, layout, *rest)


def clip(gradients: Parameters, max_norm: float) -> tuple[Parameters, mx.array]:
    """Scale gradients so that their global norm is at most `max_norm` (0: leave them); also the norm."""
    norm = mx.sqrt(exact_sum(mx.stack([exact_sum(mx.square(g)) for g in gradients.values()])))
    if max_norm <= 0:
        return gradients, norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {path: g * factor for path, g in gradients.items()}, norm


@dataclass(frozen=True)
class AdamState:
    """Where AdamW stands: the steps it has taken, and its moments by kind, empty before the first."""

    steps: int = 0
    moments: dict[str, Parameters] = field(default_factory=lambda: {"exp_avg": {}, "exp_avg_sq": {}})


class AdamW:
    """AdamW as in PyTorch, after clipping: moments in float32, bias corrections computed in double precision."""

    def __init__(self, spec: OptimizerSpec):
        self.spec = spec
        # thousands of small operations, which a GPU would start one by one
        self._update = mx.compile(self._updated) if device.on_gpu() else self._updated

    def update(
        self, state: AdamState, parameters: Parameters, gradients: Parameters, lr: float, gradient_scale: float = 1.0
    ) -> tuple[AdamState, Parameters, mx.array]:
        """The state and the parameters after one step, and the gradients' norm before clipping.

        `gradient_scale` is what the gradients are multiplied by.
        m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
        p = p (1 - lr wd) - lr / (1-b1^t) * m / (sqrt(v / (1-b2^t)) + eps)   (arXiv 1711.05101)
        """
        spec, steps = self.spec, state.steps + 1
        numbers = {
            "decay": 1 - lr * spec.weight_decay,
            "rate": lr / (1 - spec.beta1**steps),
            "root": (1 - spec.beta2**steps) ** 0.5,
        }
        if gradient_scale != 1.0:
            numbers["unscale"] = 1.0 / gradient_scale
        moments = {
            kind: values or {path: mx.zeros_like(g) for path, g in gradients.items()}
            for kind, values in state.moments.items()
        }
        # as arrays: a compiled function would be compiled anew for other numbers
        scalars = {name: mx.array(value) for name, value in numbers.items()}
        parameters, moments, norm = self._update(parameters, moments, gradients, scalars)
        return AdamState(steps, moments), parameters, norm

    def _updated(
        self, parameters: Parameters, moments: dict[str, Parameters], gradients: Parameters, numbers: Parameters
    ) -> tuple[Parameters, dict[str, Parameters], mx.array]:
        spec = self.spec
        if "unscale" in numbers:
            gradients = {path: g * numbers["unscale"] for path, g in gradients.items()}
        gradients, norm = clip(gradients, spec.max_grad_norm)
        updated: Parameters = {}
        new: dict[str, Parameters] = {"exp_avg": {}, "exp_avg_sq": {}}
        for path, value in parameters.items():
            g = gradients[path]
            m = spec.beta1 * moments["exp_avg"][path] + (1 - spec.beta1) * g
            v = spec.beta2 * moments["exp_avg_sq"][path] + (1 - spec.beta2) * mx.square(g)
            new["exp_avg"][path], new["exp_avg_sq"][path] = m, v
            decayed = value * numbers["decay"] if is_decayed(value.shape) else value
            updated[path] = decayed - numbers["rate"] * m / (mx.sqrt(v) / numbers["root"] + spec.epsilon)
        return updated, new, norm
