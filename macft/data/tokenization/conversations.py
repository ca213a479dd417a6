"""Conversations in; token ids with their loss mask, no longer than `cutoff_len`, out."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from macft.data.formats.conversations import Conversation, Example
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.spans import Rendered, render_with_spans
from macft.data.templates.tools import Tools
from macft.data.tokenization.report import (
    RefusedError,
    RowWarnings,
    SpecialTokens,
    TokenizeReport,
    count_rows,
    special_in_content,
)
from macft.data.tokenization.table import (
    ANSWER_CUT,
    EMPTIED,
    SHORTENED,
    Examples,
    Table,
    TableBuilder,
    TokenizedExample,
)
from macft.data.tokenization.tokenizer import Encoded, Placed, Tokenizer
from macft.errors import DataError
from macft.text import plural

__all__ = ["TokenizeReport", "TokenizedExample", "fit_examples", "special_in_content", "tokenize_examples"]

# encoded at once: keeps all cores busy, and the memory of the encodings small
CHUNK = 1000

AnyConversation = TypeVar("AnyConversation", bound=Conversation)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fitted:
    """One example as it is trained on: `encoded` may stop before the end of `rendered.text`."""

    rendered: Rendered
    encoded: Encoded
    loss_mask: np.ndarray
    boundary_tokens: int
    shortened: bool
    emptied: bool  # shortened, and no user text is left
    answer_cut: bool

    @property
    def row(self) -> TokenizedExample:
        """What training takes of it."""
        return TokenizedExample(np.asarray(self.encoded.ids, dtype=np.int32), self.loss_mask)


@dataclass(frozen=True)
class _Job:
    """What rendering and encoding need, besides the conversation."""

    tokenizer: Tokenizer
    template: ChatTemplate
    cutoff_len: int
    train_on_prompt: bool
    mask_history: bool

    def render(self, messages: Sequence[Message], tools: Tools | None) -> Rendered:
        return render_with_spans(
            self.template,
            messages,
            tools=tools,
            train_on_prompt=self.train_on_prompt,
            mask_history=self.mask_history,
        )


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> tuple[Examples, TokenizeReport]:
    """Every example with something to train on, in order, and the counts of what happened.

    Raises DataError naming each example that the template refuses, or when none is left.
    """
    table = encode_examples(
        examples,
        tokenizer,
        template,
        cutoff_len=cutoff_len,
        train_on_prompt=train_on_prompt,
        mask_history=mask_history,
    )
    return take_examples(table, tokenizer, template, cutoff_len=cutoff_len)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    files: Mapping[str, int] | None = None,
) -> Table:
    """Every example, with the tokens of those that have something to train on.

    `files` numbers the files that they may stand in. Raises RefusedError.
    """
    job = _Job(tokenizer, template, cutoff_len, train_on_prompt, mask_history)
    special = SpecialTokens(tokenizer)
    grown = TableBuilder(1, files)
    rendered = render_all(examples, lambda example: job.render(example.messages, example.tools))
    for start in range(0, len(rendered), CHUNK):
        chunk = rendered[start : start + CHUNK]
        placed = tokenizer.place_batch(
            [one.text for one in chunk], [[border for span in one.spans for border in span] for one in chunk]
        )
        for example, text, tokens, row in zip(examples[start:], chunk, placed, _rows(placed), strict=False):
            flags, boundary_tokens = 0, sum(is_boundary for _, is_boundary in tokens.borders)
            if len(tokens.ids) > cutoff_len:
                fitted = _fit(job, example, text, tokenizer.encode(text.text))
                flags = SHORTENED * fitted.shortened | EMPTIED * fitted.emptied | ANSWER_CUT * fitted.answer_cut
                row, boundary_tokens = fitted.row, fitted.boundary_tokens
            grown.add(
                example.source,
                [row],
                skip_reason=int(not row.loss_mask.any()),
                flags=flags,
                boundary_tokens=boundary_tokens,
                special=special.first_in(example),
            )
    return grown.table()


def _rows(placed: Sequence[Placed]) -> Iterator[TokenizedExample]:
    """The rows of a chunk: tokens from a span's first to the last that ends in it are trained on, token 0 never."""
    ends = np.cumsum([len(one.ids) for one in placed], dtype=np.int64).tolist()
    starts = [0, *ends[:-1]]
    tokens = np.fromiter((id_ for one in placed for id_ in one.ids), np.int32, ends[-1])
    borders = [start + at for start, one in zip(starts, placed, strict=True) for at, _ in one.borders]
    # a token inside a span has an odd number of borders before it
    inside = np.searchsorted(np.array(borders, dtype=np.int64), np.arange(len(tokens)), side="right") % 2 == 1
    for start, end in zip(starts, ends, strict=True):
        inside[start : min(start + 1, end)] = False
        yield TokenizedExample(tokens[start:end], inside[start:end])


