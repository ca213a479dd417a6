"""Define what an objective is, and the simplest one: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from macft.objectives.batch import Batch, NumpyBatch
from macft.objectives.ops import Array, Ops

# (batch, bool [rows, T-1]) -> float32 [rows, T-1]: the policy's log-probabilities at those positions, 0 elsewhere
Score = Callable[[NumpyBatch, np.ndarray], np.ndarray]


class Objective(Protocol):
    """A loss, and what a training step needs to know about it."""

    def complete(self, batch: NumpyBatch, _score: Score) -> NumpyBatch:
        """Add what the loss needs from the policy as constants; the other methods take the completed batch."""
        return batch

    def weight(self, batch: NumpyBatch) -> float:
        """The divisor of the summed loss, known before any forward pass."""

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """bool [rows, T-1]: which next tokens need a log-probability."""

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Summed loss and summed metrics; logps is float32 [rows, T-1], 0 outside `positions`."""

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """The figures to report for a step or an evaluation with these mean metrics."""
        return metrics


@dataclass(frozen=True)
class Sft(Objective):
    """Cross-entropy of the trained tokens."""

    def weight(self, batch: NumpyBatch) -> float:
        """Trained tokens in the batch."""
        return float(self.positions(batch).sum())

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """The trained tokens."""
        return batch.loss_mask[:, 1:]

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """-sum over trained t of log p(token_t | tokens before it)."""
        return -ops.sum(logps * batch.loss_mask[:, 1:]), {}
