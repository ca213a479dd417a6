"""Tokenize conversations with their loss masks, no longer than `cutoff_len`."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from macft.data.formats.conversations import Example
from macft.data.formats.reader import DataRow
from macft.data.templates.chat_template import Message
from macft.data.templates.ends import close_answers
from macft.data.templates.spans import Rendered, render_with_spans
from macft.data.tokenization.encoding import CHUNK, Encoding
from macft.data.tokenization.packing import PackedRows, pack
from macft.data.tokenization.report import RefusedError, SkipReason, SpecialTokens, TokenizeReport, fill_report
from macft.data.tokenization.table import (
    ANSWER_CUT,
    EMPTIED,
    SHORTENED,
    Examples,
    Table,
    TableBuilder,
    TokenizedExample,
)
from macft.data.tokenization.tokenizer import Encoded, Placed
from macft.errors import ConfigError, DataError
from macft.text import plural

_LEFT_OUT = "have nothing to train on and are left out"
# numbered from 1 in a table
SKIP_REASONS = (
    SkipReason(_LEFT_OUT, "it has no answer"),
    SkipReason(_LEFT_OUT, "cutoff_len {cutoff_len} leaves no answer, or the template renders none"),
    SkipReason(_LEFT_OUT, "its answers are marked as not trained on"),
)

AnyRow = TypeVar("AnyRow", bound=DataRow)
Result = TypeVar("Result")


@dataclass(frozen=True)
class FittedRow:
    """One row as training sees it: `encoded` may stop before the end of `rendered.text`."""

    rendered: Rendered
    encoded: Encoded
    loss_mask: np.ndarray
    boundary_tokens: int
    shortened: bool
    emptied: bool  # shortened, and no user text is left
    answer_cut: bool

    @property
    def row(self) -> TokenizedExample:
        """Its tokens and mask, for training."""
        return TokenizedExample(np.asarray(self.encoded.ids, dtype=np.int32), self.loss_mask)


def _render(example: Example, messages: Sequence[Message], encoding: Encoding) -> Rendered:
    rendered = render_with_spans(
        encoding.chat,
        messages,
        tools=example.tools,
        train_on_prompt=encoding.train_on_prompt,
        mask_history=encoding.mask_history,
    )
    return close_answers(rendered, messages, encoding.ends)


def encode_examples(examples: Sequence[Example], encoding: Encoding, files: Mapping[str, int] | None = None) -> Table:
    """A table of all examples, with the tokens of those that have something to train on.

    `files` numbers the files that they come from. Raises RefusedError.
    """
    special = SpecialTokens(encoding.tokenizer)
    builder = TableBuilder(1, files)
    rendered = render_all(examples, lambda example: _render(example, example.messages, encoding))
    for start in range(0, len(rendered), CHUNK):
        chunk = rendered[start : start + CHUNK]
        placed = encoding.place_batch(
            [one.text for one in chunk], [[border for span in one.spans for border in span] for one in chunk]
        )
        for example, text, tokens, row in zip(
            examples[start : start + CHUNK], chunk, placed, _rows(placed), strict=True
        ):
            flags, boundary_tokens = 0, sum(is_boundary for _, is_boundary in tokens.borders)
            if len(tokens.ids) > encoding.cutoff_len:
                fitted = _fit(example, text, encoding.encode(text.text), encoding)
                flags = SHORTENED * fitted.shortened | EMPTIED * fitted.emptied | ANSWER_CUT * fitted.answer_cut
                row, boundary_tokens = fitted.row, fitted.boundary_tokens
            builder.add(
                example.source,
                [row],
                skip_reason=0 if row.loss_mask.any() else _skip_reason(example, encoding),
                flags=flags,
                boundary_tokens=boundary_tokens,
                special=special.first_in(example),
            )
    return builder.table()


def _skip_reason(example: Example, encoding: Encoding) -> int:
    """The number in SKIP_REASONS for an example without a target."""
    answers = [message for message in example.messages if message["role"] == "assistant"]
    if not answers:
        return 1
    meant = answers[-1:] if encoding.mask_history else answers
    return 2 if encoding.train_on_prompt or any(message.get("weight", 1) for message in meant) else 3


def _rows(placed: Sequence[Placed]) -> Iterator[TokenizedExample]:
    """The rows of a chunk; tokens that end inside a span are trained on, token 0 never."""
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
    table: Table, encoding: Encoding, indices: np.ndarray | None = None, *, packing: bool = False
) -> tuple[Examples | PackedRows, TokenizeReport]:
    """The trainable examples of a table (of its rows `indices`), packed into rows with `packing`, and the counts.

    Raises DataError when none is left.
    """
    indices = np.arange(len(table)) if indices is None else indices
    kept = Examples(table, indices[table.columns["skip_reason"][indices] == 0])
    if not len(kept):
        raise DataError(
            f"none of the {plural(len(indices), 'example')} has a token to train on: each lacks an assistant turn, is "
            f"cut before it by cutoff_len {encoding.cutoff_len}, or its template, {encoding.chat.name}, renders no "
            "answer"
        )
    report = TokenizeReport()
    fill_report(report, table, indices, "example", SKIP_REASONS, encoding)
    return pack(kept, kept.lengths, encoding.cutoff_len) if packing else kept, report


def stream_examples(tables: Iterable[Table], _encoding: Encoding, packing: bool) -> Iterator[TokenizedExample]:
    """The trainable examples of one table after the other."""
    if packing:
        raise ConfigError(
            "packing: conversations are packed by their lengths, which are not known in a stream; remove packing or "
            "streaming"
        )
    for table in tables:
        for index in np.flatnonzero(table.columns["skip_reason"] == 0).tolist():
            row = table.row(index)
            # a copy: one row in the buffer must not keep the whole table in memory
            yield TokenizedExample(row.tokens.copy(), row.loss_mask.copy())


def fit_examples(examples: Sequence[Example], encoding: Encoding) -> Iterator[FittedRow]:
    """Every example, in order, rendered, encoded, and shortened where necessary.

    All are rendered before the first is yielded: RefusedError names each that the template refuses.
    """
    rendered = render_all(examples, lambda example: _render(example, example.messages, encoding))
    for start in range(0, len(rendered), CHUNK):
        chunk = rendered[start : start + CHUNK]
        encoded = encoding.encode_batch([one.text for one in chunk])
        for parts in zip(examples[start : start + CHUNK], chunk, encoded, strict=True):
            yield _fit(*parts, encoding)


def render_all(examples: Sequence[AnyRow], render: Callable[[AnyRow], Result]) -> list[Result]:
    """Render every example. Raises RefusedError naming those that `render` refuses."""
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


def _fit(example: Example, rendered: Rendered, encoded: Encoded, encoding: Encoding) -> FittedRow:
    messages, cutoff_len = example.messages, encoding.cutoff_len
    if len(encoded.ids) > cutoff_len:

        def measure(shorter: Sequence[Message]) -> int:
            return len(encoding.encode(_render(example, shorter, encoding).text).ids)

        with naming_shortened(example, encoding):
            messages = shorten(messages, len(encoded.ids), measure, encoding)
            rendered = _render(example, messages, encoding)
        encoded = encoding.encode(rendered.text)
    mask, boundary_tokens = _loss_mask(rendered, encoded)
    return FittedRow(
        rendered=rendered,
        encoded=cut(encoded, cutoff_len),
        loss_mask=mask[:cutoff_len],
        boundary_tokens=boundary_tokens,
        shortened=messages != example.messages,
        emptied=is_emptied(example.messages, messages),
        answer_cut=bool(mask[cutoff_len:].any()),
    )


@contextmanager
def naming_shortened(row: DataRow, encoding: Encoding) -> Iterator[None]:
    """Name the row in errors of rendering it shortened."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.source}, shortened to cutoff_len {encoding.cutoff_len}: {error}") from None


def is_emptied(before: Sequence[Message], after: Sequence[Message]) -> bool:
    """Whether there was user text before, and none after."""
    had, has = (any(m["role"] == "user" and m["content"].strip() for m in messages) for messages in (before, after))
    return had and not has


def cut(encoded: Encoded, cutoff_len: int) -> Encoded:
    """The first `cutoff_len` tokens."""
    return Encoded(encoded.ids[:cutoff_len], encoded.ends[:cutoff_len])


def shorten(
    messages: tuple[Message, ...],
    length: int,
    measure: Callable[[tuple[Message, ...]], int],
    encoding: Encoding,
) -> tuple[Message, ...]:
    """Drop tokens from the start of user texts, oldest first, until the conversation fits or none is left.

    `measure` counts the tokens of rendered messages; `length` is that of `messages` as given.
    """
    cutoff_len = encoding.cutoff_len
    for turn, message in enumerate(messages):
        if message["role"] != "user":
            continue
        text = message["content"]
        ends = encoding.tokenizer.encode(text).ends
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
    """`text` without accents at its start, whose letter was cut off."""
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
