"""Read the rows of a data file, each with the line that it starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.data.sources.tables import TABLES, count_table, is_table, table_columns, table_rows
from macft.data.sources.text import kind, lines, read_text
from macft.errors import DataError, join_problems
from macft.text import plural

SUFFIXES = (".jsonl", ".json", *TABLES, ".txt")
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One row of a data file; `number` is the line it starts on, or its position in a table, from 1."""

    number: int
    value: dict[str, Any]


@dataclass(frozen=True)
class Unread:
    """A place in a file that should hold a row and does not, and why."""

    number: int
    problem: str


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises DataError as `scan` does, and for lines that do not hold a row, naming each."""
    items = list(scan(path))
    problems = [f"{place_of(path)} {item.number}: {item.problem}" for item in items if isinstance(item, Unread)]
    if problems:
        raise DataError(join_problems(f"{path}: {plural(len(problems), 'problem')}", problems))
    return [item for item in items if isinstance(item, Row)]


def scan(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | Unread]:
    """The rows of a file and the places that hold none, in order, in bounded memory unless it is a JSON list.

    Of a table only `columns` are read. Raises DataError when there is nothing to scan: file missing, of an unknown
    kind, damaged or empty.
    """
    suffix = kind(path)
    if suffix not in SUFFIXES:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending that says what it is"
        raise DataError(f"{path}: {ending}, expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or one with .gz")
    if suffix in TABLES:
        items = table_rows(path, columns)
    elif suffix == ".txt":
        items = _text_items(path)
    else:
        items = _jsonl_items(path) if suffix == ".jsonl" or _is_jsonl(path) else _json_items(read_text(path))
    is_empty = True
    for number, value, problem in items:
        is_empty = False
        if isinstance(value, dict):
            yield Row(number, value)
        else:
            yield Unread(number, problem or f"found {kind_of(value)}, expected an object")
    if is_empty:
        raise DataError(f"{path}: the file holds no rows, expected at least one")


def count_rows(path: Path) -> int:
    """How many rows a file has; read from the header where there is one."""
    in_table = count_table(path)
    return sum(isinstance(item, Row) for item in scan(path, ())) if in_table is None else in_table


def first_keys(path: Path) -> list[str]:
    """The keys of the first row that can be read; those of a table are its columns."""
    if is_table(path):
        return table_columns(path)
    return next((list(item.value) for item in scan(path) if isinstance(item, Row)), [])


def place_of(path: Path) -> str:
    """What row numbers count in this file: lines or rows."""
    return "row" if kind(path) in (".parquet", ".arrow") else "line"


def kind_of(value: object) -> str:
    """The JSON type of a value, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


class DoubleKeyError(ValueError):
    """An object of a JSON text holds a key twice, so that one of its values would be lost."""


_TWICE = "the key "


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise DoubleKeyError(f"{_TWICE}{json.dumps(double, ensure_ascii=False)} stands twice in one object; keep one")
    return value


# making a decoder for each text would take as long again as reading a short one
_STRICT, _LENIENT = json.JSONDecoder(object_pairs_hook=_without_doubles), json.JSONDecoder()


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, and DoubleKeyError where an object holds a key twice."""
    return _STRICT.decode(text)


# (line, value, problem): the problem is empty where a value was read
_Item = tuple[int, Any, str]


def _text_items(path: Path) -> Iterator[_Item]:
    """Each line that is not blank is a text."""
    for number, text, problem in lines(path):
        if problem:
            yield number, None, problem
        elif text.strip():
            yield number, {"text": text.rstrip("\r\n")}, ""


def _is_jsonl(path: Path) -> bool:
    """Whether a .json file holds one object per line, as many on the hubs do."""
    for _, text, _ in lines(path):
        if text.strip():
            value, problem = _parsed(text)
            return isinstance(value, dict) or problem.startswith(_TWICE)
    return False


def _jsonl_items(path: Path) -> Iterator[_Item]:
    for number, text, problem in lines(path):
        if problem:
            yield number, None, problem
        elif text.strip():
            value, problem = _parsed(text.rstrip("\r\n"))
            is_list = number == 1 and text.lstrip().startswith("[") and problem
            yield number, value, f"{problem}; a list belongs in a .json file" if is_list else problem


def _parsed(text: str) -> tuple[Any, str]:
    try:
        return parse_json(text), ""
    except json.JSONDecodeError as error:
        return None, not_json(text, error)
    except DoubleKeyError as error:
        return None, str(error)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON that can be read ({error})"


# the full-width punctuation that a Chinese keyboard types in place of JSON's
_WIDE = {"，": ",", "：": ":", "“": '"', "”": '"', "［": "[", "］": "]", "｛": "{", "｝": "}"}


def not_json(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong with a text that is not JSON, and where."""
    found = text[error.pos : error.pos + 1]
    wide = f": found the full-width {found}, expected {_WIDE[found]}" if found in _WIDE else ""
    before = text[: error.pos].rstrip()
    comma = ", after a comma that ends the list; remove it" if before.endswith(",") and found in "}]" and found else ""
    return f"not JSON ({error.msg} at column {error.colno}{wide}{comma})"


def _json_items(text: str) -> Iterator[_Item]:
    """The items of one JSON list, decoded one by one to know the line of each."""
    at = _skip(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        hint = "; one object a line belongs in a .jsonl file" if text[at] == "{" else ""
        yield _line(text, at), None, f"starts with {text[at]!r}, expected a list of objects{hint}"
        return
    line, seen = 1, 0
    at = _skip(text, at + 1)
    closed = text.startswith("]", at)
    while not closed:
        line, seen = line + text.count("\n", seen, at), at
        problem = ""
        try:
            try:
                value, at = _STRICT.raw_decode(text, at)
            except DoubleKeyError as error:
                # the rows after it can still be read
                problem = str(error)
                value, at = None, _LENIENT.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            yield error.lineno, None, not_json(text, error)
            return
        except (ValueError, RecursionError) as error:
            yield line, None, f"not JSON that can be read ({error})"
            return
        yield line, value, problem
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed:
            following = _skip(text, at + 1)
            if not text.startswith(",", at) or text.startswith("]", following):
                found = "a comma after the last item" if text.startswith(",", at) else _found(text, at)
                yield _line(text, at), None, f"column {_column(text, at)}: {found}, expected ',' or ']'"
                return
            at = following
    rest = _skip(text, at + 1)
    if rest < len(text):
        yield _line(text, rest), None, f"column {_column(text, rest)}: {_found(text, rest)} after the list"


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _column(text: str, at: int) -> int:
    return at - text.rfind("\n", 0, at)


def _found(text: str, at: int) -> str:
    if at >= len(text):
        return "the file ends here"
    return f"found {f'the full-width {text[at]}' if text[at] in _WIDE else repr(text[at])}"
