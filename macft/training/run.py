"""The straight line of `macft train`: settings in, a run folder with a trained adapter out."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from macft.backends import PACKAGES, choose_backend, load_backend
from macft.backends.base import Backend, LoadedModel, LoraSpec, OptimizerSpec, StepResult
from macft.config.load import dump_yaml
from macft.config.settings import Settings
from macft.data.batches import StreamPlan, in_order
from macft.errors import ConfigError, MacftError, ModelError, StoppedError, UsageError
from macft.files import remove_leftovers, write_text
from macft.objectives.batch import NumpyBatch
from macft.system import keep_awake
from macft.text import plural
from macft.training.checkpoint import (
    Progress,
    checkpoint_problem,
    find_checkpoint,
    list_checkpoints,
    read_optimizer_state,
    read_progress,
    save_checkpoint,
)
from macft.training.checks.alarms import CurveAlarms
from macft.training.checks.first_step import check_start
from macft.training.checks.output_dir import check_base_is_safe, check_output_dir, clear_output_dir
from macft.training.early_stopping import Goal, check_metric, goal, judge
from macft.training.evaluate import evaluate, metric_names
from macft.training.finish import finish
from macft.training.log.report import Report, StepRecord, read_log
from macft.training.log.results import eval_results, merge_results
from macft.training.log.summary import tell_data, tell_model
from macft.training.log.trackers import check_reporters, open_reporters
from macft.training.model_files import ModelFiles
from macft.training.objective import make_objective
from macft.training.prepare import Prepared, model_spec, prepare, resolved
from macft.training.reference import named_references, policy_references
from macft.training.schedule import Schedule, warmup_steps
from macft.weights.adapters.peft import naming_adapter

logger = logging.getLogger("macft")


def train(settings: Settings) -> Path:
    """Train as the settings say; returns the run folder."""
    output_dir = Path(settings.output_dir).expanduser()
    logger.info("done: %s; saved to %s", _train(settings, output_dir), output_dir)
    return output_dir


def _train(settings: Settings, output_dir: Path) -> str:
    """The whole run; returns what came out, in a line."""
    backend_name = choose_backend(settings.backend)
    is_anew = settings.overwrite_output_dir
    check_output_dir(settings, output_dir)
    trackers = [name.strip() for name in settings.report_to.split(",")]
    check_reporters(trackers)
    checkpoint = None
    if settings.resume_from_checkpoint is not False:
        checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint)
    prepared = prepare(settings)
    check_base_is_safe(prepared, output_dir)
    _check_goal(settings, prepared)
    if checkpoint is not None:
        _check_position(checkpoint, prepared)
    tell_data(settings, prepared)
    settings = resolved(settings, prepared, backend_name)
    if prepared.reference is not None:
        prepared = named_references(settings, prepared, prepared.reference, backend_name)
    backend = load_backend(backend_name)
    spec = model_spec(settings, prepared)
    with _naming_adapter(prepared):
        loaded = backend.load(spec, _optimizer_spec(settings))
    tell_model(settings, backend_name, loaded)
    targets = _adapter_targets(spec.lora, loaded)
    files = ModelFiles(prepared.base, spec.lora, targets, prepared.under, prepared.tokenizer, prepared.template)
    if prepared.start is not None:
        with naming_adapter(prepared.start, prepared.base.name, ModelError):
            backend.set_adapter_state(prepared.start.state)
    if settings.has_reference and prepared.reference is None:
        prepared = policy_references(settings, prepared, backend, loaded)
    progress = _resume(backend, files, checkpoint) if checkpoint is not None else Progress(prepared.data_hash)
    if is_anew:
        clear_output_dir(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    write_text(output_dir / "config.yaml", dump_yaml(settings))
    reporters = open_reporters(trackers, output_dir, settings.run_name or output_dir.name, settings.model_dump())
    with ExitStack() as stack:
        stack.enter_context(keep_awake())
        total = prepared.plan.total_steps
        report = stack.enter_context(
            Report(output_dir, total, progress.step, progress.total_tokens, reporters, progress.unlogged)
        )
        progress = _Run(settings, prepared, backend, files, report, output_dir, loaded.precision).loop(progress)
    return finish(settings, prepared, backend, files, output_dir, progress, PACKAGES[backend_name])


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
        precision: str,
    ):
        self.settings = settings
        self.prepared = prepared
        self.backend = backend
        self.files = files
        self.report = report
        self.output_dir = output_dir
        self.precision = precision
        self.objective = make_objective(settings)
        self.goal = _goal(settings)
        # another model as reference: rewards do not start at 0
        self.alarms = CurveAlarms(has_reference=settings.has_reference and not settings.names_reference)
        plan = prepared.plan
        self.schedule = Schedule(
            kind=settings.lr_scheduler_type,
            peak=settings.learning_rate,
            total_steps=plan.total_steps,
            warmup_steps=warmup_steps(settings.warmup_steps, settings.warmup_ratio, plan.total_steps),
            options=settings.lr_scheduler_kwargs,
        )

    def loop(self, progress: Progress) -> Progress:
        """Train from the step after `progress.step` to the end of the plan; StoppedError if the user stops it."""
        plan = self.prepared.plan
        try:
            for batches in self.prepared.batches(progress.step, self.report.message):
                progress, is_enough = self._after_step(self._step(batches, progress))
                if is_enough:
                    break
        except KeyboardInterrupt:
            raise StoppedError(_stopped_text(self.output_dir, progress.step, plan.total_steps)) from None
        return self._take_best(progress) if self.settings.load_best_model_at_end else progress

    def _after_step(self, progress: Progress) -> tuple[Progress, bool]:
        """Log, evaluate and save what is due; also whether the evaluations say that it is enough."""
        plan, settings = self.prepared.plan, self.settings
        is_last = progress.step == plan.total_steps
        if is_last or progress.step % settings.logging_steps == 0:
            self.report.log()
        must_save, is_enough = False, False
        is_due = plan.is_due(settings.when_to_evaluate, settings.steps_per_evaluation, progress.step)
        if is_due and self.prepared.valid:
            verdict = judge(self.goal, progress.best, progress.step, self.evaluate(progress.step))
            progress = replace(progress, best=verdict.best)
            must_save = verdict.is_best and settings.load_best_model_at_end
            is_enough = verdict.is_enough and not is_last
        if is_enough:
            self.report.log()
            self.report.message(
                f"stopped early after step {progress.step}: {self.goal.metric} has been no better than "
                f"{progress.best.value:.4f} for {plural(progress.best.evaluations_since, 'evaluation')}"
            )
        is_over = (is_last or is_enough) and settings.save_strategy != "no"
        if must_save or is_over or plan.is_due(settings.save_strategy, settings.save_steps, progress.step):
            self.save(progress)
        return progress, is_enough

    def _warn(self, alarms: list[str]) -> None:
        for alarm in alarms:
            self.report.message(f"warning: {alarm}")

    def _take_best(self, progress: Progress) -> Progress:
        """Put the best checkpoint's parameters into the backend, and its figures into eval_results.json."""
        best = progress.best
        if best.step is None or best.step == progress.step:
            return progress
        self.backend.set_adapter_state(self.files.read_state(self.output_dir / f"checkpoint-{best.step}"))
        merge_results(self.output_dir, "eval", best.results)
        self.report.message(f"best: checkpoint-{best.step}, {self.goal.metric} {best.value:.4f}; the run ends with it")
        return progress

    def _step(self, micro_batches: list[NumpyBatch], before: Progress) -> Progress:
        start = time.perf_counter()
        lr = self.schedule.lr(before.step)
        micro_batches = [self.objective.complete(batch, self.backend.logps) for batch in micro_batches]
        result = self.backend.train_step(self.objective, micro_batches, lr=lr, step=before.step)
        result = replace(result, metrics=self.objective.report(result.metrics))
        seconds = time.perf_counter() - start
        step = before.step + 1
        if before.step == 0 and not self.settings.names_reference:
            check_start(self.objective, result, self.precision)
        if _has_diverged(result, micro_batches):
            raise MacftError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; training has diverged: "
                "lower learning_rate, or compute in float32 (bf16=false)"
            )
        tokens = sum(int(batch.lengths.sum()) for batch in micro_batches)
        self.report.step(
            StepRecord(
                step=step,
                epoch=self.prepared.plan.epoch_at(step),
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens=tokens,
                seconds=seconds,
                peak_memory_gb=self.backend.peak_memory() / 1e9,
                extra=result.metrics,
            )
        )
        self._warn(self.alarms.step(result.metrics))
        return replace(
            before,
            step=step,
            total_tokens=before.total_tokens + tokens,
            loss_sum=before.loss_sum + result.loss,
            seconds=before.seconds + seconds,
            stream_digest=self.prepared.stream_digest,
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """The content of eval_results.json: loss and metrics on the held-out examples, which the log gets too."""
        start = time.perf_counter()
        batches = (batch for _, batch in in_order(self.prepared.valid, self.settings.per_device_eval_batch_size))
        values = evaluate(self.backend, self.objective, batches)
        epoch = self.prepared.plan.epoch_at(step)
        self.report.evaluation(step, epoch, values)
        self._warn(self.alarms.evaluation(values))
        results = eval_results(
            epoch=epoch,
            values=values,
            seconds=time.perf_counter() - start,
            examples=len(self.prepared.valid),
        )
        merge_results(self.output_dir, "eval", results)
        return results

    def save(self, progress: Progress) -> None:
        """A checkpoint of this moment."""
        state = self.backend.adapter_state()
        save_checkpoint(
            self.output_dir,
            replace(progress, unlogged=self.report.unlogged),
            None if self.settings.save_only_model else self.backend.optimizer_state(),
            lambda folder: self.files.write(folder, state, exact=True),
            keep=self.settings.save_total_limit,
            spared=progress.best.step if self.settings.load_best_model_at_end else None,
        )


def _has_diverged(result: StepResult, micro_batches: Sequence[NumpyBatch]) -> bool:
    """Whether numbers have overflowed; norm layers turn infinite activations into 0, and with them all gradients."""
    is_dead = result.grad_norm == 0 and result.loss > 0.1 and not all(map(_is_undecided, micro_batches))
    return is_dead or not math.isfinite(result.loss) or not math.isfinite(result.grad_norm)


def _is_undecided(batch: NumpyBatch) -> bool:
    """Whether both answers of each pair are the same: such a step has a loss and no gradient by right."""
    if batch.prompt_mask is None:
        return False
    chosen, rejected = np.split(batch.tokens, 2)
    return np.array_equal(chosen, rejected)


def _optimizer_spec(settings: Settings) -> OptimizerSpec:
    return OptimizerSpec(
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def _goal(settings: Settings) -> Goal:
    return goal(settings.metric_for_best_model, settings.greater_is_better, settings.early_stopping_steps)


def _check_goal(settings: Settings, prepared: Prepared) -> None:
    """A metric that no evaluation will have is an error now, not after the steps before the first one."""
    if prepared.valid:
        check_metric(_goal(settings), metric_names(make_objective(settings), prepared.valid[0]))


@contextmanager
def _naming_adapter(prepared: Prepared) -> Iterator[None]:
    """Errors of loading the model name the adapter that does not fit it."""
    name = prepared.base.name
    with ExitStack() as stack:
        if (adapter := prepared.start or prepared.under) is not None:
            stack.enter_context(naming_adapter(adapter, name, ConfigError))
        if prepared.under is not None:
            stack.enter_context(naming_adapter(prepared.under, name, ModelError))
        yield


def _check_position(checkpoint: Path, prepared: Prepared) -> None:
    progress, total = read_progress(checkpoint), prepared.plan.total_steps
    if progress.data_hash != prepared.data_hash:
        raise UsageError(
            f"{checkpoint}: written on other data, or with another batch size, seed or template; the position "
            "in the data means nothing here. Restore those settings, or start anew with overwrite_output_dir=true"
        )
    if progress.step > total:
        raise UsageError(f"{checkpoint}: past the end of a run of {total} steps; raise num_train_epochs or max_steps")
    if isinstance(prepared.plan, StreamPlan):
        logger.info("streaming: reading past the examples of %s", plural(progress.step, "step"))
        prepared.plan.read_past(progress.step, progress.stream_digest)


def _resume(backend: Backend, files: ModelFiles, checkpoint: Path) -> Progress:
    """Put the backend where a checkpoint stands."""
    progress = read_progress(checkpoint)
    backend.set_adapter_state(files.read_state(checkpoint))
    backend.set_optimizer_state(read_optimizer_state(checkpoint), progress.step)
    logger.info("resuming after step %d from %s", progress.step, checkpoint)
    return progress


def _adapter_targets(lora: LoraSpec | None, loaded: LoadedModel) -> tuple[str, ...]:
    """The last parts of the target names, what PEFT, vLLM and people expect to read, where they say enough."""
    # q_proj would name it in every layer, layers.0.self_attn.q_proj in one
    if lora is not None and any("." in name for name in lora.target):
        return tuple(sorted(loaded.target_modules))
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in loaded.target_modules}))


