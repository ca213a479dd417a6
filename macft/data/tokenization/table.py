"""Keep tokenized rows in flat arrays, in memory or mapped from disk, and make examples and pairs from them."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, overload

import numpy as np

# what is known about each row, whether or not it is trained on
COLUMNS = np.dtype(
    [
        ("file", "<i4"),  # index of the file it comes from; -1: not known
        ("line", "<i8"),
        ("skip_reason", "u1"),  # 0: it is trained on; else the number of the reason why not
        ("flags", "u1"),
        ("boundary_tokens", "<i4"),  # tokens on both sides of a trained span's border
        ("special", "<i4"),  # the first special token in its text, as an index of special_strings; -1: none
        ("prompt_length", "<i4"),  # of pairs
        ("trained", "<i8"),  # tokens that are targets
        ("fingerprint", "<u8"),  # of its tokens
    ]
)
SHORTENED, EMPTIED, ANSWER_CUT, IDENTICAL, DESIRABLE = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class TokenizedExample:
    """`tokens` int32 [T]; `loss_mask` bool [T], where True means that the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Reference:
    """The reference model's log-probabilities of one pair, summed over each answer."""

    chosen_logp: float
    rejected_logp: float
    # mean negative log-probability of the prompt's tokens after the first; nan: not computed
    log_perplexity: float


@dataclass(frozen=True)
class TokenizedPair:
    """Two rows that begin with the same `prompt_length` tokens; each loss mask is True from there to the row's end."""

    chosen: TokenizedExample
    rejected: TokenizedExample
    prompt_length: int
    reference: Reference | None = None


@dataclass(frozen=True)
class FeedbackReference:
    """The reference model's log-probabilities of one row, summed over its answer and over the mismatched one."""

    logp: float
    mismatched_logp: float


@dataclass(frozen=True)
class TokenizedFeedback:
    """A prompt with its answer, and the same prompt with the answer to another; both masks begin after the prompt."""

    row: TokenizedExample
    mismatched: TokenizedExample
    is_desirable: bool
    reference: FeedbackReference | None = None


@dataclass(frozen=True)
class Table:
    """All rows of some data, one after the other; row i has `columns[i]` and, unless it is left out, tokens.

    `tokens` int32 and `loss_mask` bool [tokens]; `offsets` int64 [width * rows + 1] are where they begin.
    `width` 2: pairs, whose chosen and rejected tokens alternate. `files`: what `columns["file"]` indexes.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    columns: np.ndarray
    width: int
    files: tuple[str, ...] = ()
    digest: str = ""  # of the tokens, masks and offsets; empty: not computed

    def __len__(self) -> int:
        return len(self.columns)

    def row(self, index: int) -> TokenizedExample:
        """The tokens between two offsets."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return TokenizedExample(self.tokens[start:end], self.loss_mask[start:end])

    def source(self, index: int) -> str:
        """The place of row `index`, as file:line."""
        file, line = int(self.columns["file"][index]), int(self.columns["line"][index])
        return f"{self.files[file] if file >= 0 else '?'}:{line}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each row, of a pair those of the longer side."""
        return np.asarray(np.diff(self.offsets).reshape(-1, self.width).max(axis=1))

    @cached_property
    def totals(self) -> np.ndarray:
        """int64 [rows]: tokens of each row, of a pair those of both sides."""
        return np.diff(self.offsets[:: self.width])


RowT_co = TypeVar("RowT_co", covariant=True)


class LazyRows(Sequence[RowT_co]):
    """Rows that are each made on demand; a slice is a list of them."""

    @abstractmethod
    def row(self, index: int) -> RowT_co:
        """Make row `index`, from 0."""

    @overload
    def __getitem__(self, index: int) -> RowT_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowT_co]: ...
    def __getitem__(self, index: int | slice) -> RowT_co | list[RowT_co]:
        chosen = range(len(self))[index]
        return self.row(chosen) if isinstance(chosen, int) else [self.row(i) for i in chosen]


@dataclass(frozen=True, eq=False)
class TableRows(LazyRows[RowT_co]):
    """The rows `indices` of a table."""

    table: Table
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each row, of a pair those of the longer side."""
        return np.asarray(self.table.lengths[self.indices])


class Examples(TableRows[TokenizedExample]):
    """The examples `indices` of a table."""

    def row(self, index: int) -> TokenizedExample:
        """See LazyRows."""
        return self.table.row(int(self.indices[index]))


@dataclass(frozen=True, eq=False)
class Pairs(TableRows[TokenizedPair]):
    """The pairs `indices` of a table.

    `references` float64 [pairs, 3]: the fields of Reference; nan in the first where there is none.
    """

    references: np.ndarray | None = None

    def row(self, index: int) -> TokenizedPair:
        """See LazyRows."""
        at = int(self.indices[index])
        reference = None
        if self.references is not None and not np.isnan(self.references[index, 0]):
            reference = Reference(*map(float, self.references[index]))
        length = int(self.table.columns["prompt_length"][at])
        return TokenizedPair(self.table.row(2 * at), self.table.row(2 * at + 1), length, reference)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [pairs]: tokens that both sides of each share."""
        return np.asarray(self.table.columns["prompt_length"][self.indices])

    def take(self, indices: np.ndarray) -> Pairs:
        """Some of the pairs, without references."""
        return Pairs(self.table, self.indices[indices])


