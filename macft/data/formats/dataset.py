"""Read the rows of the data sets that a config names, in the order of their mixture, and split them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from macft.data.formats.mix import check_mix, mix
from macft.data.formats.reader import DataRow, Say, read_file
from macft.data.kinds import Kind
from macft.data.sources.resolve import DataSource, ResolvedSources
from macft.data.sources.rows import count_rows
from macft.errors import ConfigError, DataError
from macft.text import plural

Item = TypeVar("Item")


@dataclass(frozen=True)
class Mixture:
    """How several data sets are combined."""

    mix_strategy: str = "concat"
    interleave_probs: tuple[float, ...] | None = None
    seed: int = 42


@dataclass(frozen=True)
class Request:
    """The rows to read: their kind, their data sets, at most how many of each, and in which order."""

    kind: Kind
    found: ResolvedSources
    max_samples: int | None = None
    mixture: Mixture = field(default_factory=Mixture)

    def rows(self, say: Say = lambda _: None) -> Iterator[Any]:
        """Read the rows in bounded memory; `say` is told what there is to know about each file.

        Nothing follows the first problem, and what has come by then must not be kept. Raises DataError, once all
        files are read, naming every one that is missing or invalid.
        """
        mixture, problems = self.mixture, list(self.found.problems)
        parts: list[_Part] = []
        for source in self.found.sources:
            try:
                parts.append(_Part(self.kind.reader.check(source), self, say))
            except DataError as error:
                problems.append(str(error))
        check_mix(len(self.found.sources) + len(problems), mixture.mix_strategy, mixture.interleave_probs)
        if mixture.mix_strategy != "concat" and not problems:
            yield from mix(parts, mixture.mix_strategy, mixture.interleave_probs, mixture.seed)
        else:
            yield from _joined(parts, problems)


def split_examples(examples: Sequence[Item], val_size: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, validation), in order: `val_size` below 1 is a share, otherwise a count.

    Raises ConfigError when `val_size` is neither, or leaves nothing to train on.
    """
    if val_size < 0 or not math.isfinite(val_size) or (val_size > 1 and val_size != int(val_size)):
        raise ConfigError(f"val_size: found {val_size}, expected a share from 0 to 1 or a whole count")
    # the small step down undoes rounding: 0.07 of 100 is 7, not 7.000000000000001
    count = int(val_size) if val_size >= 1 else math.ceil(val_size * len(examples) - 1e-9)
    if count >= len(examples):
        raise ConfigError(
            f"val_size: {val_size:g} leaves none of {plural(len(examples), 'example')} to train on; lower it"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class _Part:
    """The rows of one data set of a request; each iteration reads its files again."""

    source: DataSource
    request: Request
    say: Say

    def __iter__(self) -> Iterator[DataRow]:
        source, max_samples = self.source, self.request.max_samples
        if source.num_samples is None and source.bounds is None:
            yield from self._rows(max_samples)
            return
        count = sum(map(count_rows, source.files))
        start, stop = _bounds(source, count)
        if source.num_samples is None:
            end = stop if max_samples is None else min(stop, start + max_samples)
            yield from islice(self._rows(end), start, None)
            return
        if stop <= start:
            raise DataError(f"{source.name}: there are no rows to draw num_samples from")
        drawn = _drawn(stop - start, source.num_samples, self.request.mixture.seed)[:max_samples] + start
        expected = set(drawn.tolist())
        found = {i: row for i, row in enumerate(self._rows(None)) if i in expected}
        yield from (found[i] for i in drawn.tolist())

    def _rows(self, limit: int | None) -> Iterator[DataRow]:
        """The first `limit` rows of all files; problems of all files come together."""
        problems: list[str] = []
        left = limit
        for path in self.source.files:
            if left == 0:
                break
            try:
                for row in read_file(path, self.request.kind.reader, self.source.row_format, left, self.say):
                    left = None if left is None else left - 1
                    if not problems:
                        yield row
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))


def _joined(parts: Sequence[_Part], problems: list[str]) -> Iterator[DataRow]:
    """The rows of one part after the other; `problems` are those found before."""
    for part in parts:
        try:
            for row in part:
                if not problems:
                    yield row
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _drawn(count: int, expected: int, seed: int) -> np.ndarray:
    """Row numbers as LLaMA-Factory draws num_samples: a permutation, then more at random if that is too few."""
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(count)[:expected]
    return np.concatenate([drawn, generator.choice(count, expected - len(drawn))])


def _bounds(source: DataSource, count: int) -> tuple[int, int]:
    if source.bounds is None:
        return 0, count
    numbers = [
        None if text is None else round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        for text in source.bounds
    ]
    start, stop, _ = slice(*numbers).indices(count)
    return start, max(start, stop)
