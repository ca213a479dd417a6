"""Conversations in; token ids with their loss mask, no longer than `cutoff_len`, out."""

from __future__ import annotations

import logging
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from macft.data.formats import Conversation, Example
from macft.data.spans import Rendered, render_with_spans
from macft.data.template import ChatTemplate, Message
from macft.data.tokenizer import Encoded, Tokenizer
from macft.errors import DataError, join_faults

logger = logging.getLogger("macft")

# encoded at once: keeps all cores busy, and the memory of the encodings small
CHUNK = 1000

AnyConversation = TypeVar("AnyConversation", bound=Conversation)
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenizedExample:
    """`tokens` int32 [T]; `loss_mask` bool [T], where True means that the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass
class TokenizeReport:
    """What became of the examples: counts of examples, except for the last three."""

    examples: int = 0
    kept: int = 0
    # nothing trained on in them: left out
    without_target: int = 0
    # lost user text to fit cutoff_len
    shortened: int = 0
    # their last answer lost its end
    answer_cut: int = 0
    special_in_content: int = 0
    # tokens that lie on both sides of a trained span's border
    straddling: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True)
class Fitted:
    """One example as it is trained on: `encoded` may stop before the end of `rendered.text`."""

    rendered: Rendered
    encoded: Encoded
    loss_mask: np.ndarray
    straddling: int
    shortened: bool
    answer_cut: bool


@dataclass(frozen=True)
class _Job:
    """What rendering and encoding need, besides the conversation."""

    tokenizer: Tokenizer
    template: ChatTemplate
    cutoff_len: int
    train_on_prompt: bool
    mask_history: bool

    def render(self, messages: Sequence[Message]) -> Rendered:
        return render_with_spans(
            self.template, messages, train_on_prompt=self.train_on_prompt, mask_history=self.mask_history
        )


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """Every example with something to train on, in order, and the counts of what happened.

    Raises DataError naming each example that the template refuses, or when none is left.
    """
    special = special_in_content(examples, tokenizer)
    report = TokenizeReport(examples=len(examples), special_in_content=len(special))
    kept: list[TokenizedExample] = []
    for one in fit_examples(
        examples,
        tokenizer,
        template,
        cutoff_len=cutoff_len,
        train_on_prompt=train_on_prompt,
        mask_history=mask_history,
    ):
        report.shortened += one.shortened
        report.answer_cut += one.answer_cut
        if not one.loss_mask.any():
            report.without_target += 1
            continue
        kept.append(TokenizedExample(np.asarray(one.encoded.ids, dtype=np.int32), one.loss_mask))
        report.straddling += one.straddling
        report.tokens += len(one.encoded.ids)
        report.trained_tokens += int(one.loss_mask.sum())
    report.kept = len(kept)
    if not kept:
        raise DataError(
            f"none of the {len(examples)} examples has a token to train on: each lacks an assistant turn, "
            f"is cut before it by cutoff_len {cutoff_len}, or its template, {template.name}, renders no answer"
        )
    _warn(report, special, cutoff_len)
    return kept, report


def fit_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Iterator[Fitted]:
    """Every example rendered, encoded once, and shortened where it must be, in order.

    All are rendered before the first is given out: DataError names each that the template refuses.
    """
    job = _Job(tokenizer, template, cutoff_len, train_on_prompt, mask_history)
    rendered = render_all(examples, lambda example: job.render(example.messages))
    for start in range(0, len(rendered), CHUNK):
        chunk = rendered[start : start + CHUNK]
        encoded = tokenizer.encode_batch([one.text for one in chunk])
        for parts in zip(examples[start : start + CHUNK], chunk, encoded, strict=True):
            yield _fit(job, *parts)


def render_all(examples: Sequence[AnyConversation], render: Callable[[AnyConversation], Result]) -> list[Result]:
    """`render` of every example; DataError names each that it refuses."""
    rendered: list[Result] = []
    faults: dict[str, list[str]] = {}  # cause -> examples
    for example in examples:
        try:
            rendered.append(render(example))
        except DataError as error:
            faults.setdefault(str(error), []).append(example.source)
    if faults:
        lines = [f"{sources[0]}{and_others(sources)}: {cause}" for cause, sources in faults.items()]
        count = sum(map(len, faults.values()))
        raise DataError(lines[0] if len(lines) == 1 else join_faults(f"{count} examples cannot be rendered", lines))
    return rendered


def and_others(sources: Sequence[str]) -> str:
    """How many more there are than the first, in words."""
    return f" and {len(sources) - 1} more" if len(sources) > 1 else ""


def special_in_content(examples: Sequence[Conversation], tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """(source, tokens) of each example whose text holds special tokens, which stay special."""
    if not tokenizer.special_strings:
        return []
    pattern = re.compile("|".join(re.escape(text) for text in tokenizer.special_strings))
    found: list[tuple[str, list[str]]] = []
    for example in examples:
        hits = dict.fromkeys(hit for m in example.messages for hit in pattern.findall(m["content"]))
        if hits:
            found.append((example.source, list(hits)))
    return found


def _fit(job: _Job, example: Example, rendered: Rendered, encoded: Encoded) -> Fitted:
    shortened = False
    if len(encoded.ids) > job.cutoff_len:
        try:
            messages = shorten(
                example.messages,
                len(encoded.ids),
                lambda messages: len(job.tokenizer.encode(job.template.render(messages)).ids),
                tokenizer=job.tokenizer,
                cutoff_len=job.cutoff_len,
            )
            rendered = job.render(messages)
        except DataError as error:
            raise DataError(f"{example.source}, shortened to cutoff_len {job.cutoff_len}: {error}") from None
        encoded = job.tokenizer.encode(rendered.text)
        shortened = messages != example.messages
    mask, straddling = _loss_mask(rendered, encoded)
    answer_cut = bool(mask[job.cutoff_len :].any())
    mask = mask[: job.cutoff_len]
    return Fitted(rendered, cut(encoded, job.cutoff_len), mask, straddling, shortened, answer_cut)


def cut(encoded: Encoded, cutoff_len: int) -> Encoded:
    """The first `cutoff_len` tokens."""
    return Encoded(encoded.ids[:cutoff_len], encoded.ends[:cutoff_len])


def shorten(
    messages: tuple[Message, ...],
    length: int,
    measure: Callable[[tuple[Message, ...]], int],
    *,
    tokenizer: Tokenizer,
    cutoff_len: int,
) -> tuple[Message, ...]:
    """Take tokens off the start of user texts, the oldest first, until `measure` fits or none is left.

    `length` is the measure of `messages` as they come: their number of tokens once rendered.
    """
    for turn, message in enumerate(messages):
        if message["role"] != "user":
            continue
        text = message["content"]
        ends = tokenizer.encode(text).ends
        dropped = 0
        while length > cutoff_len and dropped < len(ends):
            dropped = min(dropped + length - cutoff_len, len(ends))
            kept = {**message, "content": _without_marks(text[ends[dropped - 1] :])}
            messages = (*messages[:turn], kept, *messages[turn + 1 :])
            length = measure(messages)
        if length <= cutoff_len:
            break
    return messages


def _without_marks(text: str) -> str:
    """`text` without the accents at its start, which belong to a letter cut off before them."""
    start = next((i for i, character in enumerate(text) if not unicodedata.combining(character)), len(text))
    return text[start:]


def _loss_mask(rendered: Rendered, encoded: Encoded) -> tuple[np.ndarray, int]:
    """(bool [T], straddling): a token is trained on if its last character lies in a span.

    Token 0 is never: nothing predicts it.
    """
    ends = np.asarray(encoded.ends, dtype=np.int64)
    mask = np.zeros(len(ends), dtype=bool)
    straddling = 0
    for start, end in rendered.spans:
        mask |= (ends > start) & (ends <= end)
        straddling += token_after(encoded, start)[1] + token_after(encoded, end)[1]
    mask[:1] = False
    return mask, straddling


def token_after(encoded: Encoded, border: int) -> tuple[int, bool]:
    """(index of the first token that ends after the character `border`, whether it begins before it)."""
    at = bisect_right(encoded.ends, border)
    begin = encoded.ends[at - 1] if at > 0 else 0
    return at, at < len(encoded.ends) and begin < border


def _warn(report: TokenizeReport, special: list[tuple[str, list[str]]], cutoff_len: int) -> None:
    total = report.examples
    if special:
        source, tokens = special[0]
        logger.warning(
            "%d of %d examples hold special tokens in their text, which stay special (first: %s in %s)",
            *(len(special), total, tokens[0], source),
        )
    if report.shortened:
        logger.warning("%d of %d examples lost user text to fit cutoff_len %d", report.shortened, total, cutoff_len)
    if report.answer_cut:
        logger.warning(
            "%d of %d examples lost the end of their last answer to fit cutoff_len %d",
            *(report.answer_cut, total, cutoff_len),
        )
    if report.without_target:
        logger.warning("%d of %d examples have nothing to train on and are left out", report.without_target, total)
