"""Compute mean loss and metrics on held-out examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from macft.backends.base import Scores
from macft.config.settings import Settings
from macft.data.batches import collate
from macft.data.plan import StepPlan
from macft.data.tokenization.table import Reference, TokenizedExample, TokenizedPair
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


def metric_names(objective: Objective, example: TokenizedExample | TokenizedPair) -> set[str]:
    """The names that `evaluate` will return, found with made-up log-probabilities of one example."""
    if isinstance(example, TokenizedPair):
        batch = collate([replace(example, reference=Reference(-1.0, -1.0, 1.0))])
    else:
        batch = collate([example])
    rows, length = batch.tokens.shape
    _, metrics = objective(NumpyOps(), np.full((rows, length - 1), -1.0, np.float32), batch)
    return {f"eval_{name}" for name in ("loss", *metrics)}
