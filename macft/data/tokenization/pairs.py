"""Preference pairs in; token ids of their two rows, which share one prompt, no longer than `cutoff_len`, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.spans import Rendered, render_turn
from macft.data.tokenization.conversations import (
    CHUNK,
    Fitted,
    cut,
    is_emptied,
    render_all,
    shorten,
)
from macft.data.tokenization.report import RowWarnings, SpecialTokens, TokenizeReport, and_others, count_rows
from macft.data.tokenization.table import (
    ANSWER_CUT,
    EMPTIED,
    IDENTICAL,
    SHORTENED,
    Pairs,
    Reference,
    Table,
    TableBuilder,
    TokenizedPair,
)
from macft.data.tokenization.tokenizer import Encoded, Tokenizer
from macft.errors import DataError
from macft.text import plural

__all__ = ["PairReport", "Reference", "TokenizedPair", "fit_pairs", "tokenize_pairs"]


@dataclass
class PairReport(TokenizeReport):
    """The same counts of pairs; tokens are those of both rows."""

    # both rows are the same tokens
    identical: int = 0


SkipReason = Literal["no prompt", "no answer", "nothing before the answers"]
# as a table numbers them, from 1 on
_SKIP_REASONS: tuple[SkipReason, ...] = ("no prompt", "no answer", "nothing before the answers")


@dataclass(frozen=True)
class FittedPair:
    """A pair as it is trained on; both rows begin with the same `prompt_length` tokens."""

    chosen: Fitted
    rejected: Fitted
    prompt_length: int

    @property
    def skip_reason(self) -> SkipReason | None:
        """What keeps the pair from being trained on; but for "no prompt" it is cutoff_len's doing."""
        if self.prompt_length == 0 and not self.shortened:
            return "no prompt"
        if not (self.chosen.loss_mask.any() and self.rejected.loss_mask.any()):
            return "no answer"
        if self.prompt_length == 0:
            return "nothing before the answers"
        return None

    @property
    def shortened(self) -> bool:
        """Whether the prompt lost user text."""
        return self.chosen.shortened

    @property
    def answer_cut(self) -> bool:
        """Whether an answer lost its end."""
        return self.chosen.answer_cut or self.rejected.answer_cut


def tokenize_pairs(
    examples: Sequence[PairExample], tokenizer: Tokenizer, template: ChatTemplate, *, cutoff_len: int
) -> tuple[Pairs, PairReport]:
    """Every pair that keeps a prompt and an answer on both sides, in order, and the counts of what happened.

    Raises DataError naming each pair that the template refuses or whose prompt has no token, or when
    none is left.
    """
    table = encode_pairs(examples, tokenizer, template, cutoff_len=cutoff_len)
    return take_pairs(table, tokenizer, template, cutoff_len=cutoff_len)


def encode_pairs(
    examples: Sequence[PairExample],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    files: Mapping[str, int] | None = None,
) -> Table:
    """Every pair, with the tokens of those that can be trained on.

    `files` numbers the files that they may stand in. Raises RefusedError.
    """
    special = SpecialTokens(tokenizer)
    grown = TableBuilder(2, files)
    fitted = fit_pairs(examples, tokenizer, template, cutoff_len=cutoff_len)
    for example, one in zip(examples, fitted, strict=True):
        flags = SHORTENED * one.shortened | EMPTIED * one.chosen.emptied | ANSWER_CUT * one.answer_cut
        flags |= IDENTICAL * (one.chosen.encoded.ids == one.rejected.encoded.ids)
        grown.add(
            example.source,
            [one.chosen.row, one.rejected.row],
            skip_reason=0 if one.skip_reason is None else _SKIP_REASONS.index(one.skip_reason) + 1,
            # what else befell a pair that is left out is not told
            flags=flags if one.skip_reason is None else 0,
            boundary_tokens=one.chosen.boundary_tokens + one.rejected.boundary_tokens,
            special=special.first_in(example),
            prompt_length=one.prompt_length,
        )
    return grown.table()


