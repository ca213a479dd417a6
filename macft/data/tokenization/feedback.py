"""Tokenize rated answers, and match each prompt with the answer to another prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from macft.data.formats.feedback import FeedbackExample
from macft.data.tokenization.conversations import encode_examples, take_examples
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.report import TokenizeReport
from macft.data.tokenization.table import DESIRABLE, Examples, Feedback, Table
from macft.errors import DataError


def encode_feedback(
    examples: Sequence[FeedbackExample], encoding: Encoding, files: Mapping[str, int] | None = None
) -> Table:
    """A table of all conversations, each with its last answer as the target, and its rating."""
    table = encode_examples(examples, only_last(encoding), files)
    columns = table.columns.copy()
    columns["flags"] |= np.array([DESIRABLE * example.is_desirable for example in examples], dtype=np.uint8)
    return replace(table, columns=columns)


def take_feedback(
    table: Table, encoding: Encoding, indices: np.ndarray | None = None, *, packing: bool = False
) -> tuple[Feedback, TokenizeReport]:
    """The trainable rows of a table (of its rows `indices`), all in one block of partners, and the counts.

    Raises DataError when none is left, or only one, which has no other answer to be compared with.
    """
    assert not packing, "rated answers are not packed"
    kept, report = take_examples(table, encoding, indices)
    assert isinstance(kept, Examples)
    if len(kept) == 1:
        raise DataError(
            "a single rated answer cannot be trained on: the KL term of KTO compares it with others; add rows"
        )
    return in_blocks(Feedback(table, kept.indices, kept.indices, encoding.cutoff_len), len(kept)), report


def only_last(encoding: Encoding) -> Encoding:
    """The same encoding, with the last answer as the only target."""
    return replace(encoding, mask_history=True, train_on_prompt=False)


def in_blocks(rows: Feedback, block: int) -> Feedback:
    """The rows without references, each with a partner in its block of `block` rows."""
    return replace(rows, partners=rows.indices[partners(len(rows), block)], references=None)


def partners(count: int, block: int) -> np.ndarray:
    """int64 [count]: whose answer each row gets: that of the row before, and the first row of a block that of its last.

    Blocks have `block` rows, at least 2, the last one fewer; a single leftover row joins the block before it.
    """
    size = max(2, block)
    starts = np.arange(0, count, size)
    if count > 1 and count - starts[-1] == 1:
        starts = starts[:-1]
    ends = np.append(starts[1:], count)
    found = np.arange(count) - 1
    found[starts] = ends - 1
    return found
