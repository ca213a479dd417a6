"""Choose the objective of a run from its settings."""

from __future__ import annotations

from macft.config.settings import Settings
from macft.objectives.kto import Kto
from macft.objectives.losses import Objective, Sft
from macft.objectives.preference import Preference, PromptBeta


def make_objective(settings: Settings) -> Objective:
    """What a run with these settings minimizes."""
    if settings.stage == "kto":
        return Kto(
            beta=settings.pref_beta,
            chosen_weight=settings.kto_chosen_weight,
            rejected_weight=settings.kto_rejected_weight,
            ftx=settings.pref_ftx,
        )
    if not settings.is_preference:
        return Sft()
    return Preference(
        loss=settings.pref_loss,
        beta=settings.pref_beta,
        label_smoothing=settings.dpo_label_smoothing,
        simpo_gamma=settings.simpo_gamma,
        ftx=settings.pref_ftx,
        ld_alpha=settings.ld_alpha,
        prompt_beta=_prompt_beta(settings) if settings.asks_prompts else None,
    )


def _prompt_beta(settings: Settings) -> PromptBeta:
    return PromptBeta(
        scale=settings.pref_beta_scale,
        source=settings.foodpo_perplexity,
        low=settings.foodpo_beta_min,
        high=settings.foodpo_beta_max,
    )
