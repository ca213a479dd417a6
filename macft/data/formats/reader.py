"""Read the rows of a data file as the examples that a stage trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from macft.data.formats.columns import KNOWN_KEYS, RowFormat
from macft.data.formats.lost import LOOKED_AT
from macft.data.formats.messages import RowErrors
from macft.data.notes import Note
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import Row, Unread, place_of, scan
from macft.data.sources.tables import is_table, table_columns
from macft.data.templates.chat_template import Message
from macft.data.templates.thoughts import THOUGHT
from macft.errors import DataError, join_problems
from macft.text import plural

# problems kept, at least as many as an error shows
_KEPT = 100
# unused keys named in a note
_SHOWN = 8
PLACEHOLDERS = ("{{name}}", "{{author}}")


class DataRow:
    """What every kind of row has; the defaults are those of a conversation without tools.

    `identity`, `question` and `opposite` are JSON values to compare rows by.
    """

    if TYPE_CHECKING:

        @property
        def source(self) -> str:
            """Its place, as file:line."""

        @property
        def messages(self) -> tuple[Message, ...]:
            """Every message, including those of all answers; a text has none."""

        @property
        def identity(self) -> Any:
            """Equal for two rows that say the same."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The consecutive messages, without alternative answers."""
        return self.messages

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts in it."""
        return tuple(message[key] for message in self.messages for key in (THOUGHT, "content") if key in message)

    @property
    def answers(self) -> int:
        """How many assistant messages one of its conversations has."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def has_tools(self) -> bool:
        """Whether it defines tools."""
        return False

    @property
    def question(self) -> Any:
        """Equal for two rows that ask the same; None if it asks nothing."""
        return None

    @property
    def opposite(self) -> Any:
        """The identity of a row that contradicts it; None if no row can."""
        return None


T = TypeVar("T", bound=DataRow)
Say = Callable[[Note], None]


@dataclass(frozen=True)
class RowReader(Generic[T]):
    """How rows are read as one kind of data.

    `check` returns the data set as it will be read, or raises DataError if it holds another kind; `recognize` finds
    the format from the first row, and names its place in errors; `read` returns None where it adds a problem.
    `lost` says why a row with this key and value, which is not read, is invalid, or None; `own_keys` are read besides
    those of conversations.
    """

    check: Callable[[DataSource], DataSource]
    recognize: Callable[[str, dict[str, Any]], RowFormat]
    read: Callable[[RowFormat, dict[str, Any], str, RowErrors], T | None]
    lost: Callable[[str, Any], str | None]
    own_keys: frozenset[str] = frozenset()


@dataclass
class _Seen:
    """What reading a file has found so far."""

    rows: int = 0
    problems: list[str] = field(default_factory=list)  # empty past the first _KEPT: only their number is shown
    are_row_problems: bool = False
    once: set[str] = field(default_factory=set)
    with_placeholders: int = 0
    first_placeholder: str = ""
    unused: set[str] = field(default_factory=set)

    def add(self, place: str, problems: list[str]) -> None:
        """Add the problems of one row, in bounded memory."""
        self.problems += [f"{place}: {problem}" if len(self.problems) < _KEPT else "" for problem in problems]


def read_file(
    path: Path,
    reader: RowReader[T],
    row_format: RowFormat | None = None,
    limit: int | None = None,
    say: Say = lambda _: None,
) -> Iterator[T]:
    """The examples in the first `limit` rows of a file, in bounded memory; at the end `say` is told about the file.

    Without a format, the first row determines it. Nothing is yielded after the first problem. Raises DataError when
    the file cannot be read, and at the end with the line and key of every invalid row, and what was expected.
    """
    names = table_columns(path) if is_table(path) else None
    expected = None
    if names is not None:
        known = KNOWN_KEYS | reader.own_keys if row_format is None else row_format.keys | row_format.unmapped.keys()
        expected = [name for name in names if name in known | LOOKED_AT]
    items = scan(path, expected)
    first: list[Row | Unread] = []
    if row_format is None:
        row_format, first = _recognized(path, reader, items, names)
    seen = _Seen(unused=set(names or ()) - set(expected or ()))
    yield from _rows(path, reader, row_format, chain(first, items), limit, seen)
    for note in _notes(path, row_format, seen):
        say(note)


