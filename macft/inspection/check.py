"""Find every row of a data set that training would refuse, leave out or learn something wrong from."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from macft.data.cache.workers import Encoder
from macft.data.formats.columns import RowFormat
from macft.data.formats.dataset import Request, split_examples
from macft.data.formats.messages import RowErrors
from macft.data.formats.reader import DataRow, RowReader, Say, read_file
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import Unread, scan
from macft.data.templates.chat_template import Message
from macft.data.tokenization.report import RefusedError, SpecialTokens
from macft.data.tokenization.table import ANSWER_CUT, IDENTICAL, SHORTENED
from macft.errors import DataError, as_typed
from macft.text import plural

# rows examined together
_CHUNK = 1000
# places shown per kind
_SHOWN = 10
_PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}")


Level = Literal["problem", "left out", "note"]
# kinds of findings, in the order shown -> their level, and a description
KINDS: dict[str, tuple[Level, str]] = {
    "unreadable": ("problem", "cannot be read"),
    "refused": ("problem", "cannot be trained on"),
    "left out": ("left out", "left out of training"),
    "answer cut": ("note", "an answer loses its end to fit cutoff_len"),
    "shortened": ("note", "user text is lost to fit cutoff_len"),
    "empty": ("note", "an empty question or answer"),
    "order": ("note", "roles in an unusual order"),
    "placeholder": ("note", "a placeholder, which the model would learn to say"),
    "special token": ("note", "special tokens in the text, which stay special"),
    "identical": ("note", "the same tokens on both sides, which show no preference"),
    "contradiction": ("note", "rates the answers of an earlier row the other way round"),
    "duplicate": ("note", "repeats an earlier row"),
    "same prompt": ("note", "asks what an earlier row asks, with another answer"),
    "evaluation": ("note", "evaluated on and trained on"),
    "evaluation prompt": ("note", "evaluated on with a prompt that is trained on"),
    "boundary_tokens": ("note", "a token on the border of an answer"),
}


@dataclass(frozen=True)
class RowFinding:
    """A finding about one row; `source` is its file:row."""

    kind: str
    source: str
    detail: str

    @property
    def level(self) -> Level:
        """problem: training refuses the data; left out: it continues without the row; note: worth a look."""
        return KINDS[self.kind][0]


@dataclass
class DataCheck:
    """The findings about the rows of a data set."""

    noun: str
    rows: int = 0
    held_out: int = 0  # rows of the evaluation set
    findings: list[RowFinding] = field(default_factory=list)

    def add(self, kind: str, source: str, detail: str) -> None:
        """Add a finding about the row at `source`."""
        self.findings.append(RowFinding(kind, source, detail))

    @property
    def is_sound(self) -> bool:
        """Whether training takes every row."""
        return all(finding.level == "note" for finding in self.findings)


@dataclass
class _Known:
    """The first place of each row, prompt and reversed pair; `order` has the marks of all rows."""

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
    say: Say = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> DataCheck:
    """Check every row in the files of a request, including those after an invalid one, and of an evaluation set.

    Where dataset_info.json selects a part of a file (`split`, `num_samples`), the whole file is checked. `say` is told
    about each file, `advance` how many more rows are done. Raises DataError when a data set cannot be found or holds
    rows of another kind.
    """
    report = DataCheck(encoder.kind.row_noun)
    rows = partial(_rows, encoder=encoder, report=report, say=say, advance=advance)
    known = _Known()
    for row in rows(request):
        _note_repetition(row, known, report)
    report.rows = len(known.order) + len({one.source for one in report.findings if one.kind == "unreadable"})
    if held_out is not None:
        own = _Known()
        for row in rows(held_out):
            _note_repetition(row, own, report)
            _note_overlap(row, known, report)
        report.held_out = len(own.order)
    elif val_size > 0 and request.mixture.mix_strategy == "concat" and all(map(_is_whole, request.found.sources)):
        _note_split(known, val_size, request.mixture.seed, report)
    return report


def _is_whole(source: DataSource) -> bool:
    return source.num_samples is None and source.bounds is None


def _rows(
    request: Request, encoder: Encoder, report: DataCheck, say: Say, advance: Callable[[int], None]
) -> Iterator[DataRow]:
    """The readable rows; adds the findings about each."""
    request.found.check()
    sources = [request.kind.reader.check(source) for source in request.found.sources]
    special = SpecialTokens(encoder.encoding.tokenizer)
    rows = _readable(sources, request, report, say)
    while chunk := list(islice(rows, _CHUNK)):
        for row in chunk:
            _note_contents(row, special, report)
        _note_tokens(chunk, encoder, report)
        yield from chunk
        advance(len(chunk))


def _readable(sources: Sequence[DataSource], request: Request, report: DataCheck, say: Say) -> Iterator[DataRow]:
    for source in sources:
        left = request.max_samples if _is_whole(source) else None
        for path in source.files:
            for row in _readable_of(path, source.row_format, request.kind.reader, left, report, say):
                left = None if left is None else left - 1
                yield row


def _readable_of(
    path: Path,
    row_format: RowFormat | None,
    reader: RowReader[Any],
    limit: int | None,
    report: DataCheck,
    say: Say,
) -> Iterator[DataRow]:
    """The valid rows of a file; `read_file` alone would stop at the first problem."""
    sound: deque[DataRow] = deque()

    def read(row_format: RowFormat, value: dict[str, Any], source: str, errors: RowErrors) -> DataRow | None:
        row: DataRow | None = reader.read(row_format, value, source, errors)
        report.findings += [RowFinding("unreadable", source, problem) for problem in errors.problems]
        if row is not None and not errors.problems:
            sound.append(row)
        errors.problems.clear()
        return row

    if limit == 0:
        return
    try:
        for _ in read_file(path, replace(reader, read=read), row_format, limit, say):
            while sound:
                yield sound.popleft()
    except DataError as error:
        report.findings += _unread(path, error)
    yield from sound


def _unread(path: Path, error: DataError) -> list[RowFinding]:
    """The findings of `read_file` besides invalid rows: unreadable lines, or a damaged file."""
    try:
        found = [
            RowFinding("unreadable", f"{path}:{item.number}", item.problem)
            for item in scan(path, ())
            if isinstance(item, Unread)
        ]
    except DataError:
        found = []
    return found or [RowFinding("unreadable", str(path), str(error).removeprefix(f"{path}: "))]


def _note_contents(row: DataRow, special: SpecialTokens, report: DataCheck) -> None:
    marks = [found for text in row.texts if "{{" in text for found in _PLACEHOLDER.findall(text)]
    if marks:
        report.add("placeholder", row.source, ", ".join(dict.fromkeys(marks)))
    if found := special.all_in(row):
        report.add("special token", row.source, ", ".join(found))
    for i, message in enumerate(row.messages, 1):
        if not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool":
            report.add("empty", row.source, f"the {message['role']} message {i} is empty")
    if unusual := _unusual_order(row):
        report.add("order", row.source, unusual)


def _unusual_order(row: DataRow) -> str:
    """The first oddity in the roles of a conversation, or of a pair's prompt; empty if there is none."""
    roles = [message["role"] for message in row.turns]
    turns = [(i, role) for i, role in enumerate(roles, 1) if role != "system"]
    late = [i for i, role in enumerate(roles, 1) if role == "system" and i > 1]
    if late:
        return f"message {late[0]} is a system message, which belongs first"
    if turns and turns[0][1] == "assistant":
        return f"message {turns[0][0]}, the first, is an answer"
    if result := _lone_result(row.turns):
        return f"message {result} is a tool's result that follows no call"
    for (i, role), (_, after) in pairwise(turns):
        if role == after and role != "tool":
            return f"messages {i} and {i + 1} are both from the {role}"
    if turns and row.messages[-1]["role"] != "assistant":
        return (
            f"message {turns[-1][0]}, the last, is from the {turns[-1][1]} and has no answer, so it is not trained on"
        )
    return ""


