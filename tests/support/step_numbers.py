"""Compute the log-probabilities, the loss and the gradient of one step, and compare them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from macft.backends.base import LoraSpec, Model, ModelSpec, OptimizerSpec, State
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Sft
from macft.objectives.ops import NumpyOps
from macft.objectives.preference import answer_positions
from support.engines import load_model, train_step

LORA = LoraSpec(rank=4, alpha=8)
# Without clipping and with beta1 = 0 the first moment is the gradient.
GRADIENT = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)

# of the largest number: float32 sums in another order (3e-6 measured)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Squares:
    """The sum of squared log-probabilities: every position has a slope of its own."""

    with_prompt: bool = True

    def weight(self, _batch: NumpyBatch) -> float:
        return 1.0

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        return answer_positions(batch, with_prompt=self.with_prompt)

    def __call__(self, ops, logps, _batch):
        return ops.sum(logps * logps), {}


def load(engine: str, folder: Path, *, lora: LoraSpec | None = LORA, **spec) -> Model:
    """A model whose adapter is not at its start, where half of all gradients are 0."""
    optimizer = GRADIENT if lora is not None or "full" in spec else None
    model = load_model(engine, ModelSpec(folder=folder, lora=lora, precision="float32", **spec), optimizer)
    if lora is not None:
        rng = np.random.default_rng(8)
        state = model.trained_state()
        noise = {name: rng.normal(size=state[name].shape, scale=0.1) for name in sorted(state)}
        model.set_trained_state({name: (value + noise[name]).astype(np.float32) for name, value in state.items()})
    return model


@dataclass(frozen=True)
class Numbers:
    logps: np.ndarray
    loss: float
    gradient: State


def numbers(model: Model, batch: NumpyBatch, objective: Squares = Squares()) -> Numbers:
    """Log-probabilities, and loss and gradient of a step that changes nothing."""
    logps = model.logps(batch, objective.positions(batch))
    result = train_step(model, objective, [batch], lr=0.0, step=0)
    state = model.optimizer_state()
    gradient = {name: value for name, value in state.items() if name.endswith(".exp_avg")}
    assert float(objective(NumpyOps(), logps, batch)[0]) == pytest.approx(result.loss, rel=TOLERANCE)
    return Numbers(logps, result.loss, gradient)


def supervised_numbers(model: Model, batch: NumpyBatch) -> Numbers:
    """The same of a supervised step."""
    logps = model.logps(batch, batch.loss_mask[:, 1:])
    result = train_step(model, Sft(), [batch], lr=0.0, step=0)
    return Numbers(logps, result.loss, {n: v for n, v in model.optimizer_state().items() if n.endswith(".exp_avg")})


def assert_same(a: Numbers, b: Numbers) -> None:
    assert np.abs(a.logps).max() > 1
    assert np.abs(a.logps - b.logps).max() < TOLERANCE * np.abs(a.logps).max()
    assert a.loss == pytest.approx(b.loss, rel=TOLERANCE)
    assert a.gradient.keys() == b.gradient.keys()
    largest = max(np.abs(value).max() for value in a.gradient.values())
    for name, value in a.gradient.items():
        assert np.abs(value).max() > 0, name
        assert np.abs(value - b.gradient[name]).max() < TOLERANCE * largest, name
