"""Settings in; tokenized data, the plan of steps and the model's folder out, before any engine is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from macft.backends.adapters import spec_of_adapter, warn_of_other_base
from macft.backends.base import LoraSpec, ModelSpec, Under
from macft.config.settings import Settings
from macft.data.batches import Plan, row_length
from macft.data.dataset import read_examples, read_pairs, split_examples
from macft.data.formats import Example
from macft.data.template import ChatTemplate, load_template, template_folder
from macft.data.tokenize import TokenizedExample, TokenizeReport, tokenize_examples
from macft.data.tokenize_pairs import PairReport, TokenizedPair, tokenize_pairs
from macft.data.tokenizer import Tokenizer, load_tokenizer
from macft.errors import ConfigError
from macft.weights.adapter import Adapter
from macft.weights.locate import ModelFolder, locate_adapter, locate_model
from macft.weights.mlx_adapter import read_any_adapter
from macft.weights.model_config import read_config

logger = logging.getLogger("macft")

Row = TypeVar("Row")


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs that is not the engine."""

    base: ModelFolder
    start: Adapter | None  # the adapter to go on training
    under: Adapter | None  # the adapter that becomes part of the base
    tokenizer: Tokenizer
    template: ChatTemplate
    train: list[TokenizedExample] | list[TokenizedPair]
    valid: list[TokenizedExample] | list[TokenizedPair]
    report: TokenizeReport | PairReport
    plan: Plan
    data_hash: str


def prepare(settings: Settings) -> Prepared:
    """Find the model, read and tokenize the data, plan the steps."""
    base = locate_model(settings.model_name_or_path)
    start, under = _adapters(settings, base)
    tokenizer = load_tokenizer(base.path)
    loaded = start or under
    source = template_folder(base.path, loaded.folder if loaded is not None else None)
    template = load_template(source, tokenizer.special_map, settings.template)
    read = _tokenized_pairs if settings.is_preference else _tokenized_examples
    train, valid, report = read(settings, tokenizer, template)
    plan = Plan(
        lengths=np.array([row_length(example) for example in train]),
        batch_size=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=_data_seed(settings),
        sort_by_length=settings.group_by_length,
    )
    return Prepared(base, start, under, tokenizer, template, train, valid, report, plan, _data_hash(train, plan))


def _data_seed(settings: Settings) -> int:
    return settings.seed if settings.data_seed is None else settings.data_seed


def _adapters(settings: Settings, base: ModelFolder) -> tuple[Adapter | None, Adapter | None]:
    """(the adapter to go on training, the adapter that becomes part of the base); at most one of them."""
    if settings.adapter_name_or_path is None:
        return None, None
    adapter = read_any_adapter(locate_adapter(settings.adapter_name_or_path), read_config(base.path))
    if not settings.create_new_adapter:
        _check_start(settings, adapter, base)
        return adapter, None
    if adapter.config.use_dora:
        raise ConfigError(
            f"create_new_adapter: {adapter.folder} is a DoRA adapter, which cannot be stacked; remove the key to go on "
            "training it"
        )
    warn_of_other_base(adapter, base)
    return None, adapter


def _tokenized_examples(
    settings: Settings, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[TokenizedExample], list[TokenizedExample], TokenizeReport]:
    def tokenize(examples: list[Example]) -> tuple[list[TokenizedExample], TokenizeReport]:
        return tokenize_examples(
            examples,
            tokenizer,
            template,
            cutoff_len=settings.cutoff_len,
            train_on_prompt=settings.train_on_prompt,
            mask_history=settings.mask_history,
        )

    examples, held_out = _read_and_split(settings, read_examples)
    train, report = tokenize(examples)
    return train, tokenize(held_out)[0] if held_out else [], report


def _tokenized_pairs(
    settings: Settings, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[TokenizedPair], list[TokenizedPair], PairReport]:
    pairs, held_out = _read_and_split(settings, read_pairs)
    train, report = tokenize_pairs(pairs, tokenizer, template, cutoff_len=settings.cutoff_len)
    if not held_out:
        return train, [], report
    return train, tokenize_pairs(held_out, tokenizer, template, cutoff_len=settings.cutoff_len)[0], report


