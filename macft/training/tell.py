"""What a person should know before the first step: data, plan, model."""

from __future__ import annotations

import logging

from macft.backends.base import LoadedModel
from macft.config.settings import Settings
from macft.training.prepare import Prepared

logger = logging.getLogger("macft")


def tell_data(settings: Settings, prepared: Prepared) -> None:
    """What is trained on, and in how many steps."""
    report, plan = prepared.report, prepared.plan
    share = 100 * report.trained_tokens / max(1, report.tokens)
    logger.info(
        "data: %d examples, %d tokens, %d of them trained (%.0f %%)%s",
        *(report.kept, report.tokens, report.trained_tokens, share),
        f"; {len(prepared.valid)} examples held out" if prepared.valid else "",
    )
    logger.info(
        "plan: %d steps, %d per epoch, %d examples a step (%d x %d)",
        plan.total_steps,
        plan.steps_per_epoch,
        min(plan.batch_size * plan.accumulation, len(plan.lengths)),
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
    )


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
