"""Rows of a data file in; conversations (`messages` or alpaca rows), checked, out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from macft.data.sources import Row, kind_of
from macft.data.template import Message
from macft.errors import DataError, join_faults

logger = logging.getLogger("macft")

MESSAGE_KEYS = {"role", "content", "tool_calls"}
_ACCEPTED = "messages, or instruction/input/output (alpaca)"
_ROW_KEYS = {
    "messages": {"messages", "tools"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
}
_PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")
_SURROGATE = re.compile("[\ud800-\udfff]")

Converted = TypeVar("Converted")
# one row's object -> what it stands for; faults are added to the list
Convert = Callable[[dict[str, Any], list[str]], Converted]


class Conversation(Protocol):
    """What examples and pairs have in common: texts, and the place they come from (file:line)."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """Every message, in order."""

    @property
    def source(self) -> str:
        """file:line"""


@dataclass(frozen=True)
class Example:
    """One conversation; `source` says where it stands, as file:line."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class Naming:
    """How a format writes one message: the two keys, and its role names with what they mean."""

    role: str
    content: str
    roles: dict[str, str]


PLAIN = Naming("role", "content", {role: role for role in ("system", "user", "assistant", "tool")})


def to_examples(path: Path, rows: Sequence[Row], unread: Sequence[str] = ()) -> list[Example]:
    """The rows of one file as conversations, in the format its first row shows.

    `unread` are the faults of lines that are no rows. Raises DataError with these and with every
    faulty row's line, key, what was found and what was wanted.
    """
    kind, converted = convert_rows(path, rows, unread, _recognise)
    examples = [Example(tuple(messages), source) for source, messages in converted]
    warn_of_placeholders(path, examples)
    unused = {key for row in rows for key in row.value} - _ROW_KEYS[kind]
    if kind == "messages":
        inner = {key for row in rows for message in row.value["messages"] for key in message}
        unused |= {f"messages[].{key}" for key in inner - MESSAGE_KEYS}
    warn_of_unused_keys(path, unused)
    return examples


def convert_rows(
    path: Path,
    rows: Sequence[Row],
    unread: Sequence[str],
    recognise: Callable[[Path, Row], tuple[str, Convert[Converted]]],
) -> tuple[str, list[tuple[str, Converted]]]:
    """The name of the format that `recognise` sees in the first row, and (source, value) of each row.

    Raises DataError with `unread` and the faults of all rows.
    """
    if not rows:
        raise DataError(join_faults(f"{path}: {_count(len(unread))}", list(unread)))
    kind, convert = recognise(path, rows[0])
    converted: list[tuple[str, Converted]] = []
    faults = list(unread)
    for row in rows:
        found: list[str] = []
        converted.append((f"{path}:{row.number}", convert(row.value, found)))
        faults += [f"line {row.number}: {fault}" for fault in found]
    if faults:
        faults.sort(key=lambda fault: int(fault.split(":")[0].removeprefix("line ")))
        where = "" if len(faults) == len(unread) else f" in {kind} rows"
        raise DataError(join_faults(f"{path}: {_count(len(faults))}{where}", faults))
    logger.info("%s: %d %s rows", path, len(rows), kind)
    return kind, converted


def _count(faults: int) -> str:
    return f"{faults} fault{'' if faults == 1 else 's'}"


def _recognise(path: Path, row: Row) -> tuple[str, Any]:
    if "messages" in row.value:
        return "messages", _from_messages
    if "instruction" in row.value and ("output" in row.value or "chosen" not in row.value):
        return "alpaca", _from_alpaca
    if "chosen" in row.value and "rejected" in row.value:
        raise DataError(
            f"{path}: line {row.number}: found chosen and rejected: these are preference pairs; set stage: dpo"
        )
    keys = ", ".join(row.value) or "none"
    hint = "; ShareGPT rows are not read yet: write them as messages" if "conversations" in row.value else ""
    raise DataError(f"{path}: line {row.number}: found the keys {keys}; wanted {_ACCEPTED}{hint}")


