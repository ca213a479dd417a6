"""Tokenized examples or a stream of them in, numpy batches out: padding, seeded order, length-sorted steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from macft.data.stream import Stream
from macft.data.tokenization.feedback import TokenizedFeedback
from macft.data.tokenization.packing import PackedExample
from macft.data.tokenization.table import TokenizedExample, TokenizedPair
from macft.errors import UsageError
from macft.objectives.batch import Batch, NumpyBatch

# What a row of a batch is made of; a pair makes two rows, and so does a rated answer.
Row = TokenizedExample | TokenizedPair | PackedExample | TokenizedFeedback


@runtime_checkable
class Measured(Protocol):
    """Rows whose lengths are known before they are read."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each, of a pair those of the longer side."""


# Sorting whole stretches of this many steps keeps padding low and the order random.
STEPS_PER_SORTED_STRETCH = 50


def collate(examples: Sequence[Row]) -> NumpyBatch:
    """Stack rows of one sort into a right-padded batch; padding is never a target."""
    pairs = [example for example in examples if isinstance(example, TokenizedPair)]
    if pairs:
        return _collate_pairs(pairs)
    packed = [example for example in examples if isinstance(example, PackedExample)]
    if packed:
        return _collate_packed(packed)
    feedback = [example for example in examples if isinstance(example, TokenizedFeedback)]
    if feedback:
        return _collate_feedback(feedback)
    return _stack([example for example in examples if isinstance(example, TokenizedExample)])


