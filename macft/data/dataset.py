"""The config's `dataset` names in; conversations or pairs, split into training and validation, out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from macft.data.formats import Example, to_examples
from macft.data.pairs import PairExample, holds_pair, to_pairs
from macft.data.sources import SUFFIXES, Row, nearest_file, scan_rows
from macft.errors import ConfigError, DataError

T = TypeVar("T")


def read_examples(dataset: str, dataset_dir: str, max_samples: int | None) -> list[Example]:
    """All examples of a comma-separated list of paths, or of names of files in `dataset_dir`.

    `max_samples` caps each file. Raises DataError naming every file that is missing or faulty.
    """
    return _read(dataset, dataset_dir, max_samples, to_examples)


def read_pairs(dataset: str, dataset_dir: str, max_samples: int | None) -> list[PairExample]:
    """All preference pairs of a list as `read_examples` takes it, with the same errors."""
    return _read(dataset, dataset_dir, max_samples, to_pairs)


def holds_pairs(dataset: str, dataset_dir: str) -> bool:
    """Whether the first row of the first file is a preference pair; False where none can be read."""
    try:
        rows, _ = scan_rows(_find(_names(dataset)[0], Path(dataset_dir)))
    except DataError:
        return False
    return bool(rows) and holds_pair(rows[0])


def _read(
    dataset: str,
    dataset_dir: str,
    max_samples: int | None,
    convert: Callable[[Path, Sequence[Row], Sequence[str]], list[T]],
) -> list[T]:
    examples: list[T] = []
    faults: list[str] = []
    for name in _names(dataset):
        try:
            path = _find(name, Path(dataset_dir))
            rows, unread = scan_rows(path)
            examples += convert(path, rows[:max_samples], unread)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return examples


def _names(dataset: str) -> list[str]:
    names = [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"dataset: found {dataset!r}, wanted the path of a .jsonl or .json file")
    return names


def split_examples(examples: Sequence[T], val_size: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation): `val_size` below 1 is a share, from 1 on a count; order is kept.

    Raises ConfigError when `val_size` is neither, or leaves nothing to train on.
    """
    if val_size < 0 or not math.isfinite(val_size) or (val_size > 1 and val_size != int(val_size)):
        raise ConfigError(f"val_size: found {val_size}, wanted a share from 0 to 1 or a whole count")
    # the small step down undoes rounding: 0.07 of 100 is 7, not 7.000000000000001
    count = int(val_size) if val_size >= 1 else math.ceil(val_size * len(examples) - 1e-9)
    if count >= len(examples):
        raise ConfigError(
            f"val_size: {val_size} takes {count} of {len(examples)} examples and leaves none to train on; lower it"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def _find(name: str, folder: Path) -> Path:
    path = Path(name).expanduser()
    suffixes = SUFFIXES if path.suffix not in SUFFIXES else ()
    looked = [path, folder / name, *(folder / f"{name}{suffix}" for suffix in suffixes)]
    if path.is_dir():
        raise DataError(f"{name}: a folder, wanted a .jsonl or .json file")
    for candidate in looked:
        if candidate.is_file():
            return candidate
    hint = next(filter(None, map(nearest_file, looked)), "")
    unique = dict.fromkeys(map(str, looked))
    raise DataError(f"{name}: no such data file; looked for {', '.join(unique)} in {Path.cwd()}{hint}")
