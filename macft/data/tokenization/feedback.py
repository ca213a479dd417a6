"""Tokenize answers that are each rated desirable or not, and pair each with the answer to another prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from macft.data.tokenization.table import TokenizedExample


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
