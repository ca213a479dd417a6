"""A data set in; every row that training would refuse, leave out or learn wrong things from, by its place, out."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from macft.data.cache.cache import Request
from macft.data.cache.workers import Encoder, Kind, Row
from macft.data.formats.columns import Layout
from macft.data.formats.conversations import EXAMPLES, TEXTS, Example, Text
from macft.data.formats.dataset import check_kind, split_examples
from macft.data.formats.messages import Notes
from macft.data.formats.pairs import PAIRS, PairExample
from macft.data.formats.reader import Reading, converted
from macft.data.sources.resolve import DataSource, resolve_sources
from macft.data.sources.rows import Unread, scan
from macft.data.templates.chat_template import Message
from macft.data.tokenization.report import RefusedError, SpecialTokens
from macft.data.tokenization.table import ANSWER_CUT, IDENTICAL, SHORTENED
from macft.errors import DataError
from macft.inspection.findings import Check, Finding
from macft.text import plural

# rows that are looked at together
_CHUNK = 1000
_READINGS: dict[Kind, Reading[Any]] = {"sft": EXAMPLES, "pt": TEXTS, "pairs": PAIRS}
_PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}")


@dataclass
class _Known:
    """Where each row, each prompt and each pair turned round stands first; `order` has the rows' marks in order."""

    rows: dict[bytes, str] = field(default_factory=dict)
    prompts: dict[bytes, str] = field(default_factory=dict)
    turned: dict[bytes, str] = field(default_factory=dict)
    order: list[tuple[bytes, str]] = field(default_factory=list)


