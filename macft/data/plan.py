"""Plan which examples every step trains on: epochs of known rows, or a stream."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from macft.data.batches import TrainingRow, collate
from macft.data.stream import Stream
from macft.data.tokenization.report import TokenizeReport
from macft.errors import UsageError
from macft.objectives.batch import NumpyBatch
from macft.text import plural

logger = logging.getLogger("macft")

# Sorting whole stretches of this many steps keeps padding low and the order random.
STEPS_PER_SORTED_STRETCH = 50

Strategy = Literal["no", "steps", "epoch"]


class StepPlan(Protocol):
    """The steps of a run. One takes `batch_size * accumulation` examples, cut into `accumulation` micro-batches."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def visited(self) -> np.ndarray:
        """Ascending indices of the rows that any step trains on, as far as they are known."""

    @property
    def digest(self) -> str:
        """Identifies the rows taken so far if only reading reveals them; otherwise empty."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that came up only during training."""

    def epoch_at(self, step: int) -> float:
        """How many passes over the data are done after `step`."""

    def rows_at(self, step: int) -> int:
        """How many rows the steps up to `step` have trained on, counting repetitions."""

    def is_due(self, strategy: Strategy, every: int, step: int) -> bool:
        """Whether something due every `every` steps, or every epoch and at the end, is due after `step`."""

    def read_past(self, after: int, digest: str, /) -> None:
        """Skip the rows of the first `after` steps. Raises UsageError if `digest` is no longer theirs."""

    def batches(
        self, rows: Sequence[TrainingRow], after: int, say: Callable[[str], None], /
    ) -> Iterator[list[NumpyBatch]]:
        """The micro-batches of every step after step `after`, up to which a stream must have been read.

        `rows` are all training rows (none for a stream); `say` is told what comes up on the way.
        """

    def describe(self, report: TokenizeReport, noun: str, row: str, /) -> tuple[str, str]:
        """(the data, the steps) in words; `noun` names what the report counts, `row` what a step takes."""


