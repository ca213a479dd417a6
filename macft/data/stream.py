"""Read rows during training: tokenize them, shuffle them through a buffer, and repeat the data endlessly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from macft.data.cache.workers import Encoder, chunks
from macft.data.formats.reader import DataRow
from macft.data.kinds import Streamed
from macft.data.notes import Note, log_notes
from macft.data.tokenization.packing import PackedExample
from macft.data.tokenization.report import RowWarnings
from macft.data.tokenization.table import Table, fingerprint
from macft.errors import DataError

# rows encoded at once, unless the buffer is smaller: as fast as thousands, and the first step need not wait
ROWS_AT_ONCE = 64

_NOTHING = "streaming: the data contain no example with anything to train on; run macft data check on them"


@dataclass
class Stream(Iterator[Streamed]):
    """The examples of `rows(say)`, pass after pass without end; each pass has its own order.

    It holds at most `buffer_size` examples, and the rows that are encoded at once. A buffer of one keeps the order
    of the rows; with a buffer that holds all of them, every order is equally likely.
    """

    rows: Callable[[Callable[[Note], None]], Iterator[DataRow]]
    encoder: Encoder
    packing: bool  # only for texts: rows of cutoff_len, as `packing.chain` makes them
    buffer_size: int
    seed: int
    # examples of one pass; None until the data have been read to their end
    per_pass: int | None = None
    taken: int = 0
    _said: set[Note] = field(default_factory=set)
    _digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    @property
    def digest(self) -> str:
        """Identifies the examples taken so far, and their order."""
        return self._digest.hexdigest()

    @cached_property
    def warnings(self) -> RowWarnings:
        """What was lost in the first pass so far."""
        return self._new_warnings()

    def say(self, note: Note) -> None:
        """Log a note about a file, only the first time that it is read."""
        if note not in self._said:
            self._said.add(note)
            log_notes([note])

    def check(self) -> None:
        """Read up to the first example. Raises DataError for missing or invalid data, or if there is none."""
        if next(self._examples(self._new_warnings()), None) is None:
            raise DataError(_NOTHING)

    def __next__(self) -> Streamed:
        """The next example. Raises DataError at an invalid row, naming all invalid rows of that file."""
        return next(self._passes)

    def _new_warnings(self) -> RowWarnings:
        kind = self.encoder.kind
        return RowWarnings(kind.noun, kind.skip_reasons, self.encoder.encoding)

    @cached_property
    def _passes(self) -> Iterator[Streamed]:
        return self._one_after_the_other()

    def _one_after_the_other(self) -> Iterator[Streamed]:
        number = 0
        while True:
            warnings, before = self.warnings if number == 0 else self._new_warnings(), self.taken
            for example in self._shuffled(self._examples(warnings), np.random.default_rng([self.seed, number])):
                self.taken += 1
                parts = example.parts if isinstance(example, PackedExample) else (example,)
                self._digest.update(fingerprint([part.tokens for part in parts]).to_bytes(8, "little"))
                yield example
            if self.taken == before:
                raise DataError(_NOTHING)
            number += 1

    def _shuffled(self, examples: Iterator[Streamed], rng: np.random.Generator) -> Iterator[Streamed]:
        buffer: list[Streamed] = []
        for count, example in enumerate(self._counted(examples), start=1):
            if count <= self.buffer_size:
                buffer.append(example)
                continue
            at = int(rng.integers(self.buffer_size))
            buffer[at], example = example, buffer[at]
            yield example
        # from the end, so that examples are released as they are taken
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

    def _examples(self, warnings: RowWarnings) -> Iterator[Streamed]:
        """One pass, in the order of the rows."""
        assert self.encoder.kind.stream is not None, f"{self.encoder.kind.noun}s are not streamed"
        return self.encoder.kind.stream(self._tables(warnings), self.encoder.encoding, self.packing)

    def _tables(self, warnings: RowWarnings) -> Iterator[Table]:
        for chunk in chunks(self.rows(self.say), min(ROWS_AT_ONCE, self.buffer_size)):
            table = self.encoder(chunk)
            warnings.count(table, np.arange(len(table)))
            yield table
