"""Pack several examples, which do not see each other, into rows of up to `cutoff_len` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from macft.data.tokenization.table import LazyRows, TokenizedExample


@dataclass(frozen=True)
class PackedExample:
    """Several examples in one row; each is a separate segment, with positions from 0."""

    parts: tuple[TokenizedExample, ...]


class PackedRows(LazyRows[PackedExample]):
    """Rows of several `examples`; `members[i]` are the indices of those in row i."""

    def __init__(self, examples: Sequence[TokenizedExample], members: Sequence[np.ndarray], lengths: np.ndarray):
        self.examples = examples
        self.members = members
        # int64 [rows], tokens of each row
        self.lengths = np.array([lengths[indices].sum() for indices in members], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.members)

    def row(self, index: int) -> PackedExample:
        """See LazyRows."""
        return PackedExample(tuple(self.examples[int(i)] for i in self.members[index]))


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Indices of the examples of each row: best-fit decreasing, the longest first into the fullest row that has room.

    `lengths` int [examples], none above `capacity`. But for a constant, at most 11/9 of the fewest rows (Johnson 1974).
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # tokens left -> rows that have just so many
    sizes: list[int] = []  # the keys of `room`, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(sizes, length)
        if at == len(sizes):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left = sizes[at]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[at]
        rows[row].append(index)
        left -= length
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


def pack(examples: Sequence[TokenizedExample], lengths: np.ndarray, cutoff_len: int) -> PackedRows:
    """Whole examples of supervised fine-tuning, in as few rows as best-fit decreasing finds."""
    return PackedRows(examples, best_fit(lengths, cutoff_len), lengths)


def chain(pieces: Sequence[TokenizedExample], lengths: np.ndarray, cutoff_len: int) -> PackedRows:
    """Rows of neighboring pieces that add up to `cutoff_len` tokens; the last row may be shorter.

    `pieces` are those of `texts.take_texts`, cut where a row is full. A row without a piece of two tokens or more is
    left out: it has no token to predict.
    """
    ends = np.cumsum(lengths)
    rows = np.split(np.arange(len(lengths)), np.flatnonzero(np.diff((ends - 1) // cutoff_len)) + 1)
    return PackedRows(pieces, [row for row in rows if lengths[row].max() > 1], lengths)
