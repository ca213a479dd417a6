"""Rows of a data file in; conversations (`messages` or alpaca rows), checked, out."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.data.sources import Row, kind_of
from macft.data.template import Message
from macft.errors import DataError, join_faults

logger = logging.getLogger("macft")

ROLES = ("system", "user", "assistant", "tool")
_ACCEPTED = "messages, or instruction/input/output (alpaca)"
_ROW_KEYS = {
    "messages": {"messages", "tools"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
}
_MESSAGE_KEYS = {"role", "content", "tool_calls"}
_PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One conversation; `source` says where it stands, as file:line."""

    messages: tuple[Message, ...]
    source: str


def to_examples(path: Path, rows: Sequence[Row], unread: Sequence[str] = ()) -> list[Example]:
    """The rows of one file as conversations, in the format its first row shows.

    `unread` are the faults of lines that are no rows. Raises DataError with these and with every
    faulty row's line, key, what was found and what was wanted.
    """
    if not rows:
        raise DataError(join_faults(f"{path}: {_count(len(unread))}", list(unread)))
    kind, convert = _recognise(path, rows[0])
    examples: list[Example] = []
    faults = list(unread)
    for row in rows:
        found: list[str] = []
        messages = convert(row.value, found)
        faults += [f"line {row.number}: {fault}" for fault in found]
        examples.append(Example(tuple(messages), f"{path}:{row.number}"))
    if faults:
        faults.sort(key=lambda fault: int(fault.split(":")[0].removeprefix("line ")))
        where = "" if len(faults) == len(unread) else f" in {kind} rows"
        raise DataError(join_faults(f"{path}: {_count(len(faults))}{where}", faults))
    logger.info("%s: %d %s rows", path, len(rows), kind)
    _warn_of_placeholders(path, examples)
    _warn_of_unused_keys(path, rows, kind)
    return examples


def _count(faults: int) -> str:
    return f"{faults} fault{'' if faults == 1 else 's'}"


def _recognise(path: Path, row: Row) -> tuple[str, Any]:
    if "messages" in row.value:
        return "messages", _from_messages
    if "instruction" in row.value:
        return "alpaca", _from_alpaca
    keys = ", ".join(row.value) or "none"
    hint = "; ShareGPT rows are not read yet: write them as messages" if "conversations" in row.value else ""
    raise DataError(f"{path}: line {row.number}: found the keys {keys}; wanted {_ACCEPTED}{hint}")


def _from_messages(row: dict[str, Any], faults: list[str]) -> list[Message]:
    if "messages" not in row:
        faults.append(f'no "messages"; found the keys {", ".join(row) or "none"}')
        return []
    if row.get("tools"):
        faults.append('"tools": tool definitions are not supported; remove them')
    messages = row["messages"]
    if not isinstance(messages, list):
        faults.append(f'"messages": found {kind_of(messages)}, wanted a list')
        return []
    if not messages:
        faults.append('"messages": the list is empty, wanted at least one user and one assistant message')
    checked = (_check_message(message, f'"messages"[{i}]', faults) for i, message in enumerate(messages))
    return [message for message in checked if message is not None]


def _check_message(message: Any, place: str, faults: list[str]) -> Message | None:
    if not isinstance(message, dict):
        faults.append(f"{place}: found {kind_of(message)}, wanted an object with role and content")
        return None
    before = len(faults)
    for key in ("role", "content"):
        if key not in message:
            faults.append(f'{place}: no "{key}"; found the keys {", ".join(message) or "none"}')
    role = message.get("role")
    if "role" in message and role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        faults.append(f'{place} "role": found {shown}, wanted one of {", ".join(ROLES)}')
    if message.get("tool_calls"):
        faults.append(f'{place} "tool_calls": tool calls are not supported; write them into the content')
    if "content" in message:
        _check_text(message["content"], f'{place} "content"', faults)
    return {"role": role, "content": message["content"]} if len(faults) == before else None


def _check_text(value: Any, place: str, faults: list[str]) -> str:
    """The text itself, or an empty one and a fault."""
    if not isinstance(value, str):
        faults.append(f"{place}: found {kind_of(value)}, wanted a string")
        return ""
    broken = _SURROGATE.search(value)
    if broken:
        faults.append(f"{place}: half a character (\\u{ord(broken[0]):04x}) at position {broken.start()}")
        return ""
    return value


def _from_alpaca(row: dict[str, Any], faults: list[str]) -> list[Message]:
    texts: dict[str, str] = {}
    for key in ("instruction", "output"):
        if key in row:
            texts[key] = _check_text(row[key], f'"{key}"', faults)
        else:
            faults.append(f'no "{key}"; an alpaca row needs instruction and output, found {", ".join(row)}')
    for key in ("input", "system"):
        texts[key] = "" if row.get(key) is None else _check_text(row[key], f'"{key}"', faults)
    turns = _history(row.get("history"), faults)
    if faults:
        return []
    turns.append(("\n".join(filter(None, (texts["instruction"], texts["input"]))), texts["output"]))
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _history(value: Any, faults: list[str]) -> list[tuple[str, str]]:
    if value is None:
        return []
    if not isinstance(value, list):
        faults.append(f'"history": found {kind_of(value)}, wanted a list of [question, answer] pairs')
        return []
    turns: list[tuple[str, str]] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            shown = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
            faults.append(f'"history"[{i}]: found {shown}, wanted a list of question and answer')
            continue
        question, answer = (_check_text(text, f'"history"[{i}][{j}]', faults) for j, text in enumerate(pair))
        turns.append((question, answer))
    return turns


def _warn_of_placeholders(path: Path, examples: Sequence[Example]) -> None:
    holding = [e for e in examples if any(_PLACEHOLDER.search(m["content"]) for m in e.messages)]
    if holding:
        logger.warning(
            "%s: %d of %d rows hold the placeholders {{name}} or {{author}} (first: %s); replace them, "
            "or the model learns to say them",
            *(path, len(holding), len(examples), holding[0].source),
        )


def _warn_of_unused_keys(path: Path, rows: Sequence[Row], kind: str) -> None:
    unused = {key for row in rows for key in row.value} - _ROW_KEYS[kind]
    if kind == "messages":
        inner = {key for row in rows for message in row.value["messages"] for key in message}
        unused |= {f"messages[].{key}" for key in inner - _MESSAGE_KEYS}
    if unused:
        logger.warning("%s: keys that are not used: %s", path, ", ".join(sorted(unused)))
