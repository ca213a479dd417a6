"""The metrics of one evaluation after another in; which one was the best, and when to stop, out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from macft.errors import ConfigError


@dataclass(frozen=True)
class Goal:
    """What makes an evaluation better: `metric` (with its eval_ prefix) greater, or smaller.

    `patience` is how many evaluations in a row may fail to improve it; None: any number.
    """

    metric: str
    greater_is_better: bool
    patience: int | None = None


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, as a checkpoint keeps it: all fields are JSON; None before the first."""

    step: int | None = None
    value: float | None = None
    evaluations_since: int = 0  # that have not improved it
    results: Mapping[str, float] = field(default_factory=dict)  # all figures of that evaluation


@dataclass(frozen=True)
class Verdict:
    """What one evaluation changes."""

    best: Best
    is_best: bool
    is_enough: bool  # patience has run out: stop


def goal(metric: str | None, greater_is_better: bool | None, patience: int | None) -> Goal:
    """The goal as the settings say it: by default eval_loss, and greater is better unless the name ends in loss."""
    name = metric or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    return Goal(name, not name.endswith("loss") if greater_is_better is None else greater_is_better, patience)


def check_metric(goal: Goal, names: Iterable[str]) -> None:
    """Raise ConfigError, naming what there is, unless the goal is among the names of an evaluation's metrics."""
    known = sorted(names)
    if goal.metric not in known:
        raise ConfigError(
            f"metric_for_best_model: found {goal.metric}, expected one of those that this run's evaluation has: "
            f"{', '.join(known)}"
        )


def judge(goal: Goal, best: Best, step: int, values: Mapping[str, float]) -> Verdict:
    """Compare the evaluation after `step` steps with the best before; an equal value, or none (nan), is no better.

    `values` are its figures, the goal's among them.

    Raises ConfigError as `check_metric`.
    """
    check_metric(goal, values)
    value = float(values[goal.metric])
    if _is_better(goal, value, best.value):
        return Verdict(Best(step, value, results=dict(values)), is_best=True, is_enough=False)
    since = best.evaluations_since + 1
    is_enough = goal.patience is not None and since >= goal.patience
    return Verdict(replace(best, evaluations_since=since), is_best=False, is_enough=is_enough)


def _is_better(goal: Goal, value: float, before: float | None) -> bool:
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value > before if goal.greater_is_better else value < before
