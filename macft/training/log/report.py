"""Show the progress of training on standard error, and write the rows of trainer_log.jsonl."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from macft.errors import MacftError
from macft.files import write_text
from macft.process_group import ONE_PROCESS, ProcessGroup
from macft.progress import stderr_is_terminal
from macft.training.log.trackers import Reporter

LOG_NAME = "trainer_log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; `step` counts from 1, memory is in 10^9 bytes.

    `tokens` are the tokens the model read in this step, without padding; `extra` are the
    objective's own metrics, logged as their mean over the steps since the last row.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    peak_memory_gb: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


class Report:
    """What the training loop shows and logs; a row's loss is the mean of the step losses since the last row.

    Opening it cuts the log back to `start_step` (0: starts a new one). `start_tokens` is what the
    run had read before it was resumed, `unlogged` the steps since its last row. Of several
    processes only the main one shows and writes. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        start_step: int = 0,
        start_tokens: int = 0,
        reporters: Sequence[Reporter] = (),
        unlogged: Sequence[StepRecord] = (),
        group: ProcessGroup = ONE_PROCESS,
    ) -> None:
        self.total_tokens = start_tokens
        self._total_steps = total_steps
        self._start_step = start_step
        self._is_main = group.is_main
        self._reporters = reporters if group.is_main else ()
        self._since_log: list[StepRecord] = list(unlogged)
        self._started = time.perf_counter()
        self._file = _open_log(output_dir, start_step) if group.is_main else None
        self._bar = _Bar(total_steps, start_step) if group.is_main and stderr_is_terminal() else None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def unlogged(self) -> tuple[StepRecord, ...]:
        """The steps whose row is still to come."""
        return tuple(self._since_log)

    def step(self, record: StepRecord) -> None:
        """Take in one optimizer step and move the progress bar."""
        self._since_log.append(record)
        self.total_tokens += record.tokens
        if self._bar:
            values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm, **record.extra}
            self._bar.update(record.step, self._with_speed(values, self._since_log), self._left(record.step))

    def log(self) -> dict[str, float]:
        """Write the row for the steps since the last row and return its values; without any, write nothing."""
        records, self._since_log = self._since_log, []
        if not records:
            return {}
        last = records[-1]
        mean_loss = _mean([record.loss for record in records])
        values = {"loss": mean_loss, "lr": last.lr, "grad_norm": last.grad_norm, **_mean_of_extras(records)}
        values = self._with_speed(values, records)
        values["total_tokens"] = self.total_tokens
        self._write(last.step, last.epoch, values)
        if not self._bar:
            # columns line up from step to step
            text = _values_text(values, self._left(last.step), aligned=True)
            self.message(f"{_step_label(last.step, self._total_steps)}  {text}")
        return values

    def evaluation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Write the row of one evaluation after `step` steps; `values` holds eval_loss and the like."""
        self._write(step, epoch, values)
        shown = [f"eval_loss {values['eval_loss']:.4f}", *_reward_parts(values, "eval_")]
        self.message("  ".join([_step_label(step, self._total_steps), *shown]))

    def message(self, text: str) -> None:
        """Show a line of text, above the progress bar."""
        if self._bar:
            self._bar.message(text)
        elif self._is_main:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Take down the progress bar, then close the log and the reporters; a second call does nothing."""
        if self._file is None or self._file.closed:
            return
        if self._bar:
            self._bar.close()
        self._file.close()
        for reporter in self._reporters:
            reporter.close()

    def _with_speed(self, values: dict[str, float], records: Sequence[StepRecord]) -> dict[str, float]:
        seconds = sum(record.seconds for record in records)
        if seconds > 0:
            values["throughput"] = sum(record.tokens for record in records) / seconds
        memory = [record.peak_memory_gb for record in records if record.peak_memory_gb is not None]
        if memory:
            values["peak_memory_gb"] = max(memory)
        return values

    def _left(self, step: int) -> str:
        done = step - self._start_step
        elapsed = time.perf_counter() - self._started
        return _clock(elapsed / done * (self._total_steps - step)) if done > 0 else "?"

    def _write(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        row: dict[str, Any] = {"current_steps": step, "total_steps": self._total_steps}
        row.update({key: value for key, value in values.items() if value is not None})
        row["epoch"] = round(epoch, 4)
        row["percentage"] = round(100 * step / self._total_steps, 2) if self._total_steps else 100.0
        row["elapsed_time"] = _clock(time.perf_counter() - self._started)
        row["remaining_time"] = self._left(step)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for reporter in self._reporters:
            reporter.log(step, {**values, "epoch": epoch})


class _Bar:
    """The progress bar, redrawn by the steps themselves: no thread runs beside training."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        text = "{task.fields[%s]}"
        console = Console(stderr=True)
        label_width = len(_step_label(total_steps, total_steps))
        self._progress = Progress(
            TextColumn(text % "label", markup=False, table_column=Column(no_wrap=True, min_width=label_width)),
            *([BarColumn(bar_width=None)] if console.width >= 76 else []),
            TextColumn(text % "values", markup=False),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )
        self._total_steps = total_steps
        self._drawn = 0.0
        self._task = self._progress.add_task(
            "", total=total_steps, completed=start_step, label=_step_label(start_step, total_steps), values=""
        )
        self._progress.start()

    def update(self, step: int, values: Mapping[str, float], left: str) -> None:
        label = _step_label(step, self._total_steps)
        text = _values_text(values, left)
        self._progress.update(self._task, completed=step, label=label, values=text)
        now = time.monotonic()
        if now - self._drawn > 0.1 or step == self._total_steps:
            self._progress.refresh()
            self._drawn = now

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of trainer_log.jsonl, [] without one; a last line cut short by a crash is left out.

    Raises MacftError, with the line number, when another line is not a row.
    """
    path = output_dir / LOG_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row["current_steps"], int)
        except (ValueError, KeyError, TypeError):
            is_row = False
        if not is_row:
            raise MacftError(
                f"{path} line {number}: found {line[:40]!r}, expected a JSON object with current_steps; "
                "delete the line, or the file"
            )
        rows.append(row)
    return rows