def check(
    request: Request,
    encoder: Encoder,
    held_out: Request | None = None,
    *,
    val_size: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> Check:
    """Look at every row of the files of a request, also at those behind a invalid one, and at an evaluation set.

    Where dataset_info.json takes a part of a file (`split`, `num_samples`), all of the file is looked at.
    `advance` is told how many more rows are done. Raises DataError when a data set cannot be found or is not of
    the stage's kind.
    """
    report = Check({"sft": "row", "pt": "text", "pairs": "pair"}[encoder.kind])
    known = _Known()
    sources = _sources(request, encoder.kind)
    for row in _rows(sources, request.max_samples, encoder, report, advance):
        _note_repetition(row, known, report)
    report.rows = len(known.order) + len({one.source for one in report.findings if one.kind == "unreadable"})
    if held_out is not None:
        own = _Known()
        for row in _rows(_sources(held_out, encoder.kind), held_out.max_samples, encoder, report, advance):
            _note_repetition(row, own, report)
            _note_overlap(row, known, report)
        report.held_out = len(own.order)
    elif val_size > 0 and request.mixture.mix_strategy == "concat" and all(map(_is_whole, sources)):
        _note_split(known, val_size, request.mixture.seed, report)
    return report


def _sources(request: Request, kind: Kind) -> list[DataSource]:
    sources, problems = resolve_sources(request.dataset, request.dataset_dir, request.mixture.hub)
    if problems:
        raise DataError("\n".join(problems))
    return [check_kind(source, kind) for source in sources]


def _is_whole(source: DataSource) -> bool:
    return source.num_samples is None and source.bounds is None


def _rows(
    sources: Sequence[DataSource],
    max_samples: int | None,
    encoder: Encoder,
    report: Check,
    advance: Callable[[int], None],
) -> Iterator[Row]:
    """The rows that can be read, with findings about each by itself."""
    special = SpecialTokens(encoder.tokenizer)
    rows = _readable(sources, max_samples, encoder.kind, report)
    while chunk := list(islice(rows, _CHUNK)):
        for row in chunk:
            _note_contents(row, special, report)
        _note_tokens(chunk, encoder, report)
        yield from chunk
        advance(len(chunk))


def _readable(sources: Sequence[DataSource], max_samples: int | None, kind: Kind, report: Check) -> Iterator[Row]:
    for source in sources:
        left = max_samples if _is_whole(source) else None
        for path in source.files:
            for row in _readable_of(path, source.layout, _READINGS[kind], left, report):
                left = None if left is None else left - 1
                yield row


def _readable_of(
    path: Path, layout: Layout | None, reading: Reading[Any], limit: int | None, report: Check
) -> Iterator[Row]:
    """The sound rows of a file; `converted` alone would stop at the first problem."""
    sound: deque[Row] = deque()

    def read(layout: Layout, value: dict[str, Any], source: str, notes: Notes) -> Row | None:
        row: Row | None = reading.read(layout, value, source, notes)
        report.findings += [Finding("unreadable", source, problem) for problem in notes.problems]
        if row is not None and not notes.problems:
            sound.append(row)
        notes.problems.clear()
        return row

    if limit == 0:
        return
    try:
        for _ in converted(path, replace(reading, read=read), layout, limit):
            while sound:
                yield sound.popleft()
    except DataError as error:
        report.findings += _unread(path, error)
    yield from sound


def _unread(path: Path, error: DataError) -> list[Finding]:
    """What `converted` says of a file besides the problems of its rows: lines that are none, or that it is damaged."""
    try:
        found = [
            Finding("unreadable", f"{path}:{item.number}", item.problem)
            for item in scan(path, ())
            if isinstance(item, Unread)
        ]
    except DataError:
        found = []
    return found or [Finding("unreadable", str(path), str(error).removeprefix(f"{path}: "))]


def _note_contents(row: Row, special: SpecialTokens, report: Check) -> None:
    def note(kind: str, detail: str) -> None:
        report.findings.append(Finding(kind, row.source, detail))

    texts = [row.text] if isinstance(row, Text) else [message["content"] for message in row.messages]
    if found := list(dict.fromkeys(hit for text in texts if "{{" in text for hit in _PLACEHOLDER.findall(text))):
        note("placeholder", ", ".join(found))
    if found := list(dict.fromkeys(hit for text in texts for hit in special.in_text(text))):
        note("special token", ", ".join(found))
    if isinstance(row, Text):
        return
    for i, message in enumerate(row.messages, 1):
        if not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool":
            note("empty", f"the {message['role']} message {i} is empty")
    if unusual := _unusual_order(row.messages if isinstance(row, Example) else row.prompt, isinstance(row, Example)):
        note("order", unusual)


def _unusual_order(messages: Sequence[Message], is_whole: bool) -> str:
    """The first thing that is unusual about the roles of a conversation, or of a pair's prompt; empty if none is."""
    roles = [message["role"] for message in messages]
    turns = [(i, role) for i, role in enumerate(roles, 1) if role != "system"]
    late = [i for i, role in enumerate(roles, 1) if role == "system" and i > 1]
    if late:
        return f"message {late[0]} is a system message, which belongs first"
    if turns and turns[0][1] == "assistant":
        return f"message {turns[0][0]}, the first, is an answer"
    if result := _lone_result(messages):
        return f"message {result} is a tool's result that follows no call"
    for (i, role), (_, after) in pairwise(turns):
        if role == after and role != "tool":
            return f"messages {i} and {i + 1} are both of the {role}"
    if is_whole and turns and turns[-1][1] != "assistant":
        return f"message {turns[-1][0]}, the last, is of the {turns[-1][1]} and has no answer: it is not trained on"
    return ""


def _lone_result(messages: Sequence[Message]) -> int:
    """The first result of a tool that follows neither a call nor another result; 0 if there is none."""
    called = False
    for i, message in enumerate(messages, 1):
        if message["role"] == "tool" and not called:
            return i
        called = message["role"] == "tool" or bool(message.get("tool_calls"))
    return 0


def _note_tokens(chunk: Sequence[Row], encoder: Encoder, report: Check) -> None:
    try:
        table = encoder(chunk)
    except DataError as error:
        # one row after the other, to know every one that is refused
        if len(chunk) > 1:
            for row in chunk:
                _note_tokens([row], encoder, report)
            return
        detail = next(iter(error.problems)) if isinstance(error, RefusedError) else str(error)
        report.findings.append(Finding("refused", chunk[0].source, detail.removeprefix(f"{chunk[0].source}: ")))
        return
    columns = table.columns
    for kind, flag in (("shortened", SHORTENED), ("answer cut", ANSWER_CUT), ("identical", IDENTICAL)):
        report.findings += [
            Finding(kind, chunk[i].source, f"cutoff_len {encoder.cutoff_len}" if kind != "identical" else "")
            for i in (columns["flags"] & flag).nonzero()[0].tolist()
        ]
    for i in columns["boundary_tokens"].nonzero()[0].tolist():
        report.findings.append(
            Finding("boundary_tokens", chunk[i].source, plural(int(columns["boundary_tokens"][i]), "token"))
        )
    for i in columns["skip_reason"].nonzero()[0].tolist():
        report.findings.append(_obstacle(chunk[i], int(columns["skip_reason"][i]), encoder))


def _obstacle(row: Row, skip_reason: int, encoder: Encoder) -> Finding:
    if isinstance(row, Text):
        return Finding("left out", row.source, "the text is empty")
    if isinstance(row, Example):
        if any(message["role"] == "assistant" for message in row.messages):
            reason = f"cutoff_len {encoder.cutoff_len} leaves no answer, or the template renders none"
        else:
            reason = "it has no answer"
        return Finding("left out", row.source, reason)
    if skip_reason == 1:
        return Finding("refused", row.source, "the prompt has no token of its own with this template")
    what = "no answer on one side" if skip_reason == 2 else "nothing before the answers"
    return Finding("left out", row.source, f"cutoff_len {encoder.cutoff_len} leaves {what}")


def _mark(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).digest()


def _marks(row: Row) -> tuple[bytes, bytes | None]:
    """Of the row and of what it asks; equal for rows that say the same."""
    if isinstance(row, Text):
        return _mark(row.text), None
    if isinstance(row, PairExample):
        return _mark((row.prompt, row.chosen, row.rejected)), _mark(row.prompt)
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    asked = row.messages[: answers[-1]] if answers else row.messages
    # the other turns of two conversations that begin alike are no answers to one question
    return _mark((row.messages, row.tools)), _mark((asked, row.tools)) if asked else None


def _note_repetition(row: Row, known: _Known, report: Check) -> None:
    whole, prompt = _marks(row)
    known.order.append((whole, row.source))
    if whole in known.rows:
        report.findings.append(Finding("duplicate", row.source, f"as {known.rows[whole]}"))
        return
    known.rows[whole] = row.source
    if isinstance(row, PairExample):
        if whole in known.turned:
            report.findings.append(Finding("contradiction", row.source, f"as {known.turned[whole]} turned round"))
        known.turned[_mark((row.prompt, row.rejected, row.chosen))] = row.source
    if prompt is not None and known.prompts.setdefault(prompt, row.source) != row.source:
        report.findings.append(Finding("same prompt", row.source, f"as {known.prompts[prompt]}"))


def _note_overlap(row: Row, train: _Known, report: Check) -> None:
    whole, prompt = _marks(row)
    if whole in train.rows:
        report.findings.append(Finding("evaluation", row.source, f"as {train.rows[whole]}"))
    elif prompt is not None and prompt in train.prompts:
        report.findings.append(Finding("evaluation prompt", row.source, f"as {train.prompts[prompt]}"))


def _note_split(known: _Known, val_size: float, seed: int, report: Check) -> None:
    """Duplicates of which val_size holds one out and leaves another."""
    kept, held_out = split_examples(known.order, val_size, seed)
    report.held_out = len(held_out)
    trained = dict(reversed(kept))
    for mark, source in held_out:
        if mark in trained:
            report.findings.append(Finding("evaluation", source, f"as {trained[mark]}, which val_size leaves in"))
