"""Tokenized examples in, numpy batches out: padding, seeded order, length-sorted steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from macft.data.tokenize import TokenizedExample

Array = TypeVar("Array")

# Sorting whole stretches of this many steps keeps padding low and the order random.
STEPS_PER_SORTED_STRETCH = 50


@dataclass(frozen=True)
class Batch(Generic[Array]):
    """Rows of one forward pass; numpy until a backend maps it to its own arrays."""

    tokens: Array  # int32 [rows, T], right-padded with 0
    loss_mask: Array  # bool [rows, T]; True where the token is a training target
    lengths: Array  # int32 [rows], real tokens per row

    def map(self, convert: Callable[[Array], Any]) -> Batch[Any]:
        """The same batch with every column converted."""
        return Batch(**{field.name: convert(getattr(self, field.name)) for field in fields(self)})


NumpyBatch = Batch[np.ndarray]


def collate(examples: Sequence[TokenizedExample]) -> NumpyBatch:
    """Stack examples into one right-padded batch; padding is never a target."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    shape = (len(examples), int(lengths.max()))
    tokens = np.zeros(shape, dtype=np.int32)
    loss_mask = np.zeros(shape, dtype=bool)
    for row, example in enumerate(examples):
        tokens[row, : lengths[row]] = example.tokens
        loss_mask[row, : lengths[row]] = example.loss_mask
    return Batch(tokens=tokens, loss_mask=loss_mask, lengths=lengths)


def in_order(examples: Sequence[TokenizedExample], batch_size: int) -> Iterator[NumpyBatch]:
    """Batches of neighbouring lengths that cover all examples once, for evaluation."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].tokens))
    for start in range(0, len(order), batch_size):
        yield collate([examples[index] for index in order[start : start + batch_size]])


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
        order = rng.permutation(len(self.lengths))
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