def _from_messages(row: dict[str, Any], faults: list[str]) -> list[Message]:
    if "messages" not in row:
        faults.append(f'no "messages"; found the keys {", ".join(row) or "none"}')
        return []
    check_tools(row, faults)
    if row["messages"] == []:
        faults.append('"messages": the list is empty, wanted at least one user and one assistant message')
    return check_messages(row["messages"], "messages", faults)


def check_tools(row: dict[str, Any], faults: list[str]) -> None:
    """A fault where a row defines tools."""
    if row.get("tools"):
        faults.append('"tools": tool definitions are not supported; remove them')


def check_messages(value: Any, key: str, faults: list[str], naming: Naming = PLAIN) -> list[Message]:
    """The messages of a list under `key`, without those that get a fault."""
    if not isinstance(value, list):
        faults.append(f'"{key}": found {kind_of(value)}, wanted a list')
        return []
    checked = (check_message(message, f'"{key}"[{i}]', faults, naming) for i, message in enumerate(value))
    return [message for message in checked if message is not None]


def check_message(value: Any, place: str, faults: list[str], naming: Naming = PLAIN) -> Message | None:
    """One message, with `role` and `content` whatever the format calls them; None and faults if it is none."""
    if not isinstance(value, dict):
        faults.append(f"{place}: found {kind_of(value)}, wanted an object with {naming.role} and {naming.content}")
        return None
    before = len(faults)
    for key in (naming.role, naming.content):
        if key not in value:
            faults.append(f'{place}: no "{key}"; found the keys {", ".join(value) or "none"}')
    role = value.get(naming.role)
    if naming.role in value and not (isinstance(role, str) and role in naming.roles):
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        faults.append(f'{place} "{naming.role}": found {shown}, wanted one of {", ".join(naming.roles)}')
    if value.get("tool_calls"):
        faults.append(f'{place} "tool_calls": tool calls are not supported; write them into the content')
    if naming.content in value:
        check_text(value[naming.content], f'{place} "{naming.content}"', faults)
    if len(faults) > before:
        return None
    return {"role": naming.roles[value[naming.role]], "content": value[naming.content]}


def check_text(value: Any, place: str, faults: list[str]) -> str:
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
    prompt, [answer] = alpaca_turns(row, ("output",), faults)
    return [*prompt, {"role": "assistant", "content": answer}]


def alpaca_turns(row: dict[str, Any], answers: Sequence[str], faults: list[str]) -> tuple[list[Message], list[str]]:
    """(system, history and question; the texts under the keys `answers`), empty where there are faults."""
    texts: dict[str, str] = {}
    required = ("instruction", *answers)
    for key in required:
        if key in row:
            texts[key] = check_text(row[key], f'"{key}"', faults)
        else:
            needs = f"{', '.join(required[:-1])} and {required[-1]}"
            faults.append(f'no "{key}"; an alpaca row needs {needs}, found {", ".join(row)}')
    for key in ("input", "system"):
        texts[key] = "" if row.get(key) is None else check_text(row[key], f'"{key}"', faults)
    turns = _history(row.get("history"), faults)
    if faults:
        return [], [""] * len(answers)
    prompt = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for question, answer in turns:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": "\n".join(filter(None, (texts["instruction"], texts["input"])))})
    return prompt, [texts[key] for key in answers]


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
        question, answer = (check_text(text, f'"history"[{i}][{j}]', faults) for j, text in enumerate(pair))
        turns.append((question, answer))
    return turns


def warn_of_placeholders(path: Path, examples: Sequence[Conversation]) -> None:
    """One warning if texts hold the placeholders of a public data set."""
    holding = [e for e in examples if any(_PLACEHOLDER.search(m["content"]) for m in e.messages)]
    if holding:
        logger.warning(
            "%s: %d of %d rows hold the placeholders {{name}} or {{author}} (first: %s); replace them, "
            "or the model learns to say them",
            *(path, len(holding), len(examples), holding[0].source),
        )


def warn_of_unused_keys(path: Path, unused: set[str]) -> None:
    """One warning naming the keys that nothing reads."""
    if unused:
        logger.warning("%s: keys that are not used: %s", path, ", ".join(sorted(unused)))