def _read_and_split(
    settings: Settings, read: Callable[[str, str, int | None], list[Row]]
) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows."""
    examples = read(settings.dataset, settings.dataset_dir, settings.max_samples)
    if settings.eval_dataset is not None:
        return examples, read(settings.eval_dataset, settings.dataset_dir, settings.max_samples)
    return split_examples(examples, settings.val_size, _data_seed(settings))


def _data_hash(examples: Sequence[TokenizedExample] | Sequence[TokenizedPair], plan: Plan) -> str:
    """Names the data and its order: a checkpoint's position means something on these alone."""
    digest = hashlib.sha256(f"{plan.batch_size * plan.accumulation} {plan.seed} {plan.sort_by_length}".encode())
    for example in examples:
        rows = (example.chosen, example.rejected) if isinstance(example, TokenizedPair) else (example,)
        for row in rows:
            digest.update(row.tokens.tobytes())
            digest.update(row.loss_mask.tobytes())
    return digest.hexdigest()


def _check_start(settings: Settings, start: Adapter, base: ModelFolder) -> None:
    """A loaded adapter's own shape wins; a key that was set to something else is an error."""
    own = {
        "lora_rank": start.config.rank,
        "lora_alpha": start.config.alpha,
        "use_rslora": start.config.use_rslora,
        "use_dora": start.config.use_dora,
    }
    faults = [
        f"{key} is {getattr(settings, key)}, the adapter has {value}"
        for key, value in own.items()
        if key in settings.model_fields_set and getattr(settings, key) not in (None, value)
    ]
    wanted = {name.strip() for name in settings.lora_target.split(",")}
    if wanted != {"all"} and wanted != set(start.config.target_modules):
        faults.append(f"lora_target is {settings.lora_target}, the adapter has {','.join(start.config.target_modules)}")
    if faults:
        raise ConfigError(f"{start.folder}: {'; '.join(faults)}; remove these keys")
    warn_of_other_base(start, base)


def lora_spec(settings: Settings, start: Adapter | None) -> LoraSpec | None:
    """The adapter to attach; None for full fine-tuning."""
    if settings.finetuning_type == "full":
        return None
    # a reference and a policy that drop different elements are not comparable
    dropout = 0.0 if settings.is_preference else settings.lora_dropout
    if start is not None:
        return spec_of_adapter(start, dropout=dropout)
    return LoraSpec(
        rank=settings.lora_rank,
        alpha=settings.alpha,
        dropout=dropout,
        target=tuple(name.strip() for name in settings.lora_target.split(",")),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def model_spec(settings: Settings, prepared: Prepared) -> ModelSpec:
    """How to load the model for this run."""
    return ModelSpec(
        folder=prepared.base.path,
        lora=lora_spec(settings, prepared.start),
        under=Under(spec_of_adapter(prepared.under), prepared.under.state) if prepared.under is not None else None,
        full=settings.finetuning_type == "full",
        precision=settings.precision,
        quantization_bit=settings.quantization_bit,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=max(row_length(example) for example in [*prepared.train, *prepared.valid]),
        seed=settings.seed,
    )


def resolved(settings: Settings, prepared: Prepared, backend_name: str) -> Settings:
    """The settings with what the run found out filled in: the backend, and a loaded adapter's own shape.

    What was said about this folder alone is left out: run again, the file must not delete this run.
    """
    update: dict[str, object] = {
        "backend": backend_name,
        "lora_alpha": settings.alpha if settings.finetuning_type == "lora" else None,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": False,
    }
    if prepared.start is not None:
        config = prepared.start.config
        update |= {
            "lora_rank": config.rank,
            "lora_alpha": config.alpha,
            "lora_target": ",".join(config.target_modules),
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
        }
    return settings.model_copy(update=update)
