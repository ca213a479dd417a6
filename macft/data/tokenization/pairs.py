"""Tokenize preference pairs as two rows that share one prompt, no longer than `cutoff_len`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import Message
from macft.data.templates.ends import close_answers
from macft.data.templates.overlap import common_length
from macft.data.templates.spans import Rendered, render_turn
from macft.data.tokenization.conversations import FittedRow, cut, is_emptied, naming_shortened, render_all, shorten
from macft.data.tokenization.encoding import CHUNK, Encoding
from macft.data.tokenization.report import SkipReason, SpecialTokens, TokenizeReport, and_others, fill_report
from macft.data.tokenization.table import (
    ANSWER_CUT,
    EMPTIED,
    IDENTICAL,
    SHORTENED,
    Pairs,
    Table,
    TableBuilder,
)
from macft.data.tokenization.tokenizer import Encoded
from macft.errors import DataError
from macft.text import plural

_NO_PROMPT, _NO_ANSWER, _NO_PROMPT_LEFT = 1, 2, 3
# numbered from 1 in a table
SKIP_REASONS = (
    SkipReason("have no prompt", "the prompt has no token of its own with this template", is_refusal=True),
    SkipReason(
        "are left out: cutoff_len {cutoff_len} leaves no answer on one side",
        "cutoff_len {cutoff_len} leaves no answer on one side",
    ),
    SkipReason(
        "are left out: cutoff_len {cutoff_len} leaves nothing before the answers",
        "cutoff_len {cutoff_len} leaves nothing before the answers",
    ),
)


@dataclass
class PairReport(TokenizeReport):
    """The same counts of pairs; tokens are those of both rows."""

    # both rows have the same tokens
    identical: int = 0


@dataclass(frozen=True)
class FittedPair:
    """A pair as training sees it; both rows begin with the same `prompt_length` tokens."""

    chosen: FittedRow
    rejected: FittedRow
    prompt_length: int

    @property
    def skip_reason(self) -> int:
        """Why the pair is not trained on, as a number in SKIP_REASONS; 0 if it is."""
        if self.prompt_length == 0 and not self.shortened:
            return _NO_PROMPT
        if not (self.chosen.loss_mask.any() and self.rejected.loss_mask.any()):
            return _NO_ANSWER
        return _NO_PROMPT_LEFT if self.prompt_length == 0 else 0

    @property
    def shortened(self) -> bool:
        """Whether the prompt lost user text."""
        return self.chosen.shortened

    @property
    def answer_cut(self) -> bool:
        """Whether an answer lost its end."""
        return self.chosen.answer_cut or self.rejected.answer_cut


def encode_pairs(examples: Sequence[PairExample], encoding: Encoding, files: Mapping[str, int] | None = None) -> Table:
    """A table of all pairs, with the tokens of those that can be trained on.

    `files` numbers the files that they come from. Raises RefusedError.
    """
    special = SpecialTokens(encoding.tokenizer)
    builder = TableBuilder(2, files)
    for example, one in zip(examples, fit_pairs(examples, encoding), strict=True):
        flags = SHORTENED * one.shortened | EMPTIED * one.chosen.emptied | ANSWER_CUT * one.answer_cut
        flags |= IDENTICAL * (one.chosen.encoded.ids == one.rejected.encoded.ids)
        builder.add(
            example.source,
            [one.chosen.row, one.rejected.row],
            skip_reason=one.skip_reason,
            # of a pair that is left out, nothing else is reported
            flags=0 if one.skip_reason else flags,
            boundary_tokens=one.chosen.boundary_tokens + one.rejected.boundary_tokens,
            special=special.first_in(example),
            prompt_length=one.prompt_length,
        )
    return builder.table()


def take_pairs(
    table: Table, encoding: Encoding, indices: np.ndarray | None = None, *, packing: bool = False
) -> tuple[Pairs, PairReport]:
    """The trainable pairs of a table (of its rows `indices`), and the counts.

    Raises DataError if the prompt of any pair has no token, or no pair is left.
    """
    assert not packing, "pairs are not packed"
    indices = np.arange(len(table)) if indices is None else indices
    reasons = table.columns["skip_reason"][indices]
    without_prompt = indices[reasons == _NO_PROMPT]
    if len(without_prompt):
        raise DataError(
            f"{table.source(int(without_prompt[0]))}{and_others(len(without_prompt))}: the prompt has no token of its "
            f"own with the template {encoding.chat.name}; give a longer prompt or a chat template"
        )
    kept = Pairs(table, indices[reasons == 0])
    if not len(kept):
        raise DataError(
            f"none of the {plural(len(indices), 'pair')} can be trained on: cutoff_len {encoding.cutoff_len} leaves "
            f"{(reasons == _NO_ANSWER).sum()} without an answer on one side and "
            f"{(reasons == _NO_PROMPT_LEFT).sum()} without a prompt; raise it"
        )
    report = PairReport(identical=int((table.columns["flags"][indices] & IDENTICAL > 0).sum()))
    fill_report(report, table, indices, "pair", SKIP_REASONS, encoding)
    return kept, report


def fit_pairs(examples: Sequence[PairExample], encoding: Encoding) -> Iterator[FittedPair]:
    """Both rows of every pair, in order, rendered, encoded, and shortened where necessary.

    All are rendered before the first is yielded: RefusedError names each that the template refuses.
    """
    rendered = render_all(examples, lambda example: _render(example, example.prompt, encoding))
    for start in range(0, len(examples), CHUNK):
        chunk = rendered[start : start + CHUNK]
        encoded = encoding.encode_batch([row.text for rows in chunk for row in rows])
        pairs = zip(encoded[::2], encoded[1::2], strict=True)
        for parts in zip(examples[start : start + CHUNK], chunk, pairs, strict=True):
            yield _fit(*parts, encoding)


def _render(example: PairExample, prompt: tuple[Message, ...], encoding: Encoding) -> tuple[Rendered, Rendered]:
    """Both rows of `example` after `prompt`, which may be shortened."""
    chosen, rejected = (
        close_answers(render_turn(encoding.chat, messages, len(prompt)), messages, encoding.ends)
        for messages in ((*prompt, *example.chosen), (*prompt, *example.rejected))
    )
    return chosen, rejected


def _fit(
    example: PairExample, rendered: tuple[Rendered, Rendered], encoded: tuple[Encoded, Encoded], encoding: Encoding
) -> FittedPair:
    prompt, cutoff_len = example.prompt, encoding.cutoff_len
    length = max(len(row.ids) for row in encoded)
    if length > cutoff_len:

        def longer_row(prompt: tuple[Message, ...]) -> int:
            return max(len(encoding.encode(row.text).ids) for row in _render(example, prompt, encoding))

        with naming_shortened(example, encoding):
            prompt = shorten(prompt, length, longer_row, encoding)
            rendered = _render(example, prompt, encoding)
        encoded = (encoding.encode(rendered[0].text), encoding.encode(rendered[1].text))
    starts = [row.token_after(text.spans[0][0]) for row, text in zip(encoded, rendered, strict=True)]
    # TRL's rule: the earlier start of the two, so that both rows share the prompt
    prompt_length = min(starts[0][0], starts[1][0], common_length(encoded[0].ids, encoded[1].ids))
    chosen, rejected = (
        FittedRow(
            rendered=text,
            encoded=cut(row, cutoff_len),
            loss_mask=np.arange(min(len(row.ids), cutoff_len)) >= prompt_length,
            boundary_tokens=int(is_boundary),
            shortened=prompt != example.prompt,
            emptied=is_emptied(example.prompt, prompt),
            answer_cut=len(row.ids) > cutoff_len,
        )
        for text, row, (_, is_boundary) in zip(rendered, encoded, starts, strict=True)
    )
    return FittedPair(chosen, rejected, prompt_length)
