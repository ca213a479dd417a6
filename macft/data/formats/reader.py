"""A data file and a way to read its rows in; what the rows stand for, one by one, out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from macft.data.formats.columns import KNOWN_KEYS, Layout
from macft.data.formats.messages import Notes
from macft.data.sources.rows import Row, Unread, place_of, scan
from macft.data.sources.tables import is_table, table_columns
from macft.errors import DataError, join_problems
from macft.text import plural

logger = logging.getLogger("macft")

T = TypeVar("T")

# problems that are kept, at least as many as an error shows; unused keys that are named
_KEPT = 100
_SHOWN = 8
PLACEHOLDERS = ("{{name}}", "{{author}}")


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What a stage makes of rows. `read` gives None where it adds a problem to the notes."""

    recognize: Callable[[Path, Row], Layout]
    read: Callable[[Layout, dict[str, Any], str, Notes], T | None]
    texts: Callable[[T], Iterator[str]]  # the texts that are looked through for placeholders


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


def converted(path: Path, reading: Reading[T], layout: Layout | None = None, limit: int | None = None) -> Iterator[T]:
    """What the first `limit` rows of a file stand for, in bounded memory.

    Without a layout the first row shows it. Nothing follows the first problem. Raises DataError when the file
    cannot be read, and, once all is read, with every invalid row's line, key, what was found and what was expected.
    """
    names = table_columns(path) if is_table(path) else None
    expected = None
    if names is not None:
        known = KNOWN_KEYS if layout is None else layout.keys | layout.unmapped.keys()
        expected = [name for name in names if name in known]
    items = scan(path, expected)
    first: list[Row | Unread] = []
    if layout is None:
        layout, first = _recognized(path, reading, items, names)
    yield from _rows(
        path, reading, layout, chain(first, items), limit, unread_columns=set(names or ()) - set(expected or ())
    )


def _recognized(
    path: Path, reading: Reading[T], items: Iterator[Row | Unread], names: list[str] | None
) -> tuple[Layout, list[Row | Unread]]:
    """The layout that the first row shows, and what was read to know it."""
    first: list[Row | Unread] = []
    for item in items:
        first.append(item)
        if isinstance(item, Row):
            # the columns of a table that are not read say, by their names, what it holds
            row = item if names is None else Row(item.number, dict.fromkeys(names) | item.value)
            return reading.recognize(path, row), first
    unread = [f"{place_of(path)} {item.number}: {item.problem}" for item in first if isinstance(item, Unread)]
    raise DataError(join_problems(f"{path}: {plural(len(unread), 'problem')}", unread))


def _rows(
    path: Path,
    reading: Reading[T],
    layout: Layout,
    items: Iterator[Row | Unread],
    limit: int | None,
    *,
    unread_columns: set[str],
) -> Iterator[T]:
    seen = _Seen(unused=unread_columns)
    place, name = place_of(path), str(path)
    known = layout.keys | layout.unmapped.keys()
    notes = Notes(unused=seen.unused)
    for item in items:
        if limit is not None and seen.rows >= limit:
            break
        if isinstance(item, Unread):
            seen.add(f"{place} {item.number}", [item.problem])
            continue
        seen.rows += 1
        source = f"{name}:{item.number}"
        if layout.unmapped:
            _note_unmapped(layout, item.value, notes, seen)
        value = reading.read(layout, item.value, source, notes)
        if not item.value.keys() <= known:
            seen.unused |= item.value.keys() - known
        if notes.problems:
            seen.are_row_problems = True
            seen.add(f"{place} {item.number}", notes.problems)
            notes.problems.clear()
        elif value is not None and not seen.problems:
            if any("{{" in text and any(mark in text for mark in PLACEHOLDERS) for text in reading.texts(value)):
                seen.with_placeholders += 1
                seen.first_placeholder = seen.first_placeholder or source
            yield value
    if seen.problems:
        where = f" in {layout.name} rows" if seen.are_row_problems else ""
        raise DataError(join_problems(f"{path}: {plural(len(seen.problems), 'problem')}{where}", seen.problems))
    _tell(path, layout, seen)


def _note_unmapped(layout: Layout, row: dict[str, Any], notes: Notes, seen: _Seen) -> None:
    """A problem, once a file, for a key that columns= left out though it holds something."""
    for key, column in layout.unmapped.items():
        if row.get(key) and key not in seen.once:
            seen.once.add(key)
            notes.problems.append(
                f'"{key}" would be lost: the columns in dataset_info.json do not map it; '
                f'add "{column}": "{key}", or "{column}": null to leave it out'
            )


def _tell(path: Path, layout: Layout, seen: _Seen) -> None:
    logger.info("%s: %s", path, plural(seen.rows, f"{layout.name} row"))
    if seen.with_placeholders:
        logger.warning(
            "%s: %d of %d rows hold the placeholders {{name}} or {{author}} (first: %s); replace them, "
            "or the model learns to say them",
            *(path, seen.with_placeholders, seen.rows, seen.first_placeholder),
        )
    if seen.unused:
        shown = sorted(seen.unused)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        logger.warning("%s: keys that are not used: %s%s", path, ", ".join(shown[:_SHOWN]), more)
