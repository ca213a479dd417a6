"""Texts to pre-train on in; token ids, each text closed by the end token, in pieces of up to `cutoff_len`, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from macft.data.formats.conversations import Text
from macft.data.tokenization.packing import PackedRows, chain
from macft.data.tokenization.report import RowWarnings, SpecialTokens, TokenizeReport, count_rows
from macft.data.tokenization.table import Table, TableBuilder, TokenizedExample
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, ModelError
from macft.text import plural

# encoded at once: keeps all cores busy, and the memory of the encodings small
CHUNK = 1000


@dataclass
class TextReport(TokenizeReport):
    """`examples` and `kept` are texts, of which nothing is lost."""

    # what the texts were cut into
    pieces: int = 0
    # texts that were cut, each where a row was full
    divided: int = 0
    # tokens of the last row where it is not full; 0 where texts are not packed
    last_row: int = 0


@dataclass(frozen=True, eq=False)
class Pieces(Sequence[TokenizedExample]):
    """Parts of a table's rows, from `starts` to `stops` among its tokens; every token but the first is trained."""

    table: Table
    starts: np.ndarray  # int64 [pieces]
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pieces]: tokens of each."""
        lengths: np.ndarray = self.stops - self.starts
        return lengths

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Pieces: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | Pieces:
        if isinstance(index, slice):
            return Pieces(self.table, self.starts[index], self.stops[index])
        tokens = self.table.tokens[self.starts[index] : self.stops[index]]
        return TokenizedExample(tokens, np.arange(len(tokens)) > 0)


def tokenize_texts(
    texts: Sequence[Text], tokenizer: Tokenizer, *, cutoff_len: int, packing: bool
) -> tuple[Pieces | PackedRows, TextReport]:
    """The rows that the texts make, as `take_texts` says, and the counts of what happened."""
    return take_texts(encode_texts(texts, tokenizer), tokenizer, cutoff_len=cutoff_len, packing=packing)


def encode_texts(texts: Sequence[Text], tokenizer: Tokenizer, *, files: Mapping[str, int] | None = None) -> Table:
    """Every text with its end token, whole; `files` numbers the files that they may stand in.

    Raises ModelError when the tokenizer has no end token.
    """
    end = end_token(tokenizer)
    special = SpecialTokens(tokenizer)
    grown = TableBuilder(1, files)
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        for text, encoded in zip(chunk, tokenizer.encode_batch([one.text for one in chunk]), strict=True):
            tokens = np.array([*encoded.ids, end], dtype=np.int32)
            grown.add(
                text.source,
                [TokenizedExample(tokens, np.arange(len(tokens)) > 0)],
                skip_reason=int(len(tokens) == 1),
                special=_first(special, tokenizer, text.text),
            )
    return grown.table()


def take_texts(
    table: Table, tokenizer: Tokenizer, *, cutoff_len: int, packing: bool, indices: np.ndarray | None = None
) -> tuple[Pieces | PackedRows, TextReport]:
    """Of a table of texts (of its rows `indices`) the rows of up to `cutoff_len` tokens; warns of what happened.

    With `packing` the texts follow each other without a gap and are cut where a row is full, so that every row
    but the last is; without it each text begins a row, and goes on in others of its own. The first token of
    each piece alone is no target. Raises DataError when nothing is left.
    """
    indices = np.arange(len(table)) if indices is None else indices
    kept = indices[table.columns["skip_reason"][indices] == 0]
    if not len(kept):
        raise DataError(f"none of the {plural(len(indices), 'text')} has a token to train on; give texts that do")
    pieces = (_cut_together if packing else _cut_alone)(table, kept, cutoff_len)
    # a text that is cut has pieces that do not begin it
    owners = np.searchsorted(table.offsets, pieces.starts, side="right") - 1
    report = TextReport(pieces=len(pieces), divided=len(np.unique(owners[pieces.starts > table.offsets[owners]])))
    count_rows(report, table, indices)
    report.trained_tokens = int((pieces.lengths - 1).sum())
    report.last_row = report.tokens % cutoff_len if packing else 0
    tell = RowWarnings("texts", table, indices)
    tell.special(tokenizer)
    tell.skip_reason(1, "are empty and are left out")
    return chain(pieces, pieces.lengths, cutoff_len) if packing else pieces, report


def _cut_together(table: Table, rows: np.ndarray, cutoff_len: int) -> Pieces:
    """Cut at the end of each row of the table, and after every `cutoff_len` tokens of all of them."""
    ends = np.cumsum(table.totals[rows])
    begins = ends - table.totals[rows]
    cuts = np.union1d(begins, np.arange(0, ends[-1], cutoff_len))
    owner = np.searchsorted(begins, cuts, side="right") - 1
    starts = table.offsets[rows][owner] + cuts - begins[owner]
    return Pieces(table, starts, starts + np.diff(cuts, append=ends[-1]))


def _cut_alone(table: Table, rows: np.ndarray, cutoff_len: int) -> Pieces:
    """Cut each row of the table after every `cutoff_len` of its tokens; a single one left over teaches nothing."""
    counts = -(-table.totals[rows] // cutoff_len)
    owner = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = table.offsets[rows][owner] + number * cutoff_len
    stops = np.minimum(starts + cutoff_len, table.offsets[rows + 1][owner])
    return Pieces(table, starts[stops - starts > 1], stops[stops - starts > 1])


def preview_text_json(texts: Sequence[Text], index: int, tokenizer: Tokenizer, *, cutoff_len: int) -> dict[str, Any]:
    """Text `index` (from 0) as it is trained on, in the form of `preview.preview_json`; `rows`: how many it fills."""
    text = texts[index]
    end = end_token(tokenizer)
    encoded = tokenizer.encode(text.text)
    ids = [*encoded.ids, end]
    first = encoded.ends[0] if encoded.ends else 0
    closing = tokenizer.decode([end], skip_special=False)
    pieces = [{"text": text.text[:first], "trained": False}, {"text": text.text[first:] + closing, "trained": True}]
    return {
        "source": text.source,
        "pieces": [piece for piece in pieces if piece["text"]],
        "tokens": ids,
        "loss_mask": [False] + [True] * (len(ids) - 1),
        "num_tokens": len(ids),
        "num_trained": len(ids) - 1,
        "boundary_tokens": 0,
        "shortened": False,
        "answer_cut": False,
        "special_in_content": list(dict.fromkeys(SpecialTokens(tokenizer).in_text(text.text))),
        "rows": -(-len(ids) // cutoff_len),
    }


def _first(special: SpecialTokens, tokenizer: Tokenizer, text: str) -> int:
    found = special.in_text(text)
    return tokenizer.special_strings.index(found[0]) if found else -1


def end_token(tokenizer: Tokenizer) -> int:
    """The id that closes every text: the tokenizer's eos token, else the smallest id that ends an answer."""
    named = tokenizer.special_map.get("eos_token")
    if named is not None:
        ids = tokenizer.encode(named).ids
        if len(ids) == 1:
            return ids[0]
    if not tokenizer.eos_ids:
        raise ModelError("stage pt: the tokenizer names no eos_token to close texts with; add it to its config")
    return min(tokenizer.eos_ids)
