"""Choose the objective of a run from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from macft.config.settings import Settings
from macft.objectives.kto import Kto
from macft.objectives.losses import Objective, Sft
from macft.objectives.preference import Preference, PromptBeta


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


def _kto(settings: Settings) -> Kto:
    return Kto(
        beta=settings.pref_beta,
        chosen_weight=settings.kto_chosen_weight,
        rejected_weight=settings.kto_rejected_weight,
        ftx=settings.pref_ftx,
    )


# The value of `stage` -> how to make its objective.
OBJECTIVES: dict[str, Callable[[Settings], Objective]] = {
    "pt": _sft,
    "sft": _sft,
    "dpo": _dpo,
    "foodpo": _foodpo,
    "kto": _kto,
}


def make_objective(settings: Settings) -> Objective:
    """What a run with these settings minimizes."""
    return OBJECTIVES[settings.stage](settings)
