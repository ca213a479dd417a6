"""Training objectives, each written once over `Ops`: log-probabilities in, a summed loss out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from macft.config.settings import Settings
from macft.data.batches import Batch, NumpyBatch
from macft.objectives.ops import Array, Ops
from macft.objectives.preference import Preference, PromptBeta


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


def _sft(_settings: Settings) -> Sft:
    return Sft()


def _dpo(settings: Settings) -> Preference:
    return Preference(
        loss=settings.pref_loss,
        beta=settings.pref_beta,
        label_smoothing=settings.dpo_label_smoothing,
        simpo_gamma=settings.simpo_gamma,
        ftx=settings.pref_ftx,
        ld_alpha=settings.ld_alpha,
    )


def _foodpo(settings: Settings) -> Preference:
    if not settings.asks_prompts:
        return _dpo(settings)
    strength = PromptBeta(
        scale=settings.pref_beta_scale,
        source=settings.foodpo_perplexity,
        low=settings.foodpo_beta_min,
        high=settings.foodpo_beta_max,
    )
    return replace(_dpo(settings), prompt_beta=strength)


# The value of `stage` -> how to make its objective.
OBJECTIVES: dict[str, Callable[[Settings], Objective]] = {"pt": _sft, "sft": _sft, "dpo": _dpo, "foodpo": _foodpo}


def make_objective(settings: Settings) -> Objective:
    """What a run of these settings minimizes."""
    return OBJECTIVES[settings.stage](settings)
