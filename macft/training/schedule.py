"""Compute the learning rate of every step, as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """Warmup from 0, then a decay; the same values as transformers' schedulers with the same options."""

    kind: str  # a value of `lr_scheduler_type`
    peak: float
    total_steps: int
    warmup_steps: int
    options: Mapping[str, float] = field(default_factory=dict)  # of `lr_scheduler_kwargs`

    def lr(self, step: int) -> float:
        """Learning rate of `step`, counted from 0: with a warmup, step 0 has rate 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return DECAYS[self.kind](self, step)

    def progress(self, step: int) -> float:
        """The share of the way from the end of the warmup to the last step."""
        return (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)


def warmup_steps(count: int, ratio: float, total_steps: int) -> int:
    """`count` if it is above 0, else the share of all steps, rounded up."""
    return count if count > 0 else math.ceil(total_steps * ratio)


def _constant(schedule: Schedule, step: int) -> float:  # noqa: ARG001
    return schedule.peak


def _linear(schedule: Schedule, step: int) -> float:
    return schedule.peak * (1 - schedule.progress(step))


def _cosine(schedule: Schedule, step: int) -> float:
    cycles = schedule.options.get("num_cycles", 0.5)
    return schedule.peak * 0.5 * (1 + math.cos(2 * math.pi * cycles * schedule.progress(step)))


def _cosine_with_restarts(schedule: Schedule, step: int) -> float:
    progress = schedule.progress(step)
    if progress >= 1:
        return 0.0
    cycles = schedule.options.get("num_cycles", 1)
    return schedule.peak * 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1)))


def _cosine_with_min_lr(schedule: Schedule, step: int) -> float:
    options = schedule.options
    least = options["min_lr"] if "min_lr" in options else options["min_lr_rate"] * schedule.peak
    return least + (schedule.peak - least) * _cosine(schedule, step) / schedule.peak


def _polynomial(schedule: Schedule, step: int) -> float:
    end, power = schedule.options.get("lr_end", 1e-7), schedule.options.get("power", 1.0)
    return end + (schedule.peak - end) * math.pow(1 - schedule.progress(step), power)


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    timescale = schedule.options.get("timescale") or schedule.warmup_steps or 10_000
    return schedule.peak / math.sqrt((step + timescale - schedule.warmup_steps) / timescale)


DECAYS: Mapping[str, Callable[[Schedule, int], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
