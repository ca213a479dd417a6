"""Compute mean loss and metrics on held-out examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from macft.backends.base import Scores
from macft.config.settings import Settings
from macft.data.batches import TrainingRow, collate
from macft.data.plan import StepPlan
from macft.data.tokenization.table import FeedbackReference, Reference, TokenizedFeedback, TokenizedPair
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.objectives.ops import NumpyOps


def evaluate(model: Scores, objective: Objective, batches: Iterable[NumpyBatch]) -> dict[str, float]:
    """`eval_loss` and the objective's metrics under `eval_` names: means over all batches, weighted as in training."""
    ops = NumpyOps()
    sums: dict[str, float] = {}
    weight = 0.0
    for batch in batches:
        batch = objective.complete(batch, model.logps)
        loss, metrics = objective(ops, model.logps(batch, objective.positions(batch)), batch)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        weight += objective.weight(batch)
    means = {name: total / weight for name, total in sums.items()}
    return {"eval_loss": means.pop("loss")} | {f"eval_{name}": v for name, v in objective.report(means).items()}


def will_evaluate(settings: Settings, plan: StepPlan) -> bool:
    """Whether a run with held-out data ever evaluates on it."""
    each, every = settings.when_to_evaluate, settings.steps_per_evaluation
    return any(plan.is_due(each, every, step) for step in range(1, plan.total_steps + 1))


def metric_names(objective: Objective, example: TrainingRow) -> set[str]:
    """The names that `evaluate` will return, found with made-up log-probabilities of one example."""
    rows = [example]
    if isinstance(example, TokenizedPair):
        rows = [replace(example, reference=Reference(-1.0, -1.0, 1.0))]
    if isinstance(example, TokenizedFeedback):
        # some metrics cover only desirable answers, others only the rest
        made_up = replace(example, reference=FeedbackReference(-1.0, -1.0))
        rows = [replace(made_up, is_desirable=is_desirable) for is_desirable in (True, False)]
    batch = objective.complete(collate(rows), _made_up)
    _, metrics = objective(NumpyOps(), _made_up(batch, objective.positions(batch)), batch)
    return {f"eval_{name}" for name in ("loss", *objective.report({name: 1.0 for name in metrics}))}


def _made_up(_batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
    return np.full(positions.shape, -1.0, np.float32)