def _lone_result(messages: Sequence[Message]) -> int:
    """The first tool result that follows neither a call nor another result; 0 if there is none."""
    called = False
    for i, message in enumerate(messages, 1):
        if message["role"] == "tool" and not called:
            return i
        called = message["role"] == "tool" or bool(message.get("tool_calls"))
    return 0


def _note_tokens(chunk: Sequence[DataRow], encoder: Encoder, report: DataCheck) -> None:
    try:
        table = encoder(chunk)
    except DataError as error:
        # row by row, to find every refused one
        if len(chunk) > 1:
            for row in chunk:
                _note_tokens([row], encoder, report)
            return
        detail = as_typed(next(iter(error.problems)) if isinstance(error, RefusedError) else str(error))
        report.add("refused", chunk[0].source, detail.removeprefix(f"{chunk[0].source}: "))
        return
    columns = table.columns
    cutoff = f"cutoff_len {encoder.encoding.cutoff_len}"
    for kind, flag, detail in (
        ("shortened", SHORTENED, cutoff),
        ("answer cut", ANSWER_CUT, cutoff),
        ("identical", IDENTICAL, ""),
    ):
        for i in (columns["flags"] & flag).nonzero()[0].tolist():
            report.add(kind, chunk[i].source, detail)
    for i in columns["boundary_tokens"].nonzero()[0].tolist():
        report.add("boundary_tokens", chunk[i].source, plural(int(columns["boundary_tokens"][i]), "token"))
    for i in columns["skip_reason"].nonzero()[0].tolist():
        reason = encoder.kind.skip_reasons[columns["skip_reason"][i] - 1]
        detail = reason.of_row.format(cutoff_len=encoder.encoding.cutoff_len)
        report.add("refused" if reason.is_refusal else "left out", chunk[i].source, detail)


