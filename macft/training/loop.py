"""Run the optimizer steps of a training run, with its log rows, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from macft.backends.base import Model, StepResult
from macft.config.settings import Settings
from macft.data.batches import in_order
from macft.errors import MacftError, StoppedError
from macft.objectives.batch import NumpyBatch
from macft.text import plural
from macft.training.checkpoint import Progress, checkpoint_problem, list_checkpoints, save_checkpoint
from macft.training.checks.alarms import CurveAlarms
from macft.training.checks.first_step import check_start
from macft.training.early_stopping import judge, metric_goal
from macft.training.evaluate import evaluate
from macft.training.log.report import Report, StepRecord
from macft.training.log.results import eval_results, merge_results
from macft.training.model_files import ModelFiles
from macft.training.objective import make_objective
from macft.training.prepare import Prepared
from macft.training.schedule import Schedule, warmup_steps


class TrainingLoop:
    """Takes the steps of a run and, where they are due, writes log rows, evaluations and checkpoints."""

    def __init__(
        self,
        settings: Settings,
        prepared: Prepared,
        model: Model,
        files: ModelFiles,
        report: Report,
        output_dir: Path,
    ):
        self.settings = settings
        self.prepared = prepared
        self.model = model
        self.files = files
        self.report = report
        self.output_dir = output_dir
        self.objective = make_objective(settings)
        self.goal = metric_goal(settings)
        # with another model as reference, rewards do not start at 0
        self.alarms = CurveAlarms(has_reference=settings.has_reference and not settings.names_reference)
        plan = prepared.plan
        self.schedule = Schedule(
            kind=settings.lr_scheduler_type,
            peak=settings.learning_rate,
            total_steps=plan.total_steps,
            warmup_steps=warmup_steps(settings.warmup_steps, settings.warmup_ratio, plan.total_steps),
            options=settings.lr_scheduler_kwargs,
        )

    def run(self, progress: Progress) -> Progress:
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
        """Log, evaluate and save where due; also returns whether the evaluations say to stop."""
        plan, settings = self.prepared.plan, self.settings
        is_last = progress.step == plan.total_steps
        if is_last or progress.step % settings.logging_steps == 0:
            self.report.log()
        must_save, is_enough = False, False
        is_due = plan.is_due(settings.when_to_evaluate, settings.steps_per_evaluation, progress.step)
        if is_due and self.prepared.valid:
            best = judge(self.goal, progress.best, progress.step, self.evaluate(progress.step))
            progress = replace(progress, best=best)
            must_save = best.evaluations_since == 0 and settings.load_best_model_at_end
            is_enough = self.goal.is_out_of_patience(best) and not is_last
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
        """Put the best checkpoint's parameters into the model, and its figures into eval_results.json."""
        best = progress.best
        if best.step is None or best.step == progress.step:
            return progress
        self.model.set_trained_state(self.files.read_state(self.output_dir / f"checkpoint-{best.step}"))
        merge_results(self.output_dir, "eval", best.results)
        self.report.message(f"best: checkpoint-{best.step}, {self.goal.metric} {best.value:.4f}; the run ends with it")
        return progress

    def _step(self, micro_batches: list[NumpyBatch], before: Progress) -> Progress:
        start = time.perf_counter()
        lr = self.schedule.lr(before.step)
        micro_batches = [self.objective.complete(batch, self.model.logps) for batch in micro_batches]
        weight = sum(self.objective.weight(batch) for batch in micro_batches)
        result = self.model.train_step(self.objective, micro_batches, weight=weight, lr=lr, step=before.step)
        result = replace(result, metrics=self.objective.report(result.metrics))
        seconds = time.perf_counter() - start
        step = before.step + 1
        if before.step == 0 and not self.settings.names_reference:
            alarm = check_start(self.objective, result, micro_batches, self.model.info.precision)
            self._warn([alarm] if alarm is not None else [])
        if result.is_skipped:
            self.report.message(
                f"step {step}: float16 gradients overflowed; nothing is updated, the loss scale is halved"
            )
            result = replace(result, grad_norm=0.0)
        elif _has_diverged(result, micro_batches):
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
                peak_memory_gb=self.model.peak_memory() / 1e9,
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
            stream_digest=self.prepared.plan.digest,
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate on the held-out examples and log it; returns the content of eval_results.json."""
        start = time.perf_counter()
        batches = (batch for _, batch in in_order(self.prepared.valid, self.settings.per_device_eval_batch_size))
        values = evaluate(self.model, self.objective, batches)
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
        """Write a checkpoint of this moment."""
        state = self.model.trained_state()
        save_checkpoint(
            self.output_dir,
            replace(progress, unlogged=self.report.unlogged),
            None if self.settings.save_only_model else self.model.optimizer_state(),
            lambda folder: self.files.write(folder, state, exact=True),
            self.prepared.group,
            keep=self.settings.save_total_limit,
            spared=progress.best.step if self.settings.load_best_model_at_end else None,
        )


def _has_diverged(result: StepResult, micro_batches: Sequence[NumpyBatch]) -> bool:
    """Whether numbers have overflowed; norm layers turn infinite activations into 0, and with them all gradients."""
    is_dead = result.grad_norm == 0 and result.loss > 0.1 and not all(map(_is_undecided, micro_batches))
    return is_dead or not math.isfinite(result.loss) or not math.isfinite(result.grad_norm)


def _is_undecided(batch: NumpyBatch) -> bool:
    """Whether both answers of each pair are the same: such a step rightly has a loss and no gradient."""
    if batch.prompt_mask is None:
        return False
    chosen, rejected = np.split(batch.tokens, 2)
    return np.array_equal(chosen, rejected)


def _stopped_text(output_dir: Path, step: int, total_steps: int) -> str:
    whole = (path for path in reversed(list_checkpoints(output_dir)) if checkpoint_problem(path) is None)
    checkpoint = next(whole, None)
    how = (
        f"resume_from_checkpoint=true continues from {checkpoint}"
        if checkpoint is not None
        else f"{output_dir} holds no checkpoint to resume from, overwrite_output_dir=true starts again"
    )
    return f"stopped after step {step} of {total_steps}; {how}"