def take_examples(
    table: Table,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    cutoff_len: int,
    indices: np.ndarray | None = None,
) -> tuple[Examples, TokenizeReport]:
    """Of a table (of its rows `indices`) what is trained on, and the counts; warns of what happened.

    Raises DataError when nothing is left.
    """
    indices = np.arange(len(table)) if indices is None else indices
    kept = Examples(table, indices[table.columns["skip_reason"][indices] == 0])
    report = TokenizeReport()
    count_rows(report, table, indices)
    if not len(kept):
        raise DataError(
            f"none of the {plural(len(indices), 'example')} has a token to train on: each lacks an assistant turn, "
            f"is cut before it by cutoff_len {cutoff_len}, or its template, {template.name}, renders no answer"
        )
    tell = RowWarnings("examples", table, indices)
    tell.special(tokenizer)
    of_them = f", {report.emptied} of them all of it" if report.emptied else ""
    tell.flag(SHORTENED, f"lost user text to fit cutoff_len {cutoff_len}{of_them}")
    tell.flag(ANSWER_CUT, f"lost the end of their last answer to fit cutoff_len {cutoff_len}")
    tell.skip_reason(1, "have nothing to train on and are left out")
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
    """Every example rendered, encoded once, and shortened where it must be, in order, with its text.

    All are rendered before the first is given out: RefusedError names each that the template refuses.
    """
    job = _Job(tokenizer, template, cutoff_len, train_on_prompt, mask_history)
    rendered = render_all(examples, lambda example: job.render(example.messages, example.tools))
    for start in range(0, len(rendered), CHUNK):
        chunk = rendered[start : start + CHUNK]
        encoded = tokenizer.encode_batch([one.text for one in chunk])
        for parts in zip(examples[start : start + CHUNK], chunk, encoded, strict=True):
            yield _fit(job, *parts)


def render_all(examples: Sequence[AnyConversation], render: Callable[[AnyConversation], Result]) -> list[Result]:
    """`render` of every example; RefusedError names each that it refuses."""
    rendered: list[Result] = []
    problems: dict[str, tuple[str, int]] = {}
    for example in examples:
        try:
            rendered.append(render(example))
        except DataError as error:
            first, count = problems.get(str(error), (example.source, 0))
            problems[str(error)] = (first, count + 1)
    if problems:
        raise RefusedError(problems)
    return rendered


def _fit(job: _Job, example: Example, rendered: Rendered, encoded: Encoded) -> Fitted:
    messages = example.messages
    if len(encoded.ids) > job.cutoff_len:
        try:
            messages = shorten(
                example.messages,
                len(encoded.ids),
                lambda messages: len(job.tokenizer.encode(job.render(messages, example.tools).text).ids),
                tokenizer=job.tokenizer,
                cutoff_len=job.cutoff_len,
            )
            rendered = job.render(messages, example.tools)
        except DataError as error:
            raise DataError(f"{example.source}, shortened to cutoff_len {job.cutoff_len}: {error}") from None
        encoded = job.tokenizer.encode(rendered.text)
    mask, boundary_tokens = _loss_mask(rendered, encoded)
    answer_cut = bool(mask[job.cutoff_len :].any())
    mask = mask[: job.cutoff_len]
    return Fitted(
        rendered=rendered,
        encoded=cut(encoded, job.cutoff_len),
        loss_mask=mask,
        boundary_tokens=boundary_tokens,
        shortened=messages != example.messages,
        emptied=is_emptied(example.messages, messages),
        answer_cut=answer_cut,
    )


def is_emptied(before: Sequence[Message], after: Sequence[Message]) -> bool:
    """Whether there was user text, and none is left."""
    had, has = (any(m["role"] == "user" and m["content"].strip() for m in messages) for messages in (before, after))
    return had and not has


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
    """(bool [T], boundary_tokens): a token is trained on if its last character lies in a span.

    Token 0 is never: nothing predicts it.
    """
    ends = np.asarray(encoded.ends, dtype=np.int64)
    mask = np.zeros(len(ends), dtype=bool)
    boundary_tokens = 0
    for start, end in rendered.spans:
        mask |= (ends > start) & (ends <= end)
        boundary_tokens += encoded.token_after(start)[1] + encoded.token_after(end)[1]
    mask[:1] = False
    return mask, boundary_tokens
