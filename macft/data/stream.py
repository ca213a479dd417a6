"""Rows that are read anew for each pass in; tokenized examples, shuffled a buffer at a time and without end, out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from macft.data.cache.workers import Encoder, Row, chunks
from macft.data.tokenization.packing import PackedExample
from macft.data.tokenization.table import ANSWER_CUT, EMPTIED, SHORTENED, Table, TokenizedExample, fingerprint
from macft.errors import DataError

logger = logging.getLogger("macft")

Streamed = TokenizedExample | PackedExample

# encoded at once, unless the buffer is smaller: as fast as thousands, and the first step need not wait
ROWS_AT_ONCE = 64


class Once(logging.Filter):
    """Lets each message through once: a file that is read again says the same again."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new

    @contextmanager
    def applied(self) -> Iterator[None]:
        """To everything that is logged inside."""
        logger.addFilter(self)
        try:
            yield
        finally:
            logger.removeFilter(self)


@dataclass
class Fates:
    """What became of the rows of the first pass: how many, and for each kind of loss how many and the first."""

    rows: int = 0
    losses: dict[str, tuple[int, str]] = field(default_factory=dict)

    def count(self, table: Table, rows: list[Row], *, are_texts: bool, cutoff_len: int) -> None:
        """Take in rows and the table that they became."""
        self.rows += len(rows)
        columns = table.columns
        left_out = "are empty and are left out" if are_texts else "have nothing to train on and are left out"
        for which, what in (
            (columns["special"] >= 0, "hold special tokens in their text, which stay special"),
            (columns["flags"] & SHORTENED > 0, f"lost user text to fit cutoff_len {cutoff_len}"),
            (columns["flags"] & EMPTIED > 0, f"lost all user text to fit cutoff_len {cutoff_len}"),
            (columns["flags"] & ANSWER_CUT > 0, f"lost the end of their last answer to fit cutoff_len {cutoff_len}"),
            (columns["skip_reason"] > 0, left_out),
        ):
            if which.any():
                count, first = self.losses.get(what, (0, rows[int(np.argmax(which))].source))
                self.losses[what] = (count + int(which.sum()), first)


@dataclass
class Stream(Iterator[Streamed]):
    """The examples of `rows()`, one pass after the other without end; each pass has an order of its own.

    No more than `buffer_size` examples are held, and as many rows as are encoded at once. Of a buffer of one
    the order is that of the rows; of one that holds all of them, any order is as likely as another.
    """

    rows: Callable[[], Iterator[Row]]
    encoder: Encoder
    packing: bool  # texts alone: rows of cutoff_len, as `packing.chain` makes them
    buffer_size: int
    seed: int
    once: Once = field(default_factory=Once)
    fates: Fates = field(default_factory=Fates)
    # examples of one pass; None until the data have been read to their end
    per_pass: int | None = None
    taken: int = 0
    _digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    @property
    def digest(self) -> str:
        """Names the examples taken so far, and their order."""
        return self._digest.hexdigest()

    def check(self) -> None:
        """Read up to the first example. Raises DataError: data missing, invalid up to there, or nothing to train on."""
        if next(self._examples(Fates()), None) is None:
            raise DataError(_NOTHING)

    def __next__(self) -> Streamed:
        """The next example. Raises DataError when it comes to a invalid row, naming all of that file."""
        return next(self._passes)

    @cached_property
    def _passes(self) -> Iterator[Streamed]:
        return self._one_after_the_other()

    def _one_after_the_other(self) -> Iterator[Streamed]:
        number = 0
        while True:
            fates, before = self.fates if number == 0 else Fates(), self.taken
            for example in self._shuffled(self._examples(fates), np.random.default_rng([self.seed, number])):
                self.taken += 1
                parts = example.parts if isinstance(example, PackedExample) else (example,)
                self._digest.update(fingerprint([part.tokens for part in parts]).to_bytes(8, "little"))
                yield example
            if self.taken == before:
                raise DataError(_NOTHING)
            number += 1

    def tell(self) -> None:
        """Warn of what was lost in the first pass, as far as it was read."""
        noun = "texts" if self.encoder.kind == "pt" else "examples"
        for what, (count, first) in self.fates.losses.items():
            logger.warning("%d of %d %s %s (first: %s)", count, self.fates.rows, noun, what, first)

    def _shuffled(self, examples: Iterator[Streamed], rng: np.random.Generator) -> Iterator[Streamed]:
        buffer: list[Streamed] = []
        for count, example in enumerate(self._counted(examples), start=1):
            if count <= self.buffer_size:
                buffer.append(example)
                continue
            at = int(rng.integers(self.buffer_size))
            buffer[at], example = example, buffer[at]
            yield example
        # from the end, so that what is taken is held no longer
        order = rng.permutation(len(buffer))
        buffer = [buffer[i] for i in order]
        while buffer:
            yield buffer.pop()

    def _counted(self, examples: Iterator[Streamed]) -> Iterator[Streamed]:
        count = 0
        for example in examples:
            count += 1
            yield example
        self.per_pass = self.per_pass or count

    def _examples(self, fates: Fates) -> Iterator[Streamed]:
        """One pass, in the order of the rows."""
        pieces = self._pieces(fates)
        return _chained(pieces, self.encoder.cutoff_len) if self.packing else pieces

    def _pieces(self, fates: Fates) -> Iterator[TokenizedExample]:
        are_texts, cutoff_len = self.encoder.kind == "pt", self.encoder.cutoff_len
        for chunk in self._chunks():
            table = self.encoder(chunk)
            fates.count(table, chunk, are_texts=are_texts, cutoff_len=cutoff_len)
            for index in np.flatnonzero(table.columns["skip_reason"] == 0).tolist():
                row = table.row(index)
                if self.packing:
                    yield row
                elif are_texts:
                    yield from _cut(row.tokens, cutoff_len)
                else:
                    # a copy: one row in the buffer must not keep the whole table in memory
                    yield TokenizedExample(row.tokens.copy(), row.loss_mask.copy())

    def _chunks(self) -> Iterator[list[Row]]:
        read = chunks(self.rows(), min(ROWS_AT_ONCE, self.buffer_size))
        while True:
            with self.once.applied():
                chunk = next(read, None)
            if chunk is None:
                return
            yield chunk


_NOTHING = "streaming: the data hold no example with something to train on; look at them with data check"


def _cut(tokens: np.ndarray, cutoff_len: int) -> Iterator[TokenizedExample]:
    """As `texts.take_texts` cuts a text that is not packed."""
    for start in range(0, len(tokens), cutoff_len):
        piece = tokens[start : start + cutoff_len].copy()
        if len(piece) > 1:
            yield TokenizedExample(piece, np.arange(len(piece)) > 0)


def _chained(texts: Iterable[TokenizedExample], cutoff_len: int) -> Iterator[PackedExample]:
    """As `texts.take_texts` packs texts: cut where a row is full, so that every row but the last is."""
    parts: list[TokenizedExample] = []
    room = cutoff_len
    for text in texts:
        start = 0
        while start < len(text.tokens):
            piece = text.tokens[start : start + room].copy()
            parts.append(TokenizedExample(piece, np.arange(len(piece)) > 0))
            start, room = start + len(piece), room - len(piece)
            if room == 0:
                yield from _row(parts)
                parts, room = [], cutoff_len
    yield from _row(parts)


def _row(parts: list[TokenizedExample]) -> Iterator[PackedExample]:
    """A row in which some token has one before it."""
    if any(len(part.tokens) > 1 for part in parts):
        yield PackedExample(tuple(parts))
