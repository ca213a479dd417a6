"""List the kinds of data that a stage may train on: how each is read, tokenized, streamed and shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macft.data.formats.conversations import EXAMPLES
from macft.data.formats.feedback import FEEDBACK, holds_feedback
from macft.data.formats.pairs import PAIRS, holds_pairs
from macft.data.formats.reader import RowReader
from macft.data.formats.texts import TEXTS, holds_texts
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import first_keys
from macft.data.tokenization import conversations, feedback, pairs, texts
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.packing import PackedExample, PackedRows
from macft.data.tokenization.report import SkipReason, TokenizeReport
from macft.data.tokenization.row_preview import (
    RowPreview,
    preview_example,
    preview_feedback,
    preview_pair,
    preview_text,
)
from macft.data.tokenization.table import Rows, Table, TokenizedExample
from macft.errors import DataError

Streamed = TokenizedExample | PackedExample


@dataclass(frozen=True)
class Kind:
    """A kind of data, and everything that is done differently for it.

    `encode` turns rows into a table (the mapping numbers their files); `take` returns the trainable rows of a table,
    packed if asked to; `stream` yields those of one table after the other.
    """

    name: str  # in the keys of caches and checkpoints
    stages: tuple[str, ...]  # the first is assumed for a file without a config
    noun: str  # what a tokenized row is called
    row_noun: str  # what a row in a file is called
    holds: Callable[[DataSource, Collection[str]], bool]  # whether the keys of the first row show this kind
    reader: RowReader[Any]
    encode: Callable[[Sequence[Any], Encoding, Mapping[str, int] | None], Table]
    take: Callable[..., tuple[Rows | PackedRows, TokenizeReport]]
    preview: Callable[[Any, Encoding], RowPreview]
    skip_reasons: tuple[SkipReason, ...]  # as tables number them, from 1 on
    stream: Callable[[Iterable[Table], Encoding, bool], Iterator[Streamed]] | None = None
    width: int = 1  # sequences of tokens per row
    has_template: bool = True
    has_masks: bool = False  # whether train_on_prompt and mask_history apply
    # whether rows of cutoff_len are cut when they are taken; otherwise rows are shortened when they are encoded
    fills_rows: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_named, (self.name,)


SFT = Kind(
    name="sft",
    stages=("sft",),
    noun="example",
    row_noun="row",
    holds=lambda *_: True,
    reader=EXAMPLES,
    encode=conversations.encode_examples,
    take=conversations.take_examples,
    preview=preview_example,
    skip_reasons=conversations.SKIP_REASONS,
    stream=conversations.stream_examples,
    has_masks=True,
)
PT = Kind(
    name="pt",
    stages=("pt",),
    noun="text",
    row_noun="text",
    holds=holds_texts,
    reader=TEXTS,
    encode=texts.encode_texts,
    take=texts.take_texts,
    preview=preview_text,
    skip_reasons=texts.SKIP_REASONS,
    stream=texts.stream_texts,
    has_template=False,
    fills_rows=True,
)
DPO = Kind(
    name="pairs",
    stages=("dpo", "foodpo"),
    noun="pair",
    row_noun="pair",
    holds=holds_pairs,
    reader=PAIRS,
    encode=pairs.encode_pairs,
    take=pairs.take_pairs,
    preview=preview_pair,
    skip_reasons=pairs.SKIP_REASONS,
    width=2,
)
KTO = Kind(
    name="kto",
    stages=("kto",),
    noun="rated answer",
    row_noun="row",
    holds=holds_feedback,
    reader=FEEDBACK,
    encode=feedback.encode_feedback,
    take=feedback.take_feedback,
    preview=preview_feedback,
    skip_reasons=conversations.SKIP_REASONS,
)
# a file without a config is of the first kind that holds its first row
KINDS = (DPO, KTO, PT, SFT)


def kind_named(name: str) -> Kind:
    """The kind of this name."""
    return next(kind for kind in KINDS if kind.name == name)


def kind_of_stage(stage: str) -> Kind:
    """The kind that a stage trains on."""
    return next(kind for kind in KINDS if stage in kind.stages)


def kind_of_source(source: DataSource) -> Kind:
    """The kind that the first row of a data set shows; conversations if it cannot be read."""
    try:
        # a declared format needs no keys
        keys = first_keys(source.files[0]) if source.row_format is None else []
    except DataError:
        keys = []
    return next(kind for kind in KINDS if kind.holds(source, keys))
