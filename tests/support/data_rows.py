"""Read and tokenize rows in one call, as the trainer does in several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from macft.data.formats.columns import RowFormat
from macft.data.formats.conversations import EXAMPLES, Example
from macft.data.formats.dataset import Mixture, Request
from macft.data.formats.feedback import FeedbackExample
from macft.data.formats.pairs import PAIRS, PairExample
from macft.data.formats.reader import Say, read_file
from macft.data.formats.texts import PlainText
from macft.data.kinds import DPO, KTO, PT, SFT, Kind, kind_of_source
from macft.data.notes import log_notes
from macft.data.sources.resolve import resolve_sources
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization import conversations, pairs
from macft.data.tokenization.conversations import FittedRow
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.pairs import FittedPair
from macft.data.tokenization.table import Table
from macft.data.tokenization.tokenizer import Tokenizer


def iter_rows(
    kind: Kind,
    dataset: str,
    dataset_dir: str,
    max_samples: int | None = None,
    mixture: Mixture | None = None,
    *,
    hub: str = "hf",
) -> Iterator[Any]:
    """The rows of data sets by their names, with what there is to say about them logged."""
    found = resolve_sources(dataset, dataset_dir, hub)
    log_notes(found.notes)
    return Request(kind, found, max_samples, mixture or Mixture()).rows(log)


def log(note: Any) -> None:
    """What the trainer does with a note."""
    log_notes([note])


def iter_examples(*arguments: Any, **keys: Any) -> Iterator[Example]:
    """Conversations, one by one."""
    return iter_rows(SFT, *arguments, **keys)


def read_examples(*arguments: Any, **keys: Any) -> list[Example]:
    """Conversations."""
    return list(iter_rows(SFT, *arguments, **keys))


def read_texts(*arguments: Any, **keys: Any) -> list[PlainText]:
    """Texts to continue pre-training on."""
    return list(iter_rows(PT, *arguments, **keys))


def read_pairs(*arguments: Any, **keys: Any) -> list[PairExample]:
    """Preference pairs."""
    return list(iter_rows(DPO, *arguments, **keys))


def read_feedback(*arguments: Any, **keys: Any) -> list[FeedbackExample]:
    """Rated answers."""
    return list(iter_rows(KTO, *arguments, **keys))


def holds_pairs(dataset: str, dataset_dir: str) -> bool:
    """Whether a data set shows preference pairs."""
    sources = resolve_sources(dataset, dataset_dir).sources
    return bool(sources) and kind_of_source(sources[0]) is DPO


def to_examples(path: Path, row_format: RowFormat | None = None, say: Say = log) -> Iterator[Example]:
    """The conversations of one file."""
    return read_file(path, EXAMPLES, row_format, say=say)


def to_pairs(path: Path) -> Iterator[PairExample]:
    """The pairs of one file."""
    return read_file(path, PAIRS, say=log)


def encode(
    kind: Kind, rows: Sequence[Any], tokenizer: Tokenizer, template: ChatTemplate | None = None, **keys: Any
) -> Table:
    """A table of rows; `keys` are those of Encoding."""
    return kind.encode(rows, Encoding(tokenizer, template, **keys), None)


def take(
    kind: Kind,
    table: Table,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    *,
    indices: np.ndarray | None = None,
    packing: bool = False,
    **keys: Any,
) -> tuple[Any, Any]:
    """What is trained on of a table, and the report; `keys` are those of Encoding."""
    return kind.take(table, Encoding(tokenizer, template, **keys), indices, packing=packing)


def tokenize(
    kind: Kind, rows: Sequence[Any], tokenizer: Tokenizer, template: ChatTemplate | None = None, **keys: Any
) -> tuple[Any, Any]:
    """What is trained on of rows, and the report; `keys` are those of Encoding, and `packing`."""
    packing = keys.pop("packing", False)
    encoding = Encoding(tokenizer, template, **keys)
    return kind.take(kind.encode(rows, encoding, None), encoding, packing=packing)


def tokenize_examples(*arguments: Any, **keys: Any) -> tuple[Any, Any]:
    """Conversations."""
    return tokenize(SFT, *arguments, **keys)


def tokenize_pairs(*arguments: Any, **keys: Any) -> tuple[Any, Any]:
    """Preference pairs."""
    return tokenize(DPO, *arguments, **keys)


def tokenize_feedback(*arguments: Any, **keys: Any) -> tuple[Any, Any]:
    """Rated answers."""
    return tokenize(KTO, *arguments, **keys)


def tokenize_texts(*arguments: Any, **keys: Any) -> tuple[Any, Any]:
    """Texts."""
    return tokenize(PT, *arguments, **keys)


def fit_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, template: ChatTemplate, **keys: Any
) -> Iterator[FittedRow]:
    """Conversations as they are trained on; `keys` are those of Encoding."""
    return conversations.fit_examples(examples, Encoding(tokenizer, template, **keys))


def fit_pairs(
    examples: Sequence[PairExample], tokenizer: Tokenizer, template: ChatTemplate, **keys: Any
) -> Iterator[FittedPair]:
    """Pairs as they are trained on; `keys` are those of Encoding."""
    return pairs.fit_pairs(examples, Encoding(tokenizer, template, **keys))
