"""Preference pairs in; token ids of their two rows, which share one prompt, no longer than `cutoff_len`, out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from macft.data.pairs import PairExample
from macft.data.spans import Rendered, render_turn
from macft.data.template import ChatTemplate, Message
from macft.data.tokenize import (
    CHUNK,
    Fitted,
    TokenizedExample,
    and_others,
    cut,
    render_all,
    shorten,
    special_in_content,
    token_after,
)
from macft.data.tokenizer import Encoded, Tokenizer
from macft.errors import DataError

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class Reference:
    """What the reference model says of one pair: log-probabilities summed over each answer."""

    chosen_logp: float
    rejected_logp: float
    # mean negative log-probability of the prompt's tokens after the first; nan: not computed
    log_perplexity: float


@dataclass(frozen=True)
class TokenizedPair:
    """Two rows that begin with the same `prompt_length` tokens; each loss mask is True from there to the row's end."""

    chosen: TokenizedExample
    rejected: TokenizedExample
    prompt_length: int
    reference: Reference | None = None


@dataclass
class PairReport:
    """What became of the pairs: counts of pairs, except for the last three."""

    examples: int = 0
    kept: int = 0
    # one side lost its whole answer to cutoff_len: left out, and counted nowhere else
    dropped: int = 0
    # lost user text to fit cutoff_len
    shortened: int = 0
    # an answer lost its end
    answer_cut: int = 0
    # both rows are the same tokens
    identical: int = 0
    special_in_content: int = 0
    # tokens on both sides of the border between prompt and answer
    straddling: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True)
class FittedPair:
    """A pair as it is trained on; both rows begin with the same `prompt_length` tokens.

    `is_lost`: one side has no answer left, or no prompt is left before them, after the cut to cutoff_len.
    """

    chosen: Fitted
    rejected: Fitted
    prompt_length: int

    @property
    def is_lost(self) -> bool:
        """Whether the pair cannot be trained on."""
        return self.prompt_length == 0 or not (self.chosen.loss_mask.any() and self.rejected.loss_mask.any())

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
) -> tuple[list[TokenizedPair], PairReport]:
    """Every pair with something to train on in both rows, in order, and the counts of what happened.

    Raises DataError naming each pair that the template refuses or whose prompt has no token, or when
    none is left.
    """
    special = special_in_content(examples, tokenizer)
    report = PairReport(examples=len(examples), special_in_content=len(special))
    kept: list[TokenizedPair] = []
    identical: list[str] = []
    without_prompt: list[str] = []
    fitted = fit_pairs(examples, tokenizer, template, cutoff_len=cutoff_len)
    for example, one in zip(examples, fitted, strict=True):
        if one.prompt_length == 0 and not one.shortened:
            without_prompt.append(example.source)
        elif one.is_lost:
            report.dropped += 1
        else:
            kept.append(TokenizedPair(_row(one.chosen), _row(one.rejected), one.prompt_length))
            _count(report, one)
            if one.chosen.encoded.ids == one.rejected.encoded.ids:
                identical.append(example.source)
    if without_prompt:
        raise DataError(
            f"{without_prompt[0]}{and_others(without_prompt)}: the prompt has no token of its own with the template "
            f"{template.name}; give a longer prompt or a chat template"
        )
    report.kept, report.identical = len(kept), len(identical)
    if not kept:
        raise DataError(
            f"none of the {len(examples)} pairs has an answer token on both sides: cutoff_len {cutoff_len} cuts them "
            "off; raise it"
        )
    _warn(report, special, identical, cutoff_len)
    return kept, report


def fit_pairs(
    examples: Sequence[PairExample], tokenizer: Tokenizer, template: ChatTemplate, *, cutoff_len: int
) -> Iterator[FittedPair]:
    """Both rows of every pair rendered, encoded once, and shortened where they must be, in order.

    All are rendered before the first is given out: DataError names each that the template refuses.
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
    shortened = False
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
        shortened = prompt != example.prompt
    starts = [token_after(row, text.spans[0][0]) for row, text in zip(encoded, rendered, strict=True)]
    # TRL's rule: the earlier start of the two, so that both rows share the prompt
    prompt_length = min(starts[0][0], starts[1][0], _common_length(encoded[0].ids, encoded[1].ids))
    chosen, rejected = (
        Fitted(
            rendered=text,
            encoded=cut(row, job.cutoff_len),
            loss_mask=np.arange(min(len(row.ids), job.cutoff_len)) >= prompt_length,
            straddling=int(straddles),
            shortened=shortened,
            answer_cut=len(row.ids) > job.cutoff_len,
        )
        for text, row, (_, straddles) in zip(rendered, encoded, starts, strict=True)
    )
    return FittedPair(chosen, rejected, prompt_length)


def _common_length(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _row(fitted: Fitted) -> TokenizedExample:
    return TokenizedExample(np.asarray(fitted.encoded.ids, dtype=np.int32), fitted.loss_mask)


def _count(report: PairReport, pair: FittedPair) -> None:
    report.shortened += pair.shortened
    report.answer_cut += pair.answer_cut
    for row in (pair.chosen, pair.rejected):
        report.straddling += row.straddling
        report.tokens += len(row.encoded.ids)
        report.trained_tokens += int(row.loss_mask.sum())


def _warn(
    report: PairReport, special: Sequence[tuple[str, list[str]]], identical: Sequence[str], cutoff_len: int
) -> None:
    total = report.examples
    if special:
        source, tokens = special[0]
        logger.warning(
            "%d of %d pairs hold special tokens in their text, which stay special (first: %s in %s)",
            *(len(special), total, tokens[0], source),
        )
    if report.shortened:
        logger.warning("%d of %d pairs lost user text to fit cutoff_len %d", report.shortened, total, cutoff_len)
    if report.answer_cut:
        logger.warning(
            "%d of %d pairs lost the end of an answer to fit cutoff_len %d", report.answer_cut, total, cutoff_len
        )
    if report.dropped:
        logger.warning(
            "%d of %d pairs are left out: cutoff_len %d leaves no answer on one side", report.dropped, total, cutoff_len
        )
    if identical:
        logger.warning(
            "%d of %d pairs have the same tokens on both sides, so they show no preference (first: %s)",
            *(len(identical), total, identical[0]),
        )
