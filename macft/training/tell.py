"""What a person should know before the first step: data, plan, model."""

from __future__ import annotations

import logging

from macft.backends.base import LoadedModel
from macft.config.settings import Settings
from macft.training.alarms import learning_rate_alarm, overlap_alarm
from macft.training.end_token import untrained_end_token_alarm
from macft.training.prepare import Prepared

logger = logging.getLogger("macft")


def tell_data(settings: Settings, prepared: Prepared) -> None:
    """What is trained on, and in how many steps."""
    report, plan = prepared.report, prepared.plan
    share = 100 * report.trained_tokens / max(1, report.tokens)
    what = "pairs" if settings.is_preference else "examples"
    logger.info(
        "data: %d %s, %d tokens, %d of them trained (%.0f %%)%s",
        *(report.kept, what, report.tokens, report.trained_tokens, share),
        f"; {len(prepared.valid)} {what} held out" if prepared.valid else "",
    )
    logger.info(
        "plan: %d steps, %d per epoch, %d %s a step (%d x %d)",
        plan.total_steps,
        plan.steps_per_epoch,
        min(plan.batch_size * plan.accumulation, len(plan.lengths)),
        what,
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
    )
    if settings.is_preference:
        logger.info("loss: %s", _loss_text(settings))
        if settings.lora_dropout > 0:
            logger.warning("lora_dropout %g is not used: preference stages have none", settings.lora_dropout)
    for alarm in (
        learning_rate_alarm(settings),
        overlap_alarm(prepared.train, prepared.valid),
        _end_token_alarm(settings, prepared),
    ):
        if alarm is not None:
            logger.warning(alarm)


def _loss_text(settings: Settings) -> str:
    beta = f"beta {settings.pref_beta:g}"
    if settings.asks_prompts:
        beta = f"beta {settings.pref_beta:g} x {settings.pref_beta_scale:g} x log perplexity of the prompt"
        beta += f" ({settings.foodpo_perplexity})"
    if not settings.has_reference:
        reference = "no reference"
    elif settings.names_reference:
        adapters = f" with {settings.ref_model_adapters}" if settings.ref_model_adapters is not None else ""
        reference = f"reference: {settings.ref_model or settings.model_name_or_path}{adapters}"
    else:
        reference = "reference: the model as it starts"
    supervised = f" + {settings.pref_ftx:g} x the supervised loss" if settings.pref_ftx > 0 else ""
    return f"{settings.stage}, {settings.pref_loss}{supervised}, {beta}, {reference}"


def _end_token_alarm(settings: Settings, prepared: Prepared) -> str | None:
    if not settings.is_preference or settings.finetuning_type == "full":
        return None
    return untrained_end_token_alarm(prepared.template, prepared.tokenizer, prepared.base.path)


def tell_model(settings: Settings, backend_name: str, loaded: LoadedModel) -> None:
    """Which model, where, how much of it is trained, and what fell back."""
    share = 100 * loaded.trainable_parameters / loaded.total_parameters
    logger.info(
        "model: %s on %s (%s, %s), %s: %s of %s parameters trained (%.2f %%)",
        settings.model_name_or_path,
        *(backend_name, loaded.device, loaded.precision, settings.finetuning_type),
        *(f"{loaded.trainable_parameters:,}", f"{loaded.total_parameters:,}", share),
    )
    for note in loaded.notes:
        logger.warning(note)
