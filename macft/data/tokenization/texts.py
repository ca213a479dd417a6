"""Tokenize texts as whole inputs, each closed by the end token, and cut them into pieces of up to `cutoff_len`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from macft.data.formats.texts import PlainText
from macft.data.tokenization.encoding import CHUNK, Encoding
from macft.data.tokenization.packing import PackedExample, PackedRows, chain
from macft.data.tokenization.report import SkipReason, SpecialTokens, TokenizeReport, fill_report
from macft.data.tokenization.table import LazyRows, Table, TableBuilder, TokenizedExample
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, ModelError
from macft.text import plural

# numbered from 1 in a table
SKIP_REASONS = (SkipReason("are empty and are left out", "the text is empty"),)


@dataclass
class TextReport(TokenizeReport):
    """Counts of texts, of which nothing is lost."""

    # parts that the texts were cut into
    pieces: int = 0
    # texts that were cut where a row was full
    divided: int = 0
    # tokens of the last row if it is not full; 0 if texts are not packed
    last_row: int = 0


@dataclass(frozen=True, eq=False)
class Pieces(LazyRows[TokenizedExample]):
    """Parts of a table's rows, from `starts` to `stops` among its tokens; every token but the first is trained."""

    table: Table
    starts: np.ndarray  # int64 [pieces]
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pieces]: tokens of each."""
        return np.asarray(self.stops - self.starts)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> TokenizedExample:
        """See LazyRows."""
        tokens = self.table.tokens[self.starts[index] : self.stops[index]]
        return TokenizedExample(tokens, np.arange(len(tokens)) > 0)


def encode_texts(texts: Sequence[PlainText], encoding: Encoding, files: Mapping[str, int] | None = None) -> Table:
    """A table of all texts, each whole with its end token; `files` numbers the files that they come from.

    Raises ModelError when the tokenizer has no end token.
    """
    tokenizer = encoding.tokenizer
    tail = end_tokens(tokenizer)
    special = SpecialTokens(tokenizer)
    builder = TableBuilder(1, files)
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        opened = [tokenizer.opened(one.text) for one in chunk]
        for text, encoded in zip(chunk, tokenizer.encode_batch(opened, is_input=True), strict=True):
            tokens = np.array([*encoded.ids, *tail], dtype=np.int32)
            builder.add(
                text.source,
                [TokenizedExample(tokens, np.arange(len(tokens)) > 0)],
                skip_reason=int(len(encoded.ids) == len(tokenizer.opening_ids)),
                special=special.first_in(text),
            )
    return builder.table()


def take_texts(
    table: Table, encoding: Encoding, indices: np.ndarray | None = None, *, packing: bool = False
) -> tuple[Pieces | PackedRows, TextReport]:
    """Rows of up to `cutoff_len` tokens from a table of texts (from its rows `indices`), and the counts.

    With `packing` the texts follow each other without a gap and are cut where a row is full, so that only the last
    row may be shorter; without it each text begins a new row. Every token but the first of a piece is a target.
    Raises DataError when nothing is left.
    """
    cutoff_len = encoding.cutoff_len
    indices = np.arange(len(table)) if indices is None else indices
    kept = indices[table.columns["skip_reason"][indices] == 0]
    if not len(kept):
        raise DataError(
            f"none of the {plural(len(indices), 'text')} has a token to train on; give texts that are not empty"
        )
    pieces = _cut_together(table, kept, cutoff_len) if packing else _cut_alone(table, kept, cutoff_len)
    # a text that is cut has pieces that do not begin it
    owners = np.searchsorted(table.offsets, pieces.starts, side="right") - 1
    report = TextReport(pieces=len(pieces), divided=len(np.unique(owners[pieces.starts > table.offsets[owners]])))
    fill_report(report, table, indices, "text", SKIP_REASONS, encoding)
    report.trained_tokens = int((pieces.lengths - 1).sum())
    report.last_row = report.tokens % cutoff_len if packing else 0
    return chain(pieces, pieces.lengths, cutoff_len) if packing else pieces, report


def stream_texts(
    tables: Iterable[Table], encoding: Encoding, packing: bool
) -> Iterator[TokenizedExample | PackedExample]:
    """The rows of `take_texts` from one table after the other; a row may hold texts of several tables."""
    parts: list[TokenizedExample] = []
    filled = 0
    for table in tables:
        kept = np.flatnonzero(table.columns["skip_reason"] == 0)
        if not packing:
            yield from map(_copied, _cut_alone(table, kept, encoding.cutoff_len))
            continue
        for piece in _cut_together(table, kept, encoding.cutoff_len, filled):
            parts.append(_copied(piece))
            filled += len(piece.tokens)
            if filled == encoding.cutoff_len:
                yield from _full_row(parts)
                parts, filled = [], 0
    yield from _full_row(parts)


def _copied(piece: TokenizedExample) -> TokenizedExample:
    """Copy the tokens: one row in a buffer must not keep the whole table in memory."""
    return TokenizedExample(piece.tokens.copy(), piece.loss_mask)


def _full_row(parts: list[TokenizedExample]) -> Iterator[PackedExample]:
    """The row, if any token in it can be predicted from one before."""
    if any(len(part.tokens) > 1 for part in parts):
        yield PackedExample(tuple(parts))


def _cut_together(table: Table, rows: np.ndarray, cutoff_len: int, filled: int = 0) -> Pieces:
    """Cut at the end of each row of the table, and where rows of `cutoff_len` are full.

    `filled`: tokens already in the first of these rows.
    """
    ends = np.cumsum(table.totals[rows])
    begins = ends - table.totals[rows]
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(begins, np.arange(-filled % cutoff_len, total, cutoff_len))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    starts = table.offsets[rows][owner] + cuts - begins[owner]
    return Pieces(table, starts, starts + np.diff(cuts, append=total))


def _cut_alone(table: Table, rows: np.ndarray, cutoff_len: int) -> Pieces:
    """Cut each row of the table after every `cutoff_len` of its tokens; a single leftover token is dropped."""
    counts = -(-table.totals[rows] // cutoff_len)
    owner = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = table.offsets[rows][owner] + number * cutoff_len
    stops = np.minimum(starts + cutoff_len, table.offsets[rows + 1][owner])
    return Pieces(table, starts[stops - starts > 1], stops[stops - starts > 1])


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that end every text: what the tokenizer puts there, and the end token unless it is that."""
    end = _end_token(tokenizer)
    return [*tokenizer.closing_ids, *([end] if tokenizer.closing_ids[-1:] != (end,) else [])]


def _end_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's eos token, else the smallest id that ends an answer."""
    named = tokenizer.special_map.get("eos_token")
    if named is not None:
        ids = tokenizer.encode(named).ids
        if len(ids) == 1:
            return ids[0]
    if not tokenizer.eos_ids:
        raise ModelError("stage pt: the tokenizer has no eos_token to end texts with; add one to tokenizer_config.json")
    return min(tokenizer.eos_ids)
