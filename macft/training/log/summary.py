"""Log what a person should know before the first step: data, plan, model."""

from __future__ import annotations

import logging

from macft.backends.base import ModelInfo
from macft.config.settings import Settings
from macft.data.kinds import kind_of_stage
from macft.data.tokenization.packing import PackedRows
from macft.data.tokenization.table import Feedback
from macft.objectives.preference_losses import LOSSES
from macft.text import plural
from macft.training.checks.alarms import balance_alarm, learning_rate_alarm, overlap_alarm
from macft.training.checks.end_token import untrained_end_token_alarm
from macft.training.prepare import Prepared
from macft.weights.model_config import read_config

logger = logging.getLogger("macft")


def log_data(settings: Settings, prepared: Prepared) -> None:
    """Log what is trained on and in how many steps, and warn of what looks wrong."""
    if prepared.from_scratch:
        config = read_config(prepared.base.path)
        logger.info(
            "start: random weights (seed %d), %d layers of width %d, model_type %s",
            *(settings.seed, config["num_hidden_layers"], config["hidden_size"], config["model_type"]),
        )
    kind = kind_of_stage(settings.stage)
    noun = "row" if kind.fills_rows else kind.noun
    packed = prepared.train if isinstance(prepared.train, PackedRows) else None
    data, steps = prepared.plan.describe(prepared.report, kind.noun, noun if packed is None else "row")
    held_out = f"; {plural(len(prepared.valid), noun)} held out" if prepared.valid else ""
    logger.info("data: %s%s", data, held_out)
    if packed is not None:
        logger.info("packing: %s", _packing_text(packed, settings.cutoff_len))
    logger.info("plan: %s", steps)
    if settings.is_preference:
        logger.info("loss: %s", _loss_text(settings))
        if settings.lora_dropout > 0:
            logger.warning("lora_dropout %g is not used: preference stages use no dropout", settings.lora_dropout)
    for alarm in (
        learning_rate_alarm(settings),
        overlap_alarm(prepared.examples, prepared.valid),
        _end_token_alarm(settings, prepared),
        balance_alarm(settings, prepared.train.is_desirable) if isinstance(prepared.train, Feedback) else None,
    ):
        if alarm is not None:
            logger.warning(alarm)


def _packing_text(rows: PackedRows, cutoff_len: int) -> str:
    share = 100 * int(rows.lengths.sum()) / (len(rows) * cutoff_len)
    parts = plural(len(rows.examples), "part")
    return f"{plural(len(rows), 'row')} of up to {cutoff_len} tokens, {share:.0f} % full, hold {parts} side by side"


def _loss_text(settings: Settings) -> str:
    if not settings.has_reference:
        reference = "no reference"
    elif settings.names_reference:
        adapters = f" with {settings.ref_model_adapters}" if settings.ref_model_adapters is not None else ""
        reference = f"reference: {settings.ref_model or settings.model_name_or_path}{adapters}"
    else:
        reference = "reference: the model as it starts"
    supervised = f" + {settings.pref_ftx:g} x the supervised loss" if settings.pref_ftx > 0 else ""
    if settings.stage == "kto":
        weights = f"weights {settings.kto_chosen_weight:g} and {settings.kto_rejected_weight:g}"
        return ", ".join([f"kto{supervised}", _beta_text(settings), weights, reference])
    parts = [settings.stage, f"{settings.pref_loss}{supervised}", _beta_text(settings)]
    if "simpo_gamma" in LOSSES[settings.pref_loss].options:
        parts.append(f"gamma {settings.simpo_gamma:g}")
    if settings.dpo_label_smoothing > 0:
        parts.append(f"label smoothing {settings.dpo_label_smoothing:g}")
    if settings.ld_alpha is not None:
        parts.append(f"ld_alpha {settings.ld_alpha:g}")
    return ", ".join([*parts, reference])


def _beta_text(settings: Settings) -> str:
    if not settings.asks_prompts:
        return f"beta {settings.pref_beta:g}"
    text = f"beta {settings.pref_beta:g} x {settings.pref_beta_scale:g} x log perplexity of the prompt"
    bounds = {"at least": settings.foodpo_beta_min, "at most": settings.foodpo_beta_max}
    limits = [f", {word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    return f"{text} ({settings.foodpo_perplexity}{''.join(limits)})"


def _end_token_alarm(settings: Settings, prepared: Prepared) -> str | None:
    if not settings.is_preference or settings.finetuning_type == "full":
        return None
    assert prepared.template is not None, "answers are rendered with a template"
    return untrained_end_token_alarm(prepared.template, prepared.tokenizer, prepared.base.path)


def log_model(settings: Settings, info: ModelInfo) -> None:
    """Log which model is trained where, how much of it, and warn of fallbacks."""
    share = 100 * info.trainable_parameters / info.total_parameters
    logger.info(
        "model: %s on %s (%s, %s), %s: %s of %s parameters trained (%.2f %%)",
        settings.model_name_or_path,
        *(settings.backend, info.device, info.precision, settings.finetuning_type),
        *(f"{info.trainable_parameters:,}", f"{info.total_parameters:,}", share),
    )
    for note in info.notes:
        logger.warning(note)
