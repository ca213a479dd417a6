"""Find the model, tokenize the data and plan the steps of a run, before any engine is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from macft.backends.adapters import check_base, spec_of_adapter
from macft.backends.base import LoraSpec, MergedAdapter, ModelSpec
from macft.config.settings import Settings
from macft.data.batches import lengths_of
from macft.data.plan import EpochPlan, StepPlan, StreamPlan
from macft.data.templates.chat_template import ChatTemplate, template_folder
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.packing import PackedRows
from macft.data.tokenization.report import TokenizeReport
from macft.data.tokenization.table import Rows
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import ConfigError
from macft.models.locate import resolve_adapter, resolve_model
from macft.objectives.batch import NumpyBatch
from macft.process_group import ONE_PROCESS, ProcessGroup
from macft.training.checks.machine import check_machine
from macft.training.data import encoding_of, read_data, read_stream, seed
from macft.training.model import resolve_start, resolve_template
from macft.training.model_files import shape_keys
from macft.weights.adapters.fitting import read_on
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder
from macft.weights.model_config import embedding_rows, read_config

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class NamedReference:
    """The reference model that the settings name."""

    base: ModelFolder
    adapter: Adapter | None


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs besides the engine."""

    group: ProcessGroup
    base: ModelFolder
    from_scratch: bool  # `base` has no weights
    start: Adapter | None  # the adapter to train further
    merged_adapter: Adapter | None  # the adapter that becomes part of the base
    reference: NamedReference | None  # None: the policy at its start, or no reference
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has none, and texts need none
    train: Rows | PackedRows  # of a stream: nothing, its plan holds it
    valid: Rows
    report: TokenizeReport
    plan: StepPlan
    max_length: int  # tokens of the longest example; in a stream, of the longest possible one
    row_length: int  # the same of the longest row, which packing makes of several examples
    data_hash: str

    @property
    def examples(self) -> Rows:
        """The training examples one by one, whether or not they are packed."""
        return self.train.examples if isinstance(self.train, PackedRows) else self.train

    def batches(self, after: int, say: Callable[[str], None]) -> Iterator[list[NumpyBatch]]:
        """The micro-batches of every step from the one after `after` on, as `StepPlan.batches`."""
        return self.plan.batches(self.train, after, say)


def prepare(settings: Settings, group: ProcessGroup = ONE_PROCESS) -> Prepared:
    """Find the model, check that this machine can train it, read and tokenize the data, plan the steps."""
    found = resolve_start(settings)
    base, tokenizer = found.base, found.tokenizer
    start, merged_adapter = _adapters(settings, base)
    reference = _named_reference(settings, base, tokenizer)
    if not found.from_scratch:
        others = [] if reference is None else [reference.base]
        check_machine(settings.backend, [base, *others], settings.quantization_bit)
    loaded = start or merged_adapter
    source = template_folder(found.tokenizer_folder, loaded.folder if loaded is not None else None)
    template = resolve_template(settings, source, tokenizer)
    models = [base, *([reference.base] if reference is not None else [])]
    known = [rows for model in models if (rows := embedding_rows(read_config(model.path))) is not None]
    encoding = encoding_of(settings, tokenizer, template, min(known, default=None))
    train, valid, report, plan, data_hash = _data(settings, encoding)
    examples = train.examples if isinstance(train, PackedRows) else train
    longest, longest_row = (
        max((int(lengths_of(rows).max()) for rows in (trained, valid) if len(rows)), default=0)
        for trained in (examples, train)
    )
    return Prepared(
        group=group,
        base=base,
        from_scratch=found.from_scratch,
        start=start,
        merged_adapter=merged_adapter,
        reference=reference,
        tokenizer=tokenizer,
        template=template,
        train=train,
        valid=valid,
        report=report,
        plan=plan,
        max_length=settings.cutoff_len if settings.streaming else longest,
        row_length=settings.cutoff_len if settings.streaming else longest_row,
        data_hash=data_hash,
    )


def _data(settings: Settings, encoding: Encoding) -> tuple[Rows | PackedRows, Rows, TokenizeReport, StepPlan, str]:
    """The fields of Prepared about the data: train, valid, report, plan, data_hash."""
    batch_size, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if settings.streaming:
        streamed = read_stream(settings, encoding)
        steps = StreamPlan(streamed.stream, batch_size, accumulation, settings.max_steps)
        return [], streamed.valid, TokenizeReport(), steps, _hash(f"stream {steps.step_size} {streamed.digest}")
    data = read_data(settings, encoding)
    plan = EpochPlan(
        lengths=lengths_of(data.train),
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=seed(settings),
        sort_by_length=settings.sorts_by_length,
        shuffle=not settings.disable_shuffling,
    )
    order = f"{plan.batch_size * plan.accumulation} {plan.seed} {plan.sort_by_length} {plan.shuffle}"
    return data.train, data.valid, data.report, plan, _hash(f"{order} {data.digest}")