def _collate_packed(rows: Sequence[PackedExample]) -> NumpyBatch:
    joined = [TokenizedExample(*(np.concatenate(column) for column in _columns(row))) for row in rows]
    batch = _stack(joined)
    segment_ids = np.zeros(batch.tokens.shape, dtype=np.int32)
    for i, row in enumerate(rows):
        lengths = [len(part.tokens) for part in row.parts]
        segment_ids[i, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    # what stands before the first token of an example is no part of it, and says nothing about it
    begins = np.diff(segment_ids, axis=1, prepend=0) != 0
    return replace(batch, loss_mask=batch.loss_mask & ~begins, segment_ids=segment_ids)


def _columns(row: PackedExample) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [part.tokens for part in row.parts], [part.loss_mask for part in row.parts]


def unpack(batch: NumpyBatch) -> NumpyBatch:
    """The examples of packed rows, one a row, in the order in which they stand, but for those of one token."""
    assert batch.segment_ids is not None, "the rows are not packed"
    parts = []
    for tokens, mask, segments in zip(batch.tokens, batch.loss_mask, batch.segment_ids, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            parts.append(TokenizedExample(tokens[segments == segment], mask[segments == segment]))
    # a model that reads all tokens but the last would read nothing of a single one
    return _stack([part for part in parts if len(part.tokens) > 1])


def _stack(rows: Sequence[TokenizedExample]) -> NumpyBatch:
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int32)
    shape = (len(rows), int(lengths.max()))
    tokens = np.zeros(shape, dtype=np.int32)
    loss_mask = np.zeros(shape, dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = row.tokens
        loss_mask[i, : lengths[i]] = row.loss_mask
    return Batch(tokens=tokens, loss_mask=loss_mask, lengths=lengths)


def _collate_pairs(pairs: Sequence[TokenizedPair]) -> NumpyBatch:
    batch = _stack([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])
    prompt_mask = np.zeros(batch.tokens.shape, dtype=bool)
    for i, pair in enumerate(pairs):
        prompt_mask[i, 1 : pair.prompt_length] = True
    batch = replace(batch, prompt_mask=prompt_mask)
    references = [pair.reference for pair in pairs if pair.reference is not None]
    assert len(references) in (0, len(pairs)), "some pairs of a batch have a reference, others none"
    if not references:
        return batch
    logps = [r.chosen_logp for r in references] + [r.rejected_logp for r in references]
    return replace(
        batch,
        reference_logps=np.array(logps, dtype=np.float32),
        reference_log_perplexity=np.array([r.log_perplexity for r in references], dtype=np.float32),
    )


def _collate_feedback(rows: Sequence[TokenizedFeedback]) -> NumpyBatch:
    batch = _stack([*(row.row for row in rows), *(row.mismatched for row in rows)])
    batch = replace(batch, desirable=np.array([row.is_desirable for row in rows]))
    references = [row.reference for row in rows if row.reference is not None]
    assert len(references) in (0, len(rows)), "some rows of a batch have a reference, others none"
    if not references:
        return batch
    logps = [r.logp for r in references] + [r.mismatched_logp for r in references]
    return replace(batch, reference_logps=np.array(logps, dtype=np.float32))


def row_length(example: Row) -> int:
    """Tokens of the example, of a packed row, or of the longer row of what makes two."""
    if isinstance(example, TokenizedPair):
        return max(len(example.chosen.tokens), len(example.rejected.tokens))
    if isinstance(example, PackedExample):
        return sum(len(part.tokens) for part in example.parts)
    if isinstance(example, TokenizedFeedback):
        return max(len(example.row.tokens), len(example.mismatched.tokens))
    return len(example.tokens)


def lengths_of(rows: Sequence[Row]) -> np.ndarray:
    """int64 [rows]: `row_length` of each, without reading those that know it."""
    if isinstance(rows, Measured):
        return rows.lengths
    return np.array([row_length(row) for row in rows], dtype=np.int64)


def in_order(examples: Sequence[Row], batch_size: int) -> Iterator[tuple[np.ndarray, NumpyBatch]]:
    """Batches of neighboring lengths that cover all examples once, each with the indices of its examples."""
    order = np.argsort(-lengths_of(examples), kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([examples[index] for index in indices])


@dataclass(frozen=True)
class Plan:
    """Which examples every step trains on; a pure function of the lengths and the seed.

    One step takes `batch_size * accumulation` examples, cut into `accumulation` micro-batches.
    The last step of an epoch is smaller when the numbers do not divide: nothing is dropped.
    """

    lengths: np.ndarray  # int [examples]
    batch_size: int
    accumulation: int
    epochs: float
    max_steps: int  # -1: as many as `epochs` asks for
    seed: int
    sort_by_length: bool
    shuffle: bool = True  # False: every epoch in the order of the examples

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
        """Indices of the examples that some step trains on, ascending: all, unless the plan ends before its epoch."""
        if self.total_steps >= self.steps_per_epoch:
            return np.arange(len(self.lengths))
        return np.sort(np.concatenate([indices for step in self.steps() for indices in step]))

    def epoch_at(self, step: int) -> float:
        """How many times the examples have been gone through after `step`."""
        return step / self.steps_per_epoch

    def is_due(self, strategy: Literal["no", "steps", "epoch"], every: int, step: int) -> bool:
        """Whether something that comes each `every` steps, or each epoch and at the end, comes after `step`."""
        if strategy == "steps":
            return step % every == 0
        return strategy == "epoch" and (step % self.steps_per_epoch == 0 or step == self.total_steps)

    def steps(self, after: int = 0) -> Iterator[list[np.ndarray]]:
        """Example indices of the micro-batches of every step from the one after `after` on."""
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
    """Which examples of a stream every step trains on: the next `batch_size * accumulation`, whatever the epoch."""

    stream: Stream
    batch_size: int
    accumulation: int
    max_steps: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps

    @property
    def step_size(self) -> int:
        """Examples of one step."""
        return self.batch_size * self.accumulation

    def epoch_at(self, step: int) -> float:
        """How many times the data have been gone through after `step`; 0 until they have been read to their end."""
        return step * self.step_size / self.stream.per_pass if self.stream.per_pass else 0.0

    def is_due(self, strategy: Literal["no", "steps", "epoch"], every: int, step: int) -> bool:
        """Whether something that comes each `every` steps comes after `step`; a stream has no epochs."""
        return strategy == "steps" and step % every == 0

    def read_past(self, after: int, digest: str) -> None:
        """Take from the stream what the first `after` steps took; `digest` is that of the stream at the time.

        Raises UsageError where it is another one now.
        """
        for _ in islice(self.stream, after * self.step_size):
            pass
        if self.stream.digest != digest:
            raise UsageError(
                f"streaming: the {self.stream.taken} examples that the checkpoint was trained on are others now; "
                "put the data back as they were, or start anew with overwrite_output_dir=true"
            )

    def batches(self, say: Callable[[str], None]) -> Iterator[list[NumpyBatch]]:
        """The micro-batches of every step that is left; `say` is told, once, that the data begin again."""
        while self.stream.taken < self.total_steps * self.step_size:
            before = self.stream.taken
            step = list(islice(self.stream, self.step_size))
            if before <= (self.stream.per_pass or math.inf) < self.stream.taken:
                say(f"streaming: all {self.stream.per_pass} examples have been seen; the data begin again")
            yield [collate(step[i : i + self.batch_size]) for i in range(0, len(step), self.batch_size)]