@dataclass(frozen=True)
class EpochPlan:
    """Steps through known rows: a pure function of their lengths and the seed.

    The last step of an epoch is smaller when the numbers do not divide: nothing is dropped.
    """

    lengths: np.ndarray  # int [rows]
    batch_size: int
    accumulation: int
    epochs: float
    max_steps: int  # -1: as many as `epochs` takes
    seed: int
    sort_by_length: bool
    shuffle: bool = True  # False: every epoch in the order of the rows

    digest, warnings = "", ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return math.ceil(len(self.lengths) / (self.batch_size * self.accumulation))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.steps_per_epoch))

    @property
    def visited(self) -> np.ndarray:
        """See StepPlan; all rows, unless the plan ends within its first epoch."""
        if self.total_steps >= self.steps_per_epoch:
            return np.arange(len(self.lengths))
        return np.sort(np.concatenate([indices for step in self.steps() for indices in step]))

    def epoch_at(self, step: int) -> float:
        """See StepPlan."""
        return step / self.steps_per_epoch

    def rows_at(self, step: int) -> int:
        """See StepPlan; in a part of an epoch the last step of one counts as whole."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * len(self.lengths) + rest * self.batch_size * self.accumulation

    def is_due(self, strategy: Strategy, every: int, step: int) -> bool:
        """See StepPlan."""
        if strategy == "steps":
            return step % every == 0
        return strategy == "epoch" and (step % self.steps_per_epoch == 0 or step == self.total_steps)

    def read_past(self, after: int, digest: str) -> None:
        """See StepPlan; nothing has to be read."""

    def batches(
        self, rows: Sequence[TrainingRow], after: int, _say: Callable[[str], None]
    ) -> Iterator[list[NumpyBatch]]:
        """See StepPlan."""
        for indices in self.steps(after):
            yield [collate([rows[i] for i in part]) for part in indices]

    def describe(self, report: TokenizeReport, noun: str, row: str) -> tuple[str, str]:
        """See StepPlan."""
        share = 100 * report.trained_tokens / max(1, report.tokens)
        size = min(self.batch_size * self.accumulation, len(self.lengths))
        return (
            f"{plural(report.kept, noun)}, {report.tokens} tokens, {report.trained_tokens} of them trained "
            f"({share:.0f} %)",
            f"{plural(self.total_steps, 'step')}, {self.steps_per_epoch} per epoch, {plural(size, row)} a step "
            f"({self.batch_size} x {self.accumulation})",
        )

    def steps(self, after: int = 0) -> Iterator[list[np.ndarray]]:
        """Example indices of the micro-batches of every step after step `after`."""
        epoch, position = divmod(after, self.steps_per_epoch)
        step = after
        while step < self.total_steps:
            for indices in self._epoch(epoch)[position : position + self.total_steps - step]:
                yield [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
                step += 1
            epoch, position = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        step_size = self.batch_size * self.accumulation
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        if not self.sort_by_length:
            return [order[i : i + step_size] for i in range(0, len(order), step_size)]
        stretch = step_size * STEPS_PER_SORTED_STRETCH
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            order[start : start + stretch] = part[np.argsort(-self.lengths[part], kind="stable")]
        steps = [order[i : i + step_size] for i in range(0, len(order), step_size)]
        # The longest rows come first in the first epoch: a run that cannot fit fails at once.
        first = 1 if epoch == 0 else 0
        longest = max(range(len(steps)), key=lambda i: int(self.lengths[steps[i]].max()))
        steps[0], steps[longest] = steps[longest], steps[0]
        shuffled = first + rng.permutation(len(steps) - first)
        return steps[:first] + [steps[i] for i in shuffled]


@dataclass(frozen=True)
class StreamPlan:
    """Steps through a stream: each takes the next `batch_size * accumulation` examples, regardless of epochs."""

    stream: Stream
    batch_size: int
    accumulation: int
    max_steps: int

    @property
    def total_steps(self) -> int:
        """See StepPlan."""
        return self.max_steps

    @property
    def step_size(self) -> int:
        """Examples of one step."""
        return self.batch_size * self.accumulation

    @property
    def visited(self) -> np.ndarray:
        """See StepPlan; none are known."""
        return np.arange(0)

    @property
    def digest(self) -> str:
        """See StepPlan."""
        return self.stream.digest

    @property
    def warnings(self) -> tuple[str, ...]:
        """See StepPlan."""
        return self.stream.warnings.lines()

    def epoch_at(self, step: int) -> float:
        """See StepPlan; 0 until the data have been read to their end."""
        return step * self.step_size / self.stream.per_pass if self.stream.per_pass else 0.0

    def rows_at(self, step: int) -> int:
        """See StepPlan."""
        return step * self.step_size

    def is_due(self, strategy: Strategy, every: int, step: int) -> bool:
        """See StepPlan; a stream has no epochs."""
        return strategy == "steps" and step % every == 0

    def read_past(self, after: int, digest: str) -> None:
        """See StepPlan."""
        logger.info("streaming: reading past the examples of %s", plural(after, "step"))
        for _ in islice(self.stream, after * self.step_size):
            pass
        if self.stream.digest != digest:
            raise UsageError(
                f"streaming: the {self.stream.taken} examples that the checkpoint was trained on have changed since; "
                "restore the data, or start again with overwrite_output_dir=true"
            )

    def batches(
        self, _rows: Sequence[TrainingRow], after: int, say: Callable[[str], None]
    ) -> Iterator[list[NumpyBatch]]:
        """See StepPlan; `say` is told, once, that the data begin again."""
        assert self.stream.taken == after * self.step_size, "the stream has not been read up to this step"
        while self.stream.taken < self.total_steps * self.step_size:
            before = self.stream.taken
            step = list(islice(self.stream, self.step_size))
            if before <= (self.stream.per_pass or math.inf) < self.stream.taken:
                say(f"streaming: all {self.stream.per_pass} examples have been seen; the data begin again")
            yield [collate(step[i : i + self.batch_size]) for i in range(0, len(step), self.batch_size)]

    def describe(self, _report: TokenizeReport, _noun: str, row: str) -> tuple[str, str]:
        """See StepPlan."""
        size = self.stream.buffer_size
        order = f"shuffled {plural(size, row)} at a time" if size > 1 else "in the order of the files"
        return (
            f"a stream, {order}; rows that are cut or left out are counted at the end",
            f"{plural(self.total_steps, 'step')}, {plural(self.step_size, row)} a step "
            f"({self.batch_size} x {self.accumulation})",
        )