def _stopped_text(output_dir: Path, step: int, total_steps: int) -> str:
    whole = (path for path in reversed(list_checkpoints(output_dir)) if checkpoint_problem(path) is None)
    checkpoint = next(whole, None)
    how = (
        f"resume_from_checkpoint=true goes on from {checkpoint}"
        if checkpoint is not None
        else f"{output_dir} holds no checkpoint to go on from, overwrite_output_dir=true starts anew"
    )
    return f"stopped after step {step} of {total_steps}; {how}"


def dry_run(settings: Settings) -> str:
    """Everything a run does, with two steps, the first on the longest rows, in a folder that is deleted after."""
    try:
        check_output_dir(settings, Path(settings.output_dir).expanduser())
    except UsageError as error:
        logger.warning(error)
    with tempfile.TemporaryDirectory(prefix="macft-dry-run-") as folder:
        short = settings.model_copy(
            update={
                "output_dir": folder,
                "max_steps": 2,
                # a stream has no longest rows to begin with
                "group_by_length": not settings.streaming,
                "logging_steps": 1,
                "eval_steps": settings.steps_per_evaluation,
                "report_to": "none",
                "resume_from_checkpoint": False,
            }
        )
        try:
            _train(short, Path(folder))
        except StoppedError:
            raise StoppedError("stopped; a dry run keeps nothing") from None
        longest = read_log(Path(folder))[0]
    seconds = longest["total_tokens"] / longest["throughput"]
    which = "" if settings.streaming else " on the longest rows"
    return f"dry run: all of it works; a step{which} takes {seconds:.1f} s"
