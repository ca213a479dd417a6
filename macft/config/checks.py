"""Find settings that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import NamedTuple

from macft.config.settings import SCHEDULE_OPTIONS, Settings
from macft.objectives.preference_losses import LOSSES, losses_where, losses_with


class Check(NamedTuple):
    """A possible contradiction: the keys involved, whether it is present, and the line that reports it."""

    keys: str
    is_wrong: object
    text: str


def contradictions(settings: Settings, invalid: Set[str] = frozenset()) -> list[str]:
    """One line per contradiction; checks of a key in `invalid`, whose value is not known, are left out."""
    checks = (
        *_run_checks(settings),
        *_schedule_checks(settings),
        *_start_checks(settings),
        *_method_checks(settings),
        *_data_checks(settings),
        *_stream_checks(settings),
        *_preference_checks(settings),
        *_evaluation_checks(settings),
    )
    found = (check for check in checks if check.is_wrong)
    return [check.text for check in found if invalid.isdisjoint(check.keys.split())]


_EXCLUSIVE = (
    ("bf16", "fp16"),
    ("overwrite_output_dir", "resume_from_checkpoint"),
    ("create_new_adapter", "use_dora"),
    ("create_new_adapter", "quantization_bit"),
    ("train_on_prompt", "mask_history"),
    ("eval_dataset", "val_size"),
)


def _run_checks(settings: Settings) -> Iterator[Check]:
    for one, other in _EXCLUSIVE:
        are_set = getattr(settings, one) and getattr(settings, other)
        yield Check(f"{one} {other}", are_set, f"{one} and {other} are both set; keep one")
    yield Check(
        "max_steps",
        settings.max_steps == 0 or settings.max_steps < -1,
        f"max_steps {settings.max_steps}: expected -1 or above 0",
    )


def _schedule_checks(settings: Settings) -> Iterator[Check]:
    kind, options = settings.lr_scheduler_type, settings.lr_scheduler_kwargs
    yield Check(
        "lr_scheduler_type warmup_ratio warmup_steps",
        kind == "constant" and (settings.warmup_ratio > 0 or settings.warmup_steps > 0),
        "lr_scheduler_type constant has no warmup; write constant_with_warmup, or remove warmup_ratio and warmup_steps",
    )
    allowed = SCHEDULE_OPTIONS.get(kind, frozenset())
    unknown, known = ", ".join(sorted(set(options) - allowed)), ", ".join(sorted(allowed)) or "none"
    yield Check(
        "lr_scheduler_type lr_scheduler_kwargs",
        unknown,
        f"lr_scheduler_kwargs: lr_scheduler_type {kind} has no {unknown}; it has {known}",
    )
    yield Check(
        "lr_scheduler_type lr_scheduler_kwargs",
        kind == "cosine_with_min_lr" and ("min_lr" in options) == ("min_lr_rate" in options),
        "lr_scheduler_type cosine_with_min_lr needs either min_lr or min_lr_rate in lr_scheduler_kwargs",
    )
    for name in ("num_cycles", "timescale", "power", "min_lr", "min_lr_rate", "lr_end"):
        may_be_zero = name in ("min_lr", "min_lr_rate", "lr_end")
        value = options.get(name, 1.0)
        yield Check(
            "lr_scheduler_kwargs",
            value < 0 or (value == 0 and not may_be_zero),
            f"lr_scheduler_kwargs: {name} {value:g}, expected {'0 or above' if may_be_zero else 'above 0'}",
        )
    end = options.get("lr_end", 1e-7) if kind == "polynomial" else options.get("min_lr", 0.0)
    yield Check(
        "lr_scheduler_type lr_scheduler_kwargs learning_rate",
        end >= settings.learning_rate,
        f"learning_rate {settings.learning_rate:g} cannot fall to {end:g}; set a smaller lr_end or min_lr",
    )


def _start_checks(settings: Settings) -> Iterator[Check]:
    yield Check(
        "model_overrides train_from_scratch",
        settings.model_overrides and not settings.train_from_scratch,
        "model_overrides needs train_from_scratch: weights that are there fit their own config.json",
    )
    yield Check(
        "train_from_scratch finetuning_type",
        settings.train_from_scratch and settings.finetuning_type == "lora",
        "train_from_scratch needs finetuning_type full: an adapter on random weights is of no use",
    )
    yield Check(
        "train_from_scratch stage pref_loss",
        settings.train_from_scratch and settings.has_reference,
        f"train_from_scratch has no model to be the reference of stage {settings.stage}; start with stage pt",
    )


def _method_checks(settings: Settings) -> Iterator[Check]:
    is_full = settings.finetuning_type == "full"
    yield Check(
        "finetuning_type quantization_bit",
        is_full and settings.quantization_bit is not None,
        "finetuning_type full cannot train a quantized base; remove quantization_bit",
    )
    yield Check(
        "finetuning_type adapter_name_or_path",
        is_full and settings.adapter_name_or_path is not None,
        "adapter_name_or_path needs finetuning_type lora",
    )
    yield Check(
        "finetuning_type use_dora use_rslora",
        is_full and (settings.use_dora or settings.use_rslora),
        "use_dora and use_rslora need finetuning_type lora",
    )
    is_new = settings.create_new_adapter
    yield Check(
        "create_new_adapter adapter_name_or_path finetuning_type",
        is_new and settings.adapter_name_or_path is None and not is_full,
        "create_new_adapter needs adapter_name_or_path, the adapter to build on",
    )
    yield Check(
        "create_new_adapter finetuning_type", is_new and is_full, "create_new_adapter needs finetuning_type lora"
    )
    whole = {"pt": "trains on every token", "kto": "trains on the last answer only"}.get(
        settings.stage, "trains on the two answers only"
    )
    for key, is_set in (("train_on_prompt", settings.train_on_prompt), ("mask_history", settings.mask_history)):
        yield Check(
            f"stage {key}",
            settings.stage != "sft" and is_set,
            f"{key} is for stage sft; stage {settings.stage} {whole}: remove it",
        )


def _data_checks(settings: Settings) -> Iterator[Check]:
    compares = "compares the two answers of a pair" if settings.has_pairs else "scores each answer by itself"
    yield Check(
        "stage packing",
        settings.is_preference and settings.packing,
        f"packing is for stages pt and sft; stage {settings.stage} {compares}: remove it",
    )
    probabilities = settings.interleave_probs
    yield Check(
        "interleave_probs mix_strategy",
        probabilities is not None and settings.mix_strategy == "concat",
        "interleave_probs needs mix_strategy interleave_under or interleave_over",
    )
    probabilities = probabilities or []
    yield Check(
        "interleave_probs",
        settings.interleave_probs is not None
        and (min(probabilities, default=-1) < 0 or abs(sum(probabilities) - 1) > 1e-6),
        f"interleave_probs {', '.join(f'{p:g}' for p in probabilities)}: expected shares that add up to 1",
    )
    for key, names in (("dataset", settings.dataset), ("eval_dataset", settings.eval_dataset)):
        count = len((names or "").split(","))
        yield Check(
            f"interleave_probs mix_strategy {key}",
            settings.mix_strategy != "concat" and probabilities and names is not None and count != len(probabilities),
            f"interleave_probs: found {len(probabilities)}, expected {count}, one for each data set of {key}",
        )


def _stream_checks(settings: Settings) -> Iterator[Check]:
    if not settings.streaming:
        return
    yield Check(
        "streaming stage",
        settings.is_preference,
        f"streaming is for stages pt and sft; stage {settings.stage} looks at all rows before the first step",
    )
    yield Check("streaming max_steps", settings.max_steps <= 0, "streaming has no known end; set max_steps")
    yield Check(
        "streaming max_samples",
        settings.max_samples is not None,
        "streaming and max_samples exclude each other; set only max_steps",
    )
    yield Check(
        "streaming val_size",
        0 < settings.val_size < 1,
        f"val_size {settings.val_size:g} is a share, which a stream does not have; write a count",
    )
    for key, value in (("save_strategy", settings.save_strategy), ("eval_strategy", settings.eval_strategy)):
        yield Check(f"streaming {key}", value == "epoch", f"streaming has no epochs; set {key} to steps")


def _preference_checks(settings: Settings) -> Iterator[Check]:
    loss, is_foodpo = settings.pref_loss, settings.stage == "foodpo"
    row = LOSSES[loss]
    for key in ("dpo_label_smoothing", "simpo_gamma"):
        yield Check(
            f"stage pref_loss {key}",
            settings.has_pairs and _is_changed(settings, key) and key not in row.options,
            f"{key} is for pref_loss {losses_with(key)}, found {loss}; remove it",
        )
    yield Check(
        "stage pref_loss ld_alpha",
        settings.has_pairs and settings.ld_alpha is not None and row.of_averages,
        f"ld_alpha weighs answers of unlike length, and pref_loss {loss} takes averages; remove it",
    )
    for key, is_set in (
        ("ref_model", settings.ref_model is not None),
        ("ref_model_adapters", settings.ref_model_adapters is not None),
    ):
        whose = f"pref_loss {loss}" if settings.has_pairs else f"stage {settings.stage}"
        yield Check(
            f"stage pref_loss {key}",
            is_set and not settings.has_reference,
            f"{whose} has no reference; remove {key}",
        )
    yield Check(
        "stage pref_loss",
        is_foodpo and not row.in_foodpo,
        f"stage foodpo combines with pref_loss {losses_where(lambda other: other.in_foodpo)}, found {loss}",
    )
    # at a scale of 0 or below no perplexity is asked for
    asks_reference = settings.foodpo_perplexity == "reference" and settings.pref_beta_scale > 0
    yield Check(
        "stage pref_loss foodpo_perplexity pref_beta_scale",
        is_foodpo and not row.needs_reference and asks_reference,
        f"foodpo_perplexity is reference and pref_loss {loss} has none; set policy or policy_with_gradient",
    )
    yield Check(
        "stage kto_chosen_weight kto_rejected_weight",
        settings.stage == "kto" and settings.kto_chosen_weight == settings.kto_rejected_weight == 0,
        "kto_chosen_weight and kto_rejected_weight are both 0, so nothing is trained; set one of them above 0",
    )
    low, high = settings.foodpo_beta_min, settings.foodpo_beta_max
    yield Check(
        "foodpo_beta_min foodpo_beta_max",
        low is not None and high is not None and low > high,
        f"foodpo_beta_min {low} is above foodpo_beta_max {high}",
    )


def _evaluation_checks(settings: Settings) -> Iterator[Check]:
    has_data = bool(settings.eval_dataset or settings.val_size)
    evaluates = settings.when_to_evaluate != "no"
    yield Check(
        "eval_strategy eval_dataset val_size",
        settings.eval_strategy in ("steps", "epoch") and not has_data,
        f"eval_strategy {settings.eval_strategy} needs eval_dataset or val_size",
    )
    yield Check(
        "eval_strategy eval_dataset",
        settings.eval_strategy == "no" and settings.eval_dataset is not None,
        "eval_dataset is set but eval_strategy is no; remove one",
    )
    yield Check(
        "eval_steps eval_strategy",
        settings.eval_steps is not None and settings.eval_strategy != "steps",
        "eval_steps needs eval_strategy steps",
    )
    missing = "eval_strategy to steps or epoch" if has_data else "eval_dataset or val_size"
    for key, is_set in (
        ("load_best_model_at_end", settings.load_best_model_at_end),
        ("metric_for_best_model", settings.metric_for_best_model is not None),
        ("greater_is_better", settings.greater_is_better is not None),
        ("early_stopping_steps", settings.early_stopping_steps is not None),
    ):
        yield Check(
            f"{key} eval_strategy eval_dataset val_size",
            is_set and not evaluates,
            f"{key} needs an evaluation; set {missing}",
        )
    if evaluates and settings.load_best_model_at_end:
        yield from _best_model_checks(settings)


def _best_model_checks(settings: Settings) -> Iterator[Check]:
    """A checkpoint can be the best only if it was evaluated."""
    eval_strategy, eval_steps = settings.when_to_evaluate, settings.steps_per_evaluation
    keys = "load_best_model_at_end save_strategy eval_strategy eval_dataset val_size"
    yield Check(
        keys,
        settings.save_strategy != eval_strategy,
        f"load_best_model_at_end needs save_strategy equal to eval_strategy, found {settings.save_strategy} "
        f"and {eval_strategy}{'' if settings.eval_strategy else ' (its default)'}",
    )
    yield Check(
        f"{keys} save_steps eval_steps logging_steps",
        settings.save_strategy == eval_strategy == "steps" and settings.save_steps % eval_steps != 0,
        f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, found {settings.save_steps} "
        f"and {eval_steps}{'' if settings.eval_steps else ' (logging_steps)'}",
    )


_LORA_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")
_FOODPO_KEYS = ("pref_beta_scale", "foodpo_perplexity", "foodpo_beta_min", "foodpo_beta_max")
_PREFERENCE_KEYS = ("pref_beta", "pref_ftx")
_PAIR_KEYS = ("pref_loss", "dpo_label_smoothing", "simpo_gamma", "ld_alpha")
_KTO_KEYS = ("kto_chosen_weight", "kto_rejected_weight")
_CHAT_KEYS = ("template", "default_system", "enable_thinking")


def without_effect(settings: Settings) -> list[str]:
    """Keys that are set but that this run does not use."""
    is_plain = settings.stage == "foodpo" and settings.pref_beta_scale <= 0
    is_all_streamed = settings.streaming and settings.eval_dataset is None
    seeks_best = settings.load_best_model_at_end or settings.early_stopping_steps is not None
    owners = [
        ("finetuning_type is full", settings.finetuning_type == "full", _LORA_KEYS),
        (f"save_strategy is {settings.save_strategy}", settings.save_strategy != "steps", ("save_steps",)),
        (f"stage is {settings.stage}", not settings.is_preference, _PREFERENCE_KEYS),
        (f"stage is {settings.stage}", not settings.has_pairs, _PAIR_KEYS),
        (f"stage is {settings.stage}", settings.stage != "kto", _KTO_KEYS),
        ("stage is pt", settings.stage == "pt", _CHAT_KEYS),
        ("streaming is off", not settings.streaming, ("buffer_size",)),
        ("disable_shuffling is set", settings.streaming and settings.disable_shuffling, ("buffer_size",)),
        ("streaming caches nothing", is_all_streamed, ("overwrite_cache",)),
        ("streaming tokenizes in one process", is_all_streamed, ("preprocessing_num_workers",)),
        ("dataset is one", "," not in settings.dataset, ("mix_strategy",)),
        (f"stage is {settings.stage}", settings.stage != "foodpo", _FOODPO_KEYS),
        (f"pref_beta_scale is {settings.pref_beta_scale:g}", is_plain, _FOODPO_KEYS[1:]),
        (
            "neither load_best_model_at_end nor early_stopping_steps is set",
            not seeks_best,
            ("metric_for_best_model", "greater_is_better"),
        ),
    ]
    return [f"{key} ({why})" for why, applies, keys in owners for key in keys if applies and _is_changed(settings, key)]


# passes over the same rows from which a model is more likely to repeat them than to learn from them
_MANY_EPOCHS = 10


def doubts(settings: Settings) -> list[str]:
    """Values that are allowed but probably not meant."""
    found = []
    has_evaluation = settings.eval_dataset is not None or settings.val_size > 0
    if settings.num_train_epochs >= _MANY_EPOCHS and settings.max_steps <= 0 and not has_evaluation:
        found.append(
            f"{settings.num_train_epochs:g} epochs without evaluation data: nothing shows when the rows are learned by "
            "heart; set val_size (0.1) or eval_dataset"
        )
    return found + _preference_doubts(settings)


def _preference_doubts(settings: Settings) -> list[str]:
    if settings.stage == "kto" and settings.per_device_train_batch_size == 1:
        return [
            "per_device_train_batch_size 1: the KL term of KTO then rests on one answer; set 4 or more, and lower "
            "gradient_accumulation_steps"
        ]
    if not settings.has_pairs:
        return []
    if settings.pref_loss == "simpo" and settings.pref_beta < 1:
        return [
            f"pref_beta {settings.pref_beta:g} is small for pref_loss simpo: simpo_gamma {settings.simpo_gamma:g} "
            "outweighs the answers; the paper takes a pref_beta of 2 to 10"
        ]
    if settings.pref_loss == "robust" and settings.dpo_label_smoothing == 0:
        return ["pref_loss robust with dpo_label_smoothing 0 is sigmoid; set dpo_label_smoothing above 0"]
    return []


def _is_changed(settings: Settings, key: str) -> bool:
    # Not model_fields_set: the resolved configuration, which a run writes down, sets every key.
    return bool(getattr(settings, key) != Settings.model_fields[key].default)