def _mark(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).digest()


def _marks(row: DataRow) -> tuple[bytes, bytes | None]:
    """Marks of the row and of its question; equal for rows that say the same."""
    return _mark(row.identity), None if row.question is None else _mark(row.question)


def _note_repetition(row: DataRow, known: _Known, report: DataCheck) -> None:
    whole, prompt = _marks(row)
    known.order.append((whole, row.source))
    if whole in known.rows:
        report.add("duplicate", row.source, f"as {known.rows[whole]}")
        return
    known.rows[whole] = row.source
    if row.opposite is not None:
        if whole in known.turned:
            report.add("contradiction", row.source, f"as {known.turned[whole]} the other way round")
        known.turned[_mark(row.opposite)] = row.source
    if prompt is not None and known.prompts.setdefault(prompt, row.source) != row.source:
        report.add("same prompt", row.source, f"as {known.prompts[prompt]}")


def _note_overlap(row: DataRow, train: _Known, report: DataCheck) -> None:
    whole, prompt = _marks(row)
    if whole in train.rows:
        report.add("evaluation", row.source, f"as {train.rows[whole]}")
    elif prompt is not None and prompt in train.prompts:
        report.add("evaluation prompt", row.source, f"as {train.prompts[prompt]}")


def _note_split(known: _Known, val_size: float, seed: int, report: DataCheck) -> None:
    """Find duplicates of which val_size holds out one and keeps another."""
    kept, held_out = split_examples(known.order, val_size, seed)
    report.held_out = len(held_out)
    trained = dict(reversed(kept))
    for mark, source in held_out:
        if mark in trained:
            report.add("evaluation", source, f"as {trained[mark]}, which val_size leaves in")


def as_json(report: DataCheck) -> dict[str, Any]:
    """Counts, and every finding."""
    levels = [finding.level for finding in report.findings]
    return {
        "rows": report.rows,
        "evaluation_rows": report.held_out,
        "sound": report.is_sound,
        "problems": levels.count("problem"),
        "left_out": levels.count("left out"),
        "findings": [asdict(finding) | {"level": finding.level} for finding in report.findings],
    }


def show(report: DataCheck, console: Console) -> None:
    """Print the findings by kind, the worst first, with the first places of each."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    styles = {"problem": "bold red", "left out": "bold yellow", "note": "bold"}
    for kind, (level, what) in KINDS.items():
        found = [finding for finding in report.findings if finding.kind == kind]
        if not found:
            continue
        places = len({finding.source for finding in found})
        line(f"{level}: {what} ({plural(places, report.noun)})", styles[level])
        for finding in found[:_SHOWN]:
            line(f"  {finding.source}{': ' if finding.detail else ''}{finding.detail}")
        if len(found) > _SHOWN:
            line(f"  ... and {len(found) - _SHOWN} more")
    of_them = f", {report.held_out} of the evaluation" if report.held_out else ""
    line(f"{plural(report.rows, report.noun)}{of_them}: {_summary(report)}")


def _summary(report: DataCheck) -> str:
    counts = []
    for level, what in (("problem", "invalid"), ("left out", "left out in training"), ("note", "worth a look")):
        places = len({finding.source for finding in report.findings if finding.level == level})
        if places:
            counts.append(f"{places} {what}")
    return ", ".join(counts) or "nothing found"
