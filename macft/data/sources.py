"""A JSON or JSONL file in; its rows, each with the line it starts on, out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from macft.errors import DataError, join_faults

SUFFIXES = (".jsonl", ".json")
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One object of a data file; `number` is the line (from 1) it starts on."""

    number: int
    value: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl file, or of a .json file that holds a list of objects.

    Raises DataError: file missing, not UTF-8, empty, or with every line that is not a JSON object.
    """
    rows, faults = scan_rows(path)
    if faults:
        raise DataError(join_faults(f"{path}: {_count(len(faults), 'fault')}", faults))
    return rows


def scan_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file that are JSON objects, and a fault for each line that is not.

    Raises DataError when there is nothing to scan: file missing, not UTF-8 or empty.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: ends in {path.suffix or 'nothing'!r}, wanted .jsonl or .json")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty, wanted at least one row")
    rows: list[Row] = []
    faults: list[str] = []
    for line, value, fault in _jsonl_items(text) if path.suffix == ".jsonl" else _json_items(text):
        if isinstance(value, dict):
            rows.append(Row(line, value))
        else:
            faults.append(f"line {line}: {fault or f'found {kind_of(value)}, wanted an object'}")
    if not rows and not faults:
        raise DataError(f"{path}: the list is empty, wanted at least one row")
    return rows, faults


def nearest_file(path: Path) -> str:
    """A hint that names the file beside `path` with the most similar name, or nothing."""
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def kind_of(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{nearest_file(path)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at offset {error.start}; save the file as UTF-8"
        ) from None


# (line, value, fault): the fault is empty where a value was read
_Item = tuple[int, Any, str]


def _jsonl_items(text: str) -> Iterator[_Item]:
    # only \n ends a line: U+2028 and its like may stand inside a JSON string
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            yield line, json.loads(content), ""
        except json.JSONDecodeError as error:
            hint = "; a list belongs in a .json file" if line == 1 and content.lstrip()[0] == "[" else ""
            yield line, None, f"not JSON ({error.msg} at column {error.colno}){hint}"
        except (ValueError, RecursionError) as error:
            yield line, None, f"not JSON that can be read ({error})"


def _json_items(text: str) -> Iterator[_Item]:
    """The items of one JSON list, read one by one so that each is known by its line."""
    at = _skip(text, 0)
    if text[at] != "[":
        hint = "; one object a line belongs in a .jsonl file" if text[at] == "{" else ""
        yield _line(text, at), None, f"starts with {text[at]!r}, wanted a list of objects{hint}"
        return
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip(text, at + 1)
    closed = text.startswith("]", at)
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, None, f"not JSON ({error.msg} at column {error.colno})"
            return
        except (ValueError, RecursionError) as error:
            yield line, None, f"not JSON that can be read ({error})"
            return
        yield line, value, ""
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed:
            following = _skip(text, at + 1)
            if not text.startswith(",", at) or text.startswith("]", following):
                found = "a comma after the last item" if text.startswith(",", at) else _found(text, at)
                yield _line(text, at), None, f"column {_column(text, at)}: {found}, wanted ',' or ']'"
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
    return f"found {text[at]!r}" if at < len(text) else "the file ends here"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
