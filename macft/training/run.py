"""The straight line of `macft train`: settings in, a run folder with a trained adapter out."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from macft.backends import PACKAGES, choose_backend, load_backend
from macft.backends.base import Backend, LoadedModel, LoraSpec, OptimizerSpec, StepResult
from macft.config.load import dump_yaml
from macft.config.settings import Settings
from macft.data.batches import NumpyBatch, collate, in_order
from macft.errors import ConfigError, MacftError, ModelError, StoppedError, UsageError
from macft.files import remove_leftovers, write_text
from macft.objectives.losses import OBJECTIVES, Objective
from macft.objectives.ops import NumpyOps
from macft.training.awake import keep_awake
from macft.training.checkpoint import (
    Progress,
    checkpoint_fault,
    find_checkpoint,
    list_checkpoints,
    read_optimizer_state,
    read_progress,
    save_checkpoint,
)
from macft.training.finish import finish
from macft.training.model_files import FULL_WEIGHTS, RUN_FILES, ModelFiles
from macft.training.prepare import Prepared, is_occupied, model_spec, prepare, resolved
from macft.training.report import Report, StepRecord
from macft.training.reporters import check_reporters, open_reporters
from macft.training.results import eval_results, merge_results, read_results
from macft.training.schedule import Schedule, warmup_steps
from macft.training.tell import tell_data, tell_model
from macft.weights.adapter import fitting

logger = logging.getLogger("macft")


def train(settings: Settings) -> Path:
    """Train as the settings say; returns the run folder."""
    output_dir = Path(settings.output_dir).expanduser()
    backend_name = choose_backend(settings.backend)
    _check_output_dir(settings, output_dir)
    trackers = [name.strip() for name in settings.report_to.split(",")]
    check_reporters(trackers)
    checkpoint = None
    if settings.resume_from_checkpoint is not False:
        checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint)
    prepared = prepare(settings)
    _check_base_is_safe(prepared, output_dir)
    if checkpoint is not None:
        _check_position(checkpoint, prepared)
    tell_data(settings, prepared)
    backend = load_backend(backend_name)
    spec = model_spec(settings, prepared)
    with fitting(prepared.start, prepared.base.name, ConfigError) if prepared.start is not None else nullcontext():
        loaded = backend.load(spec, _optimizer_spec(settings))
    tell_model(settings, backend_name, loaded)
    targets = _adapter_targets(spec.lora, loaded)
    files = ModelFiles(prepared.base, spec.lora, targets, prepared.tokenizer, prepared.template)
    progress = _start(backend, files, prepared, checkpoint)
    if settings.overwrite_output_dir:
        _clear(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    settings = resolved(settings, prepared, backend_name)
    write_text(output_dir / "config.yaml", dump_yaml(settings))
    reporters = open_reporters(trackers, output_dir, settings.run_name or output_dir.name, settings.model_dump())
    with ExitStack() as stack:
        stack.enter_context(keep_awake())
        total = prepared.plan.total_steps
        report = stack.enter_context(
            Report(output_dir, total, progress.step, progress.total_tokens, reporters, progress.unlogged)
        )
        progress = _Run(settings, prepared, backend, files, report, output_dir).loop(progress)
    finish(settings, prepared, backend, files, output_dir, progress, PACKAGES[backend_name])
    return output_dir


class _Run:
    """The loop: train steps, and now and then a log row, an evaluation, a checkpoint."""

    def __init__(
        self,
        settings: Settings,
        prepared: Prepared,
        backend: Backend,
        files: ModelFiles,
        report: Report,
        output_dir: Path,
    ):
        self.settings = settings
        self.prepared = prepared
        self.backend = backend
        self.files = files
        self.report = report
        self.output_dir = output_dir
        self.objective = OBJECTIVES[settings.stage]()
        plan = prepared.plan
        self.schedule = Schedule(
            kind=settings.lr_scheduler_type,
            peak=settings.learning_rate,
            total_steps=plan.total_steps,
            warmup_steps=warmup_steps(settings.warmup_steps, settings.warmup_ratio, plan.total_steps),
        )

    def loop(self, progress: Progress) -> Progress:
        """Train from the step after `progress.step` to the end of the plan; StoppedError if the user stops it."""
        plan = self.prepared.plan
        try:
            for indices in plan.steps(after=progress.step):
                batches = [collate([self.prepared.train[i] for i in part]) for part in indices]
                progress = self._step(batches, progress)
                self._after_step(progress)
        except KeyboardInterrupt:
            raise StoppedError(_stopped_text(self.output_dir, progress.step, plan.total_steps)) from None
        return progress

    def _after_step(self, progress: Progress) -> None:
        is_last = progress.step == self.prepared.plan.total_steps
        if is_last or progress.step % self.settings.logging_steps == 0:
            self.report.log()
        if self._is_due(self._eval_strategy, self._eval_steps, progress.step):
            self.evaluate(progress.step)
        strategy = self.settings.save_strategy
        if self._is_due(strategy, self.settings.save_steps, progress.step) or (is_last and strategy != "no"):
            self.save(progress)

    def _step(self, micro_batches: list[NumpyBatch], before: Progress) -> Progress:
        start = time.perf_counter()
        lr = self.schedule.lr(before.step)
        result = self.backend.train_step(self.objective, micro_batches, lr=lr, step=before.step)
        seconds = time.perf_counter() - start
        step = before.step + 1
        if _has_diverged(result):
            raise MacftError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; training has diverged: "
                "lower learning_rate, or compute in float32 (bf16=false)"
            )
        tokens = sum(int(batch.lengths.sum()) for batch in micro_batches)
        self.report.step(
            StepRecord(
                step=step,
                epoch=step / self.prepared.plan.steps_per_epoch,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens=tokens,
                seconds=seconds,
                peak_memory_gb=self.backend.peak_memory() / 1e9,
                extra=result.metrics,
            )
        )
        return replace(
            before,
            step=step,
            total_tokens=before.total_tokens + tokens,
            loss_sum=before.loss_sum + result.loss,
            seconds=before.seconds + seconds,
        )

    @property
    def _eval_strategy(self) -> str:
        if not self.prepared.valid:
            return "no"
        return self.settings.eval_strategy or "epoch"

    @property
    def _eval_steps(self) -> int:
        return self.settings.eval_steps or self.settings.logging_steps

    def _is_due(self, strategy: str, every: int, step: int) -> bool:
        plan = self.prepared.plan
        if strategy == "steps":
            return step % every == 0
        return strategy == "epoch" and (step % plan.steps_per_epoch == 0 or step == plan.total_steps)

    def evaluate(self, step: int) -> None:
        """Loss on the held-out examples, to the log and to eval_results.json."""
        start = time.perf_counter()
        batches = in_order(self.prepared.valid, self.settings.per_device_eval_batch_size)
        loss = evaluation_loss(self.backend, self.objective, batches)
        epoch = step / self.prepared.plan.steps_per_epoch
        self.report.evaluation(step, epoch, {"eval_loss": loss})
        results = eval_results(
            epoch=epoch,
            eval_loss=loss,
            seconds=time.perf_counter() - start,
            examples=len(self.prepared.valid),
        )
        merge_results(self.output_dir, "eval", results)

    def save(self, progress: Progress) -> None:
        """A checkpoint of this moment."""
        state = self.backend.adapter_state()
        save_checkpoint(
            self.output_dir,
            replace(progress, unlogged=self.report.unlogged),
            None if self.settings.save_only_model else self.backend.optimizer_state(),
            lambda folder: self.files.write(folder, state, exact=True),
            keep=self.settings.save_total_limit,
        )


def _has_diverged(result: StepResult) -> bool:
    """Whether numbers have overflowed; norm layers turn infinite activations into 0, and with them all gradients."""
    is_dead = result.grad_norm == 0 and result.loss > 0.1
    return is_dead or not math.isfinite(result.loss) or not math.isfinite(result.grad_norm)


def evaluation_loss(backend: Backend, objective: Objective, batches: Iterator[NumpyBatch]) -> float:
    """Mean loss over all batches, each weighted by what it trains on."""
    ops = NumpyOps()
    total, weight = 0.0, 0.0
    for batch in batches:
        loss, _ = objective(ops, backend.logps(objective, batch), batch)
        total += float(loss)
        weight += objective.weight(batch)
    return total / weight


def _optimizer_spec(settings: Settings) -> OptimizerSpec:
    return OptimizerSpec(
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def _check_output_dir(settings: Settings, output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"output_dir: {output_dir} is a file; give a folder")
    _check_writable(output_dir)
    if settings.resume_from_checkpoint is not False or settings.overwrite_output_dir:
        return
    if is_occupied(output_dir, RUN_FILES):
        raise UsageError(
            f"output_dir: {output_dir} already holds a run; set resume_from_checkpoint=true to go on with it, "
            "overwrite_output_dir=true to start anew, or another output_dir"
        )


def _check_writable(output_dir: Path) -> None:
    """Make the folder and take it away again: some file systems refuse what their permissions allow."""
    absent = [path for path in (output_dir, *output_dir.absolute().parents) if not path.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(output_dir, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    for path in absent:
        with suppress(OSError):
            path.rmdir()
    if not is_writable:
        raise UsageError(f"output_dir: {output_dir} cannot be written here; give another folder")


def _check_base_is_safe(prepared: Prepared, output_dir: Path) -> None:
    if output_dir.resolve() == prepared.base.path.resolve():
        raise UsageError(f"output_dir: {output_dir} is the folder of the base model; give another folder")


def _clear(output_dir: Path) -> None:
    """Remove an older run's files, and nothing else."""
    if (output_dir / FULL_WEIGHTS).exists():
        for name in ("config.json", "generation_config.json"):
            (output_dir / name).unlink(missing_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)


