"""The config's `dataset` names in; conversations, texts or pairs, split into training and validation, out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np

from macft.data.formats.columns import Layout, likely_key
from macft.data.formats.conversations import Example, Text, to_examples, to_texts
from macft.data.formats.mix import check_mix, mix
from macft.data.formats.pairs import PairExample, holds_pair, to_pairs
from macft.data.sources.resolve import DataSource, resolve_sources
from macft.data.sources.rows import Row, count_rows, scan
from macft.data.sources.tables import is_table, table_columns
from macft.errors import ConfigError, DataError
from macft.text import plural

T = TypeVar("T")

# (file, layout, row limit) -> what its rows stand for
_Open = Callable[[Path, Layout | None, int | None], Iterator[T]]


@dataclass(frozen=True)
class Mixture:
    """How several data sets become one: from which hub, and in which order."""

    hub: str = "hf"  # or modelscope
    mix_strategy: str = "concat"
    interleave_probs: tuple[float, ...] | None = None
    seed: int = 42


def iter_examples(
    dataset: str, dataset_dir: str, max_samples: int | None = None, mixture: Mixture | None = None
) -> Iterator[Example]:
    """The examples of a comma-separated list of data sets, in bounded memory; `max_samples` caps each data set.

    Nothing follows the first problem, and what has come by then is not to be kept. Raises DataError, when all
    files are read, naming every one that is missing or invalid.
    """
    return _gathered(dataset, dataset_dir, max_samples, mixture or Mixture(), to_examples, _check_sft)


def iter_texts(
    dataset: str, dataset_dir: str, max_samples: int | None = None, mixture: Mixture | None = None
) -> Iterator[Text]:
    """The texts to continue pre-training on, of a list as `iter_examples` takes it."""
    return _gathered(dataset, dataset_dir, max_samples, mixture or Mixture(), to_texts, _check_pt)


def iter_pairs(
    dataset: str, dataset_dir: str, max_samples: int | None = None, mixture: Mixture | None = None
) -> Iterator[PairExample]:
    """The preference pairs of a list as `iter_examples` takes it."""
    return _gathered(dataset, dataset_dir, max_samples, mixture or Mixture(), to_pairs, _check_pairs)


def read_examples(
    dataset: str, dataset_dir: str, max_samples: int | None, mixture: Mixture | None = None
) -> list[Example]:
    """All of `iter_examples`, with its errors."""
    return list(iter_examples(dataset, dataset_dir, max_samples, mixture))


def read_texts(dataset: str, dataset_dir: str, max_samples: int | None, mixture: Mixture | None = None) -> list[Text]:
    """All of `iter_texts`, with its errors."""
    return list(iter_texts(dataset, dataset_dir, max_samples, mixture))


def read_pairs(
    dataset: str, dataset_dir: str, max_samples: int | None, mixture: Mixture | None = None
) -> list[PairExample]:
    """All of `iter_pairs`, with its errors."""
    return list(iter_pairs(dataset, dataset_dir, max_samples, mixture))


def holds_pairs(dataset: str, dataset_dir: str, hub: str = "hf") -> bool:
    """Whether the first data set holds preference pairs; False where none can be read."""
    with suppress(DataError):
        sources, _ = resolve_sources(dataset.split(",")[0], dataset_dir, hub)
        if not sources:
            return False
        [source] = sources
        if source.is_ranking is not None:
            return source.is_ranking
        path = source.files[0]
        if is_table(path):
            return holds_pair(table_columns(path))
        return any(holds_pair(row.value) for row in islice(_readable(path), 1))
    return False


def check_kind(source: DataSource, kind: Literal["sft", "pt", "pairs"]) -> DataSource:
    """The data set as rows of this kind are read from it. Raises DataError when it holds others."""
    return {"sft": _check_sft, "pt": _check_pt, "pairs": _check_pairs}[kind](source)


def split_examples(examples: Sequence[T], val_size: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation): `val_size` below 1 is a share, from 1 on a count; order is kept.

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
class _Part(Generic[T]):
    """The examples of one data set; each iteration reads its files anew."""

    source: DataSource
    max_samples: int | None
    seed: int
    open: _Open[T]

    def __iter__(self) -> Iterator[T]:
        source = self.source
        if source.num_samples is None and source.bounds is None:
            yield from self._rows(self.max_samples)
            return
        count = sum(map(count_rows, source.files))
        start, stop = _bounds(source, count)
        if source.num_samples is None:
            end = stop if self.max_samples is None else min(stop, start + self.max_samples)
            yield from islice(self._rows(end), start, None)
            return
        if stop <= start:
            raise DataError(f"{source.name}: there are no rows to draw num_samples from")
        drawn = _drawn(stop - start, source.num_samples, self.seed)[: self.max_samples] + start
        expected = set(drawn.tolist())
        found = {i: example for i, example in enumerate(self._rows(None)) if i in expected}
        yield from (found[i] for i in drawn.tolist())

    def _rows(self, limit: int | None) -> Iterator[T]:
        """The first `limit` rows of all files; problems of all files come together."""
        problems: list[str] = []
        left = limit
        for path in self.source.files:
            if left == 0:
                break
            try:
                for value in self.open(path, self.source.layout, left):
                    left = None if left is None else left - 1
                    if not problems:
                        yield value
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


def _gathered(
    dataset: str,
    dataset_dir: str,
    max_samples: int | None,
    mixture: Mixture,
    open_file: _Open[T],
    check: Callable[[DataSource], DataSource],
) -> Iterator[T]:
    sources, problems = resolve_sources(dataset, dataset_dir, mixture.hub)
    parts: list[_Part[T]] = []
    for source in sources:
        try:
            parts.append(_Part(check(source), max_samples, mixture.seed, open_file))
        except DataError as error:
            problems.append(str(error))
    check_mix(len(sources) + len(problems), mixture.mix_strategy, mixture.interleave_probs)
    if mixture.mix_strategy != "concat" and not problems:
        yield from mix(parts, mixture.mix_strategy, mixture.interleave_probs, mixture.seed)
        return
    for part in parts:
        try:
            for value in part:
                if not problems:
                    yield value
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _readable(path: Path) -> Iterator[Row]:
    return (item for item in scan(path) if isinstance(item, Row))


def _check_sft(source: DataSource) -> DataSource:
    if source.is_ranking:
        raise DataError(f'{source.name}: dataset_info.json says "ranking": true: these are pairs; set stage: dpo')
    if source.layout is not None and source.layout.style == "alpaca" and "response" not in source.layout.columns:
        raise DataError(
            f"{source.name}: the columns in dataset_info.json map no response{_offer(source, 'response')}, "
            "or set stage: pt to continue pre-training on the prompts"
        )
    return source


def _check_pt(source: DataSource) -> DataSource:
    if source.is_ranking:
        raise DataError(f'{source.name}: dataset_info.json says "ranking": true: these are pairs; set stage: dpo')
    if source.layout is None:
        return source
    if source.layout.style != "alpaca":
        raise DataError(f"{source.name}: holds conversations, stage: pt needs texts; set stage: sft")
    # answers and whatever else the rows hold are not meant to be read
    columns = {key: name for key, name in source.layout.columns.items() if key in ("prompt", "query")}
    return replace(source, layout=replace(source.layout, name="text", style="text", columns=columns, unmapped={}))


def _check_pairs(source: DataSource) -> DataSource:
    if source.is_ranking is False:
        raise DataError(
            f'{source.name}: dataset_info.json does not say "ranking": true, which a preference stage needs; '
            "add it if the rows hold chosen and rejected, else set stage: sft"
        )
    return source


def _offer(source: DataSource, column: str) -> str:
    """The key of the first row that this column may be."""
    with suppress(DataError):
        path = source.files[0]
        row = next(_readable(path), None)
        keys = table_columns(path) if is_table(path) else list(row.value) if row is not None else []
        known = source.layout.keys if source.layout is not None else frozenset()
        likely = likely_key(column, column, [key for key in keys if key not in known])
        if likely:
            return f'; add "{column}": "{likely}"'
    return "; add it"
