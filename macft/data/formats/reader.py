"""Read the rows of a data file as what a stage trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from macft.data.formats.columns import KNOWN_KEYS, RowFormat
from macft.data.formats.messages import RowErrors
from macft.data.notes import Note
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import Row, Unread, place_of, scan
from macft.data.sources.tables import is_table, table_columns
from macft.data.templates.chat_template import Message
from macft.errors import DataError, join_problems
from macft.text import plural

# problems that are kept, at least as many as an error shows; unused keys that are named
_KEPT = 100
_SHOWN = 8
PLACEHOLDERS = ("{{name}}", "{{author}}")


class DataRow:
    """What every kind of row has; what it leaves out is said of a conversation without tools.

    `identity`, `question` and `opposite` are JSON values, to be compared.
    """

    if TYPE_CHECKING:

        @property
        def source(self) -> str:
            """Where it stands, as file:line."""

        @property
        def messages(self) -> tuple[Message, ...]:
            """Every message, of all answers; a text has none."""

        @property
        def identity(self) -> Any:
            """Equal for two rows that say the same."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages that follow each other: without answers to choose from."""
        return self.messages

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is written in it."""
        return tuple(message["content"] for message in self.messages)

    @property
    def answers(self) -> int:
        """How many assistant messages one conversation of it has."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def has_tools(self) -> bool:
        """Whether it defines tools."""
        return False

    @property
    def question(self) -> Any:
        """Equal for two rows that ask the same; None where nothing is asked."""
        return None

    @property
    def opposite(self) -> Any:
        """The identity of a row that contradicts it; None: there is none."""
        return None


T = TypeVar("T", bound=DataRow)
Say = Callable[[Note], None]


@dataclass(frozen=True)
class RowReader(Generic[T]):
    """What a kind of data makes of rows.

    `check` gives the data set as it is read, and raises DataError where it holds others; `recognize` finds the format
    by the first row; `read` gives None where it adds a problem. `own_keys` are read besides those of conversations.
    """

    check: Callable[[DataSource], DataSource]
    recognize: Callable[[Path, Row], RowFormat]
    read: Callable[[RowFormat, dict[str, Any], str, RowErrors], T | None]
    own_keys: frozenset[str] = frozenset()


@dataclass
class _Seen:
    """What is known of a file when it has been read."""

    rows: int = 0
    problems: list[str] = field(default_factory=list)  # all but the first few are empty: only their number is told
    are_row_problems: bool = False
    once: set[str] = field(default_factory=set)
    with_placeholders: int = 0
    first_placeholder: str = ""
    unused: set[str] = field(default_factory=set)

    def add(self, place: str, problems: list[str]) -> None:
        """Keep the problems of one row, in bounded memory."""
        self.problems += [f"{place}: {problem}" if len(self.problems) < _KEPT else "" for problem in problems]


def read_file(
    path: Path,
    reader: RowReader[T],
    row_format: RowFormat | None = None,
    limit: int | None = None,
    say: Say = lambda _: None,
) -> Iterator[T]:
    """What the first `limit` rows of a file stand for, in bounded memory; at its end `say` is told about the file.

    Without a format the first row shows it. Nothing follows the first problem. Raises DataError when the file
    cannot be read, and, once all is read, with every invalid row's line, key, what was found and what was expected.
    """
    names = table_columns(path) if is_table(path) else None
    expected = None
    if names is not None:
        known = KNOWN_KEYS | reader.own_keys if row_format is None else row_format.keys | row_format.unmapped.keys()
        expected = [name for name in names if name in known]
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
    """The format that the first row shows, and what was read to know it."""
    first: list[Row | Unread] = []
    for item in items:
        first.append(item)
        if isinstance(item, Row):
            # the columns of a table that are not read say, by their names, what it holds
            row = item if names is None else Row(item.number, dict.fromkeys(names) | item.value)
            return reader.recognize(path, row), first
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
        value = reader.read(row_format, item.value, source, errors)
        if not item.value.keys() <= known:
            seen.unused |= item.value.keys() - known
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
    """A problem, once a file, for a key that columns= left out though it holds something."""
    for key, column in row_format.unmapped.items():
        if row.get(key) and key not in seen.once:
            seen.once.add(key)
            errors.problems.append(
                f'"{key}" would be lost: the columns in dataset_info.json do not map it; '
                f'add "{column}": "{key}", or "{column}": null to leave it out'
            )


def _notes(path: Path, row_format: RowFormat, seen: _Seen) -> Iterator[Note]:
    yield Note(plural(seen.rows, f"{row_format.name} row"), str(path), is_warning=False)
    if seen.with_placeholders:
        yield Note(
            f"{seen.with_placeholders} of {seen.rows} rows hold the placeholders {{{{name}}}} or {{{{author}}}} "
            f"(first: {seen.first_placeholder}); replace them, or the model learns to say them",
            str(path),
        )
    if seen.unused:
        shown = sorted(seen.unused)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        yield Note(f"keys that are not used: {', '.join(shown[:_SHOWN])}{more}", str(path))
