"""Load models and take steps with an engine directly, without a training run."""

from __future__ import annotations

from collections.abc import Sequence

from macft.backends import load_model as load_model_of
from macft.backends.base import Model, ModelSpec, OptimizerSpec, StepResult
from macft.data.batches import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ONE_PROCESS


def load_model(engine: str, spec: ModelSpec, optimizer: OptimizerSpec | None = None) -> Model:
    """A model in a run of one process."""
    return load_model_of(engine, spec, optimizer, ONE_PROCESS)


def train_step(
    model: Model, objective: Objective, batches: Sequence[NumpyBatch], *, lr: float, step: int
) -> StepResult:
    """One step, its loss divided by the weight of all its batches."""
    weight = sum(objective.weight(batch) for batch in batches)
    return model.train_step(objective, batches, weight=weight, lr=lr, step=step)
