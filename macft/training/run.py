"""Train a model as the settings say, from the configuration to the finished run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from macft.backends import choose_backend, load_model
from macft.backends.base import LoraSpec, Model, ModelInfo, OptimizerSpec
from macft.config.load import dump_yaml
from macft.config.settings import Settings
from macft.engines import BACKENDS
from macft.errors import ConfigError, ModelError, UsageError
from macft.files import remove_leftovers, write_text
from macft.process_group import find_group
from macft.system import keep_awake
from macft.training.checkpoint import Progress, find_checkpoint, read_optimizer_state, read_progress
from macft.training.checks.output_dir import check_base_is_safe, check_output_dir, clear_output_dir
from macft.training.early_stopping import check_metric, metric_goal
from macft.training.evaluate import metric_names
from macft.training.finish import finish
from macft.training.log.report import Report
from macft.training.log.summary import log_data, log_model
from macft.training.log.trackers import check_reporters, open_reporters
from macft.training.loop import TrainingLoop
from macft.training.model_files import ModelFiles
from macft.training.objective import make_objective
from macft.training.prepare import Prepared, model_spec, prepare, resolved
from macft.training.reference import named_references, policy_references
from macft.weights.adapters.peft import naming_adapter

logger = logging.getLogger("macft")


def train(settings: Settings) -> Path:
    """Train as the settings say and return the run folder, with the adapter or model, the log and the results.

    Progress goes to standard error and to the logger `macft`. Raises MacftError for what the settings, the data or the
    model make impossible, StoppedError when the user stops the run.
    """
    output_dir = Path(settings.output_dir).expanduser()
    logger.info("done: %s; saved to %s", train_into(output_dir, settings), output_dir)
    return output_dir


# reading data and scoring references may take as long as the steps
@keep_awake()
def train_into(output_dir: Path, settings: Settings) -> str:
    """Train into a folder; returns the results in one line."""
    group = find_group()
    backend = choose_backend(settings.backend)
    clears_output_dir = settings.overwrite_output_dir
    check_output_dir(settings, output_dir)
    trackers = [name.strip() for name in settings.report_to.split(",")]
    check_reporters(trackers)
    checkpoint = None
    if settings.resume_from_checkpoint is not False:
        checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint)
    prepared = prepare(settings, group)
    check_base_is_safe(prepared, output_dir)
    _check_goal(settings, prepared)
    if checkpoint is not None:
        _check_position(checkpoint, prepared)
    log_data(settings, prepared)
    settings = resolved(settings, prepared, backend)
    if prepared.reference is not None:
        prepared = named_references(settings, prepared, prepared.reference)
    model, files = _load(settings, prepared)
    if settings.has_reference and prepared.reference is None:
        prepared = policy_references(settings, prepared, model)
    progress = _resume(model, files, checkpoint) if checkpoint is not None else Progress(prepared.data_hash)
    if clears_output_dir:
        clear_output_dir(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    write_text(output_dir / "config.yaml", dump_yaml(settings))
    reporters = open_reporters(trackers, output_dir, settings.run_name or output_dir.name, settings.model_dump())
    report = Report(
        output_dir,
        prepared.plan.total_steps,
        progress.step,
        progress.total_tokens,
        reporters,
        progress.unlogged,
        group,
    )
    with report:
        progress = TrainingLoop(settings, prepared, model, files, report, output_dir).run(progress)
    return finish(settings, prepared, model, files, output_dir, progress, BACKENDS[backend].packages)


def _load(settings: Settings, prepared: Prepared) -> tuple[Model, ModelFiles]:
    """Load the model to train, and say what its files will hold."""
    spec = model_spec(settings, prepared)
    with _naming_adapter(prepared):
        model = load_model(settings.backend, spec, _optimizer_spec(settings), prepared.group)
    log_model(settings, model.info)
    if prepared.start is not None:
        with naming_adapter(prepared.start, prepared.base.name, ModelError):
            model.set_trained_state(prepared.start.state)
    files = ModelFiles(
        base=prepared.base,
        lora=spec.lora,
        target_modules=_adapter_targets(spec.lora, model.info),
        merged_adapter=prepared.merged_adapter,
        tokenizer=prepared.tokenizer,
        template=prepared.template,
    )
    return model, files


def _optimizer_spec(settings: Settings) -> OptimizerSpec:
    return OptimizerSpec(
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def _check_goal(settings: Settings, prepared: Prepared) -> None:
    """Raise now, and not after many steps, ConfigError for a metric that no evaluation will have."""
    if prepared.valid:
        check_metric(metric_goal(settings), metric_names(make_objective(settings), prepared.valid[0]))


@contextmanager
def _naming_adapter(prepared: Prepared) -> Iterator[None]:
    """Name the adapter in errors of loading the model that it does not fit."""
    name = prepared.base.name
    with ExitStack() as stack:
        if (adapter := prepared.start or prepared.merged_adapter) is not None:
            stack.enter_context(naming_adapter(adapter, name, ConfigError))
        if prepared.merged_adapter is not None:
            stack.enter_context(naming_adapter(prepared.merged_adapter, name, ModelError))
        yield


def _check_position(checkpoint: Path, prepared: Prepared) -> None:
    progress, total = read_progress(checkpoint), prepared.plan.total_steps
    if progress.data_hash != prepared.data_hash:
        raise UsageError(
            f"{checkpoint}: written with other data, or with another batch size, seed or template, so its position in "
            "the data means nothing here; restore those settings, or start again with overwrite_output_dir=true"
        )
    if progress.step > total:
        raise UsageError(f"{checkpoint}: past the end of a run of {total} steps; raise num_train_epochs or max_steps")
    prepared.plan.read_past(progress.step, progress.stream_digest)


def _resume(model: Model, files: ModelFiles, checkpoint: Path) -> Progress:
    """Bring the model to where a checkpoint stands."""
    progress = read_progress(checkpoint)
    model.set_trained_state(files.read_state(checkpoint))
    model.set_optimizer_state(read_optimizer_state(checkpoint), progress.step)
    logger.info("resuming after step %d from %s", progress.step, checkpoint)
    return progress


def _adapter_targets(lora: LoraSpec | None, info: ModelInfo) -> tuple[str, ...]:
    """The target names to write down: their last parts, as PEFT, vLLM and people expect, where these say enough."""
    # q_proj means every layer, layers.0.self_attn.q_proj only one
    if lora is not None and any("." in name for name in lora.target):
        return tuple(sorted(info.target_modules))
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in info.target_modules}))
