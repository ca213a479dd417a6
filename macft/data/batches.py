"""Collate tokenized examples, packed rows and pairs into padded numpy batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from macft.data.tokenization.packing import PackedExample
from macft.data.tokenization.table import TokenizedExample, TokenizedFeedback, TokenizedPair
from macft.objectives.batch import Batch, NumpyBatch

# What batches are made from; a pair, like a rated answer, becomes two rows of one.
TrainingRow = TokenizedExample | TokenizedPair | PackedExample | TokenizedFeedback


@runtime_checkable
class Measured(Protocol):
    """Rows whose lengths are known before they are read."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each row, of a pair those of the longer side."""


def collate(examples: Sequence[TrainingRow]) -> NumpyBatch:
    """Stack rows of one kind into a right-padded batch; padding is never a target."""
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
    batch = _stack([_joined(row.parts) for row in rows])
    segment_ids = np.zeros(batch.tokens.shape, dtype=np.int32)
    for i, row in enumerate(rows):
        lengths = [len(part.tokens) for part in row.parts]
        segment_ids[i, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    # the token before an example belongs to another one, and cannot predict its first token
    begins = np.diff(segment_ids, axis=1, prepend=0) != 0
    return replace(batch, loss_mask=batch.loss_mask & ~begins, segment_ids=segment_ids)


def _joined(parts: Sequence[TokenizedExample]) -> TokenizedExample:
    masks = [part.loss_mask for part in parts]
    return TokenizedExample(np.concatenate([part.tokens for part in parts]), np.concatenate(masks))


def unpack(batch: NumpyBatch) -> NumpyBatch:
    """The examples of packed rows, one per row and in order, without those of a single token."""
    assert batch.segment_ids is not None, "the rows are not packed"
    parts = []
    for tokens, mask, segments in zip(batch.tokens, batch.loss_mask, batch.segment_ids, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            parts.append(TokenizedExample(tokens[segments == segment], mask[segments == segment]))
    # a model reads all tokens but the last: nothing, if there is only one
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


def row_length(example: TrainingRow) -> int:
    """Tokens of the example or packed row; of the longer row where it becomes two."""
    if isinstance(example, TokenizedPair):
        return max(len(example.chosen.tokens), len(example.rejected.tokens))
    if isinstance(example, PackedExample):
        return sum(len(part.tokens) for part in example.parts)
    if isinstance(example, TokenizedFeedback):
        return max(len(example.row.tokens), len(example.mismatched.tokens))
    return len(example.tokens)


def lengths_of(rows: Sequence[TrainingRow]) -> np.ndarray:
    """int64 [rows]: `row_length` of each, without reading rows whose lengths are known."""
    if isinstance(rows, Measured):
        return rows.lengths
    return np.array([row_length(row) for row in rows], dtype=np.int64)


def in_order(examples: Sequence[TrainingRow], batch_size: int) -> Iterator[tuple[np.ndarray, NumpyBatch]]:
    """Batches of neighboring lengths that cover all examples once, each with the indices of its examples."""
    order = np.argsort(-lengths_of(examples), kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([examples[index] for index in indices])