def _adapters(settings: Settings, base: ModelFolder) -> tuple[Adapter | None, Adapter | None]:
    """(the adapter to train further, the adapter that becomes part of the base); at most one of them."""
    if settings.adapter_name_or_path is None:
        return None, None
    adapter = _attachable(settings.adapter_name_or_path, base)
    if not settings.create_new_adapter:
        _check_start(settings, adapter, base)
        return adapter, None
    if adapter.config.use_dora:
        raise ConfigError(
            f"create_new_adapter: {adapter.folder} is a DoRA adapter, which cannot be stacked; remove the key to train "
            "it further"
        )
    check_base(adapter, base)
    return None, adapter


def _attachable(name: str, base: ModelFolder) -> Adapter:
    adapter = read_on(resolve_adapter(name), base.path)
    spec_of_adapter(adapter)  # before the data is read, which takes a while
    return adapter


def _named_reference(settings: Settings, base: ModelFolder, tokenizer: Tokenizer) -> NamedReference | None:
    if not (settings.has_reference and settings.names_reference):
        return None
    named = resolve_model(settings.ref_model, settings.hub) if settings.ref_model is not None else base
    if named.path != base.path and load_tokenizer(named.path).vocabulary != tokenizer.vocabulary:
        raise ConfigError(
            f"ref_model: the vocabulary of {named.name} differs from that of {base.name}, so its probabilities "
            "cannot be compared; name a model of the same family"
        )
    if settings.ref_model_adapters is None:
        return NamedReference(named, None)
    adapter = _attachable(settings.ref_model_adapters, named)
    check_base(adapter, named)
    return NamedReference(named, adapter)


def _hash(order: str) -> str:
    """Identify the data and its order: a checkpoint's position only means something with these."""
    return hashlib.sha256(order.encode()).hexdigest()


def _check_start(settings: Settings, start: Adapter, base: ModelFolder) -> None:
    """Raise ConfigError for keys that contradict the loaded adapter, whose own shape is used."""
    problems = [
        f"{key} is {getattr(settings, key)}, the adapter has {value}"
        for key, value in shape_keys(start.config).items()
        if key in settings.model_fields_set and getattr(settings, key) not in (None, value)
    ]
    expected = {name.strip() for name in settings.lora_target.split(",")}
    if expected != {"all"} and expected != set(start.config.target_modules):
        problems.append(
            f"lora_target is {settings.lora_target}, the adapter has {','.join(start.config.target_modules)}"
        )
    if problems:
        raise ConfigError(f"{start.folder}: {'; '.join(problems)}; remove these keys")
    check_base(start, base)


def lora_spec(settings: Settings, start: Adapter | None) -> LoraSpec | None:
    """The adapter to attach; None for full fine-tuning."""
    if settings.finetuning_type == "full":
        return None
    # a reference and a policy that drop different elements cannot be compared
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
    merged = prepared.merged_adapter
    return ModelSpec(
        folder=prepared.base.path,
        lora=lora_spec(settings, prepared.start),
        merged_adapter=MergedAdapter(spec_of_adapter(merged), merged.state) if merged is not None else None,
        full=settings.finetuning_type == "full",
        precision=settings.precision,
        quantization_bit=settings.quantization_bit,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=prepared.max_length,
        row_length=prepared.row_length,
        rows_per_example=2 if settings.is_preference else 1,
        packing=settings.is_packed,
        from_scratch=prepared.from_scratch,
        seed=settings.seed,
    )


def resolved(settings: Settings, prepared: Prepared, backend_name: str) -> Settings:
    """The settings with what the run found out: the backend, and a loaded adapter's own shape.

    Keys about this one run are reset: a second use of the file must not delete this run.
    """
    update: dict[str, object] = {
        "backend": backend_name,
        "lora_alpha": settings.alpha if settings.finetuning_type == "lora" else None,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": False,
    }
    if prepared.start is not None:
        config = prepared.start.config
        update |= {**shape_keys(config), "lora_target": ",".join(config.target_modules)}
    return settings.model_copy(update=update)
