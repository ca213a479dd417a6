"""The learning rate of every step, a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warmup from 0, then a course down; the same values as transformers' schedulers."""

    kind: str  # linear, cosine, constant, constant_with_warmup
    peak: float
    total_steps: int
    warmup_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of `step`, counted from 0: with a warmup, step 0 has rate 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind.startswith("constant"):
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (1 - progress)


def warmup_steps(count: int, ratio: float, total_steps: int) -> int:
    """`count` if it is above 0, else the share of all steps, rounded up."""
    return count if count > 0 else math.ceil(total_steps * ratio)
