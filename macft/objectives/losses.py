"""Define what an objective is, and the simplest one: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from macft.objectives.batch import Batch, NumpyBatch
from macft.objectives.ops import Array, Ops


class Objective(Protocol):
    """What a training step needs to know about a loss."""

    def weight(self, batch: NumpyBatch) -> float:
        """What the summed loss is divided by, known before any forward pass."""

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        """bool [rows, T-1]: which next tokens need a log-probability."""

    def __call__(self, ops: Ops, logps: Array, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Summed loss and summed metrics; logps is float32 [rows, T-1], 0 outside `positions`."""


@dataclass(frozen=True)
class Sft:
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