def _check_position(checkpoint: Path, prepared: Prepared) -> None:
    progress, total = read_progress(checkpoint), prepared.plan.total_steps
    if progress.data_hash != prepared.data_hash:
        raise UsageError(
            f"{checkpoint}: written on other data, or with another batch size, seed or template; the position "
            "in the data means nothing here. Restore those settings, or start anew with overwrite_output_dir=true"
        )
    if progress.step > total:
        raise UsageError(f"{checkpoint}: past the end of a run of {total} steps; raise num_train_epochs or max_steps")


def _start(backend: Backend, files: ModelFiles, prepared: Prepared, checkpoint: Path | None) -> Progress:
    """Put the backend where the run begins: fresh, from an adapter, or from a checkpoint."""
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        backend.set_adapter_state(files.read_state(checkpoint))
        backend.set_optimizer_state(read_optimizer_state(checkpoint), progress.step)
        logger.info("resuming after step %d from %s", progress.step, checkpoint)
        return progress
    if prepared.start is not None:
        with fitting(prepared.start, prepared.base.name, ModelError):
            backend.set_adapter_state(prepared.start.state)
    return Progress(data_hash=prepared.data_hash)


def _adapter_targets(lora: LoraSpec | None, loaded: LoadedModel) -> tuple[str, ...]:
    """The last parts of the target names, what PEFT, vLLM and people expect to read, where they say enough."""
    # q_proj would name it in every layer, layers.0.self_attn.q_proj in one
    if lora is not None and any("." in name for name in lora.target):
        return tuple(sorted(loaded.target_modules))
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in loaded.target_modules}))


def _stopped_text(output_dir: Path, step: int, total_steps: int) -> str:
    whole = (path for path in reversed(list_checkpoints(output_dir)) if checkpoint_fault(path) is None)
    checkpoint = next(whole, None)
    how = (
        f"resume_from_checkpoint=true goes on from {checkpoint}"
        if checkpoint is not None
        else f"{output_dir} holds no checkpoint to go on from, overwrite_output_dir=true starts anew"
    )
    return f"stopped after step {step} of {total_steps}; {how}"


def dry_run(settings: Settings) -> str:
    """Everything a run does, with two steps on the longest rows, in a folder that is deleted after."""
    with tempfile.TemporaryDirectory(prefix="macft-dry-run-") as folder:
        short = settings.model_copy(
            update={
                "output_dir": folder,
                "max_steps": 2,
                "report_to": "none",
                "resume_from_checkpoint": False,
            }
        )
        train(short)
        seconds = read_results(Path(folder))["train_runtime"] / 2
    return f"dry run: all of it works; a step on the longest rows takes {seconds:.1f} s"