@dataclass(frozen=True, eq=False)
class Feedback(TableRows[TokenizedFeedback]):
    """The rated answers `indices` of a table.

    `partners` int64 [rows]: the rows of the table whose answers theirs are compared with. `references` float64
    [rows, 2]: the fields of FeedbackReference; nan in the first where there is none.
    """

    partners: np.ndarray
    cutoff_len: int
    references: np.ndarray | None = None

    def row(self, index: int) -> TokenizedFeedback:
        """See LazyRows."""
        at, partner = int(self.indices[index]), int(self.partners[index])
        reference = None
        if self.references is not None and not np.isnan(self.references[index, 0]):
            reference = FeedbackReference(*map(float, self.references[index]))
        row = self.table.row(at)
        other = mismatched(row, self.table.row(partner), self.cutoff_len)
        return TokenizedFeedback(row, other, bool(self.is_desirable[index]), reference)

    @cached_property
    def is_desirable(self) -> np.ndarray:
        """bool [rows]: the rating of each."""
        return np.asarray(self.table.columns["flags"][self.indices] & DESIRABLE > 0)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each with its own answer or with its partner's, whichever is longer."""
        own, answers = self.table.lengths[self.indices], self.table.columns["trained"]
        others = own - answers[self.indices] + answers[self.partners]
        return np.asarray(np.maximum(own, np.minimum(others, self.cutoff_len)))

    def take(self, indices: np.ndarray) -> Feedback:
        """Some of the rows, without references."""
        return Feedback(self.table, self.indices[indices], self.partners[indices], self.cutoff_len)


def mismatched(row: TokenizedExample, other: TokenizedExample, cutoff_len: int) -> TokenizedExample:
    """The prompt of `row` with the answer of `other`, which loses its end where the two are too long."""
    prompt, answer = row.tokens[: row.loss_mask.argmax()], other.tokens[other.loss_mask]
    tokens = np.concatenate([prompt, answer])[:cutoff_len]
    return TokenizedExample(tokens, np.arange(len(tokens)) >= len(prompt))


Rows = Sequence[TokenizedExample] | Sequence[TokenizedPair] | Sequence[TokenizedFeedback]


def fingerprints(rows: Rows) -> np.ndarray:
    """uint64 [rows]: equal for equal tokens (of a pair: of both sides); rows in a table need not be read."""
    if isinstance(rows, TableRows):
        return np.asarray(rows.table.columns["fingerprint"][rows.indices])
    return np.array([fingerprint([side.tokens for side in _sides(row)]) for row in rows], dtype=np.uint64)


def _sides(row: TokenizedExample | TokenizedPair | TokenizedFeedback) -> tuple[TokenizedExample, ...]:
    if isinstance(row, TokenizedPair):
        return row.chosen, row.rejected
    return (row.row,) if isinstance(row, TokenizedFeedback) else (row,)


def fingerprint(parts: Sequence[np.ndarray]) -> int:
    """A number of 64 bits that tells one row's tokens from another's."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # without its length, the border between two answers could move unnoticed
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest(), "little")


class TableBuilder:
    """Builds a table row by row."""

    def __init__(self, width: int, files: Mapping[str, int] | None = None) -> None:
        self._width = width
        self._are_files_known = files is not None
        self._files = dict(files or {})
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._columns: list[tuple[int, ...]] = []

    def add(
        self,
        source: str,
        sides: Sequence[TokenizedExample],
        *,
        skip_reason: int = 0,
        flags: int = 0,
        boundary_tokens: int = 0,
        special: int = -1,
        prompt_length: int = 0,
    ) -> None:
        """Add one row; with a skip_reason it is counted, but its tokens are not kept."""
        path, _, line = source.rpartition(":")
        if not self._are_files_known:
            self._files.setdefault(path, len(self._files))
        place = (self._files.get(path, -1), int(line))
        if skip_reason:
            sides = [_NOTHING] * self._width
            boundary_tokens = 0
        self._tokens += [side.tokens for side in sides]
        self._masks += [side.loss_mask for side in sides]
        trained = sum(int(np.count_nonzero(side.loss_mask)) for side in sides)
        mark = fingerprint([side.tokens for side in sides])
        self._columns.append((*place, skip_reason, flags, boundary_tokens, special, prompt_length, trained, mark))

    def table(self) -> Table:
        """The table of all added rows."""
        lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        return Table(
            tokens=np.concatenate([_NOTHING.tokens, *self._tokens]),
            loss_mask=np.concatenate([_NOTHING.loss_mask, *self._masks]),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            columns=np.array(self._columns, dtype=COLUMNS),
            width=self._width,
            files=tuple(self._files),
        )


_NOTHING = TokenizedExample(np.zeros(0, np.int32), np.zeros(0, bool))