def take_pairs(
    table: Table,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    indices: np.ndarray | None = None,
) -> tuple[Pairs, PairReport]:
    """Of a table (of its rows `indices`) what is trained on, and the counts; warns of what happened.

    Raises DataError naming each pair whose prompt has no token, or when nothing is left.
    """
    indices = np.arange(len(table)) if indices is None else indices
    obstacles = table.columns["skip_reason"][indices]
    without_prompt, no_answer, nothing_before = (indices[obstacles == i + 1] for i in range(len(_SKIP_REASONS)))
    if len(without_prompt):
        raise DataError(
            f"{table.source(int(without_prompt[0]))}{and_others(len(without_prompt))}: the prompt has no token of its "
            f"own with the template {template.name}; give a longer prompt or a chat template"
        )
    kept = Pairs(table, indices[obstacles == 0])
    report = PairReport()
    count_rows(report, table, indices)
    report.identical = int((table.columns["flags"][indices] & IDENTICAL > 0).sum())
    if not len(kept):
        raise DataError(
            f"none of the {plural(len(indices), 'pair')} can be trained on: cutoff_len {cutoff_len} leaves "
            f"{len(no_answer)} without an answer on one side and {len(nothing_before)} without a prompt; raise it"
        )
    tell = RowWarnings("pairs", table, indices)
    tell.special(tokenizer)
    of_them = f", {report.emptied} of them all of it" if report.emptied else ""
    tell.flag(SHORTENED, f"lost user text to fit cutoff_len {cutoff_len}{of_them}")
    tell.flag(ANSWER_CUT, f"lost the end of an answer to fit cutoff_len {cutoff_len}")
    tell.skip_reason(2, f"are left out: cutoff_len {cutoff_len} leaves no answer on one side")
    tell.skip_reason(3, f"are left out: cutoff_len {cutoff_len} leaves nothing before the answers")
    tell.flag(IDENTICAL, "have the same tokens on both sides, so they show no preference")
    return kept, report


def fit_pairs(
    examples: Sequence[PairExample], tokenizer: Tokenizer, template: ChatTemplate, *, cutoff_len: int
) -> Iterator[FittedPair]:
    """Both rows of every pair rendered, encoded once, and shortened where they must be, in order.

    All are rendered before the first is given out: RefusedError names each that the template refuses.
    """
    job = _Job(tokenizer, template, cutoff_len)
    rendered = render_all(examples, lambda example: job.render(example, example.prompt))
    for start in range(0, len(examples), CHUNK):
        chunk = rendered[start : start + CHUNK]
        encoded = tokenizer.encode_batch([row.text for rows in chunk for row in rows])
        pairs = zip(encoded[::2], encoded[1::2], strict=True)
        for example, rows, tokens in zip(examples[start : start + CHUNK], chunk, pairs, strict=True):
            yield _fit(job, example, rows, tokens)


@dataclass(frozen=True)
class _Job:
    """What rendering and encoding need, besides the pair."""

    tokenizer: Tokenizer
    template: ChatTemplate
    cutoff_len: int

    def render(self, example: PairExample, prompt: tuple[Message, ...]) -> tuple[Rendered, Rendered]:
        """Both rows of `example` behind `prompt`, which may be a shortened one."""
        turn = len(prompt)
        chosen = render_turn(self.template, (*prompt, *example.chosen), turn)
        return chosen, render_turn(self.template, (*prompt, *example.rejected), turn)

    def longest(self, example: PairExample, prompt: tuple[Message, ...]) -> int:
        """Tokens of the longer row behind `prompt`."""
        rows = [self.template.render((*prompt, *answer)) for answer in (example.chosen, example.rejected)]
        return max(len(self.tokenizer.encode(row).ids) for row in rows)


def _fit(
    job: _Job, example: PairExample, rendered: tuple[Rendered, Rendered], encoded: tuple[Encoded, Encoded]
) -> FittedPair:
    prompt = example.prompt
    length = max(len(row.ids) for row in encoded)
    if length > job.cutoff_len:
        try:
            prompt = shorten(
                example.prompt,
                length,
                lambda prompt: job.longest(example, prompt),
                tokenizer=job.tokenizer,
                cutoff_len=job.cutoff_len,
            )
            rendered = job.render(example, prompt)
        except DataError as error:
            raise DataError(f"{example.source}, shortened to cutoff_len {job.cutoff_len}: {error}") from None
        encoded = (job.tokenizer.encode(rendered[0].text), job.tokenizer.encode(rendered[1].text))
    starts = [row.token_after(text.spans[0][0]) for row, text in zip(encoded, rendered, strict=True)]
    # TRL's rule: the earlier start of the two, so that both rows share the prompt
    prompt_length = min(starts[0][0], starts[1][0], _common_length(encoded[0].ids, encoded[1].ids))
    chosen, rejected = (
        Fitted(
            rendered=text,
            encoded=cut(row, job.cutoff_len),
            loss_mask=np.arange(min(len(row.ids), job.cutoff_len)) >= prompt_length,
            boundary_tokens=int(is_boundary),
            shortened=prompt != example.prompt,
            emptied=is_emptied(example.prompt, prompt),
            answer_cut=len(row.ids) > job.cutoff_len,
        )
        for text, row, (_, is_boundary) in zip(rendered, encoded, starts, strict=True)
    )
    return FittedPair(chosen, rejected, prompt_length)


def _common_length(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