def _recognized(
    path: Path, reader: RowReader[T], items: Iterator[Row | Unread], names: list[str] | None
) -> tuple[RowFormat, list[Row | Unread]]:
    """The format of the first row, and the items read to find it."""
    first: list[Row | Unread] = []
    for item in items:
        first.append(item)
        if isinstance(item, Row):
            # the names of unread columns also show what a table holds
            row = item.value if names is None else dict.fromkeys(names) | item.value
            return reader.recognize(f"{path}: {place_of(path)} {item.number}", row), first
    unread = [f"{place_of(path)} {item.number}: {item.problem}" for item in first if isinstance(item, Unread)]
    raise DataError(join_problems(f"{path}: {plural(len(unread), 'problem')}", unread))


def _rows(
    path: Path,
    reader: RowReader[T],
    row_format: RowFormat,
    items: Iterator[Row | Unread],
    limit: int | None,
    seen: _Seen,
) -> Iterator[T]:
    place, name = place_of(path), str(path)
    known = row_format.keys | row_format.unmapped.keys()
    errors = RowErrors(unused=seen.unused)
    for item in items:
        if limit is not None and seen.rows >= limit:
            break
        if isinstance(item, Unread):
            seen.add(f"{place} {item.number}", [item.problem])
            continue
        seen.rows += 1
        source = f"{name}:{item.number}"
        if row_format.unmapped:
            _note_unmapped(row_format, item.value, errors, seen)
        if not item.value.keys() <= known:
            _note_unread(row_format, item.value, reader, errors, seen)
        value = reader.read(row_format, item.value, source, errors)
        if errors.problems:
            seen.are_row_problems = True
            seen.add(f"{place} {item.number}", errors.problems)
            errors.problems.clear()
        elif value is not None and not seen.problems:
            if any("{{" in text and any(mark in text for mark in PLACEHOLDERS) for text in value.texts):
                seen.with_placeholders += 1
                seen.first_placeholder = seen.first_placeholder or f"{place} {item.number}"
            yield value
    if seen.problems:
        where = f" in {row_format.name} rows" if seen.are_row_problems else ""
        raise DataError(join_problems(f"{path}: {plural(len(seen.problems), 'problem')}{where}", seen.problems))


def _note_unmapped(row_format: RowFormat, row: dict[str, Any], errors: RowErrors, seen: _Seen) -> None:
    """Add a problem, once per file, for a key that the columns leave out although it holds something."""
    for key, column in row_format.unmapped.items():
        if row.get(key) and key not in seen.once:
            seen.once.add(key)
            errors.problems.append(
                f'"{key}" would be lost: the columns in dataset_info.json do not map it; '
                f'add "{column}": "{key}", or "{column}": null to leave it out'
            )


def _note_unread(
    row_format: RowFormat, row: dict[str, Any], reader: RowReader[Any], errors: RowErrors, seen: _Seen
) -> None:
    """Add a problem, once per file, for a key that is not read although the result depends on it."""
    unread = row.keys() - row_format.keys - row_format.unmapped.keys()
    seen.unused |= unread
    for key in sorted(unread.difference(seen.once, row_format.ignored)):
        if problem := reader.lost(key, row[key]):
            seen.once.add(key)
            errors.problems.append(problem)


def _notes(path: Path, row_format: RowFormat, seen: _Seen) -> Iterator[Note]:
    yield Note(plural(seen.rows, f"{row_format.name} row"), str(path), is_warning=False)
    if seen.with_placeholders:
        yield Note(
            f"{seen.with_placeholders} of {seen.rows} rows hold the placeholders {{{{name}}}} or {{{{author}}}} "
            f"(first: {seen.first_placeholder}); replace them, or the model will learn to say them",
            str(path),
        )
    if seen.unused:
        shown = sorted(seen.unused)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        yield Note(f"unused keys: {', '.join(shown[:_SHOWN])}{more}", str(path))