def _open_log(output_dir: Path, start_step: int) -> TextIO:
    path = output_dir / LOG_NAME
    # a new run does not read an older log, so a damaged one cannot stop it
    rows = read_log(output_dir) if start_step else []
    kept = [row for row in rows if row["current_steps"] <= start_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return path.open("a", encoding="utf-8")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_extras(records: Sequence[StepRecord]) -> dict[str, float]:
    keys = dict.fromkeys(key for record in records for key in record.extra)
    return {key: _mean([record.extra[key] for record in records if key in record.extra]) for key in keys}


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _step_label(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"


def _values_text(values: Mapping[str, float], left: str, *, aligned: bool = False) -> str:
    rewards = _reward_parts(values)
    parts = [f"loss {values['loss']:.4f}", *rewards]
    # a preference run's line must fit into 80 columns too
    if aligned and not rewards:
        parts.append(f"grad {values['grad_norm']:5.2f}")
    if not rewards:
        parts.append(f"lr {values['lr']:.1e}")
    if "throughput" in values:
        parts.append(f"{values['throughput']:{'6' if aligned else ''}.0f} tok/s")
    if "peak_memory_gb" in values and not rewards:
        parts.append(f"{values['peak_memory_gb']:.1f} GB")
    # 0:00:41 reads 0:41, 0:12:05 reads 12:05
    parts.append(f"{left.removeprefix('0:').removeprefix('0')} left")
    return "  ".join(parts)


def _reward_parts(values: Mapping[str, float], prefix: str = "") -> list[str]:
    """Accuracy and margin of a preference run; none in other runs."""
    shown = {"acc": ("rewards/accuracies", "4.2f"), "margin": ("rewards/margins", "+5.2f")}
    # rounded first, and 0 added, so that a value near 0 has no minus sign
    return [
        f"{prefix}{name} {round(values[prefix + key], 2) + 0.0:{form}}"
        for name, (key, form) in shown.items()
        if prefix + key in values
    ]
