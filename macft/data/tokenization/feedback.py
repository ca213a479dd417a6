"""Tokenize answers that are each rated desirable or not, and pair each with the answer to another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np

from macft.data.tokenization.table import DESIRABLE, Table, TokenizedExample


@dataclass(frozen=True)
class FeedbackReference:
    """What the reference model says of one row: log-probabilities summed over the answer, and over the other one."""

    logp: float
    mismatched_logp: float


@dataclass(frozen=True)
class TokenizedFeedback:
    """A prompt with its answer, and the same prompt with the answer to another; both masks begin after the prompt."""

    row: TokenizedExample
    mismatched: TokenizedExample
    is_desirable: bool
    reference: FeedbackReference | None = None


@dataclass(frozen=True, eq=False)
class Feedback(Sequence[TokenizedFeedback]):
    """The rated answers `indices` of a table, each made when it is asked for.

    `partners` int64 [rows]: the rows of the table whose answers theirs are compared with. `references` float64
    [rows, 2]: the fields of FeedbackReference; nan in the first where there is none.
    """

    table: Table
    indices: np.ndarray
    partners: np.ndarray
    cutoff_len: int
    references: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedFeedback: ...
    @overload
    def __getitem__(self, index: slice) -> Feedback: ...
    def __getitem__(self, index: int | slice) -> TokenizedFeedback | Feedback:
        if isinstance(index, slice):
            references = self.references[index] if self.references is not None else None
            return Feedback(self.table, self.indices[index], self.partners[index], self.cutoff_len, references)
        at, partner = int(self.indices[index]), int(self.partners[index])
        reference = None
        if self.references is not None and not np.isnan(self.references[index, 0]):
            reference = FeedbackReference(*map(float, self.references[index]))
        row = self.table.row(at)
        other = mismatched(row, self.table.row(partner), self.cutoff_len)
        return TokenizedFeedback(row, other, bool(self.is_desirable[index]), reference)

    @cached_property
    def is_desirable(self) -> np.ndarray:
        """bool [rows]."""
        desirable: np.ndarray = self.table.columns["flags"][self.indices] & DESIRABLE > 0
        return desirable

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each with its own answer or with the other one, whichever are more."""
        others = self.table.columns["prompt_length"][self.indices] + self.table.columns["trained"][self.partners]
        lengths: np.ndarray = np.maximum(self.table.lengths[self.indices], np.minimum(others, self.cutoff_len))
        return lengths

    def take(self, indices: np.ndarray) -> Feedback:
        """Some of the rows, without references."""
        return Feedback(self.table, self.indices[indices], self.partners[indices], self.cutoff_len)

    def with_references(self, references: np.ndarray) -> Feedback:
        """The same rows with what the reference model says of each, [rows, 2] as in `references`."""
        return replace(self, references=references)


def mismatched(row: TokenizedExample, other: TokenizedExample, cutoff_len: int) -> TokenizedExample:
    """The prompt of `row` with the answer of `other`, which loses its end where it is too long."""
    prompt, answer = row.tokens[~row.loss_mask], other.tokens[other.loss_mask]
    tokens = np.concatenate([prompt, answer])[:cutoff_len]
    return TokenizedExample(tokens, np.arange(len(tokens)) >= len(prompt))


def partners(count: int, block: int) -> np.ndarray:
    """int64 [count]: whose answer each row gets; the one before it, and the first of a block that of its last.

    Blocks have `block` rows, 2 at least, and the last one what is left; a single row left over joins the block before.
    """
    size = max(2, block)
    starts = np.arange(0, count, size)
    if count > 1 and count - starts[-1] == 1:
        starts = starts[:-1]
    ends = np.append(starts[1:], count)
    found = np.arange(count) - 1
    found[starts] = ends - 1
    return found
