"""Decide which evaluation is the best so far, and when to stop training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from macft.config.settings import Settings
from macft.errors import ConfigError


@dataclass(frozen=True)
class MetricGoal:
    """What makes an evaluation better: `metric` (with its eval_ prefix) greater, or smaller.

    `patience` is how many evaluations in a row may fail to improve it; None: any number.
    """

    metric: str
    greater_is_better: bool
    patience: int | None = None

    def is_out_of_patience(self, best: BestEvaluation) -> bool:
        """Whether training stops, as too many evaluations have not improved the best."""
        return self.patience is not None and best.evaluations_since >= self.patience


@dataclass(frozen=True)
class BestEvaluation:
    """The best evaluation so far, as a checkpoint keeps it: all fields are JSON; None before the first."""

    step: int | None = None
    value: float | None = None
    evaluations_since: int = 0  # that have not improved it
    results: Mapping[str, float] = field(default_factory=dict)  # all figures of that evaluation


def metric_goal(settings: Settings) -> MetricGoal:
    """The goal that settings name: by default eval_loss; greater is better unless the name ends in loss."""
    name = settings.metric_for_best_model or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    greater = settings.greater_is_better
    return MetricGoal(name, not name.endswith("loss") if greater is None else greater, settings.early_stopping_steps)


def check_metric(goal: MetricGoal, names: Iterable[str]) -> None:
    """Raise ConfigError, naming the known ones, unless the goal is among the names of an evaluation's metrics."""
    known = sorted(names)
    if goal.metric not in known:
        raise ConfigError(
            f"metric_for_best_model: found {goal.metric}, expected one of the metrics of this run's evaluation: "
            f"{', '.join(known)}"
        )


def judge(goal: MetricGoal, best: BestEvaluation, step: int, values: Mapping[str, float]) -> BestEvaluation:
    """The better of the best evaluation before and the one after `step` steps; an equal value, or nan, is not better.

    `values` are the new one's figures. Raises ConfigError, as `check_metric` does, if the goal's is not among them.
    """
    check_metric(goal, values)
    value = float(values[goal.metric])
    if _is_better(goal, value, best.value):
        return BestEvaluation(step, value, results=dict(values))
    return replace(best, evaluations_since=best.evaluations_since + 1)


def _is_better(goal: MetricGoal, value: float, before: float | None) -> bool:
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value > before if goal.greater_is_better else value < before
