"""Rows of a data file in; conversations or plain texts, checked, out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from macft.data.formats.columns import SIDES, Layout, message_keys_of, recognize_style
from macft.data.formats.messages import Notes, Tools, check_alternation, check_messages, check_text, read_tools
from macft.data.formats.reader import Reading, converted
from macft.data.sources.rows import Row, kind_of, place_of
from macft.data.templates.chat_template import Message
from macft.errors import DataError

_ACCEPTED = (
    "messages, conversations (ShareGPT), instruction/input/output (alpaca), prompt and completion, "
    "query and response, or keys that dataset_info.json maps"
)


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
    """One conversation, with the tools it may call; `source` says where it stands, as file:line."""

    messages: tuple[Message, ...]
    source: str
    tools: Tools | None = None


@dataclass(frozen=True)
class Text:
    """One text to continue pre-training on; `source` says where it stands, as file:line."""

    text: str
    source: str


def to_examples(path: Path, layout: Layout | None = None, limit: int | None = None) -> Iterator[Example]:
    """The conversations of one file, with the errors of `convert.converted`."""
    return converted(path, EXAMPLES, layout, limit)


def to_texts(path: Path, layout: Layout | None = None, limit: int | None = None) -> Iterator[Text]:
    """The texts of one file, with the errors of `convert.converted`."""
    return converted(path, TEXTS, layout, limit)


def _recognize(path: Path, row: Row) -> Layout:
    layout = recognize_style(row.value.keys())
    if layout is not None:
        return layout
    at = f"{path}: {place_of(path)} {row.number}"
    if set(SIDES) <= row.value.keys():
        raise DataError(f"{at}: found chosen and rejected: these are preference pairs; set stage: dpo")
    if "text" in row.value:
        raise DataError(f"{at}: found text: rows without questions; set stage: pt to continue pre-training on them")
    raise DataError(f"{at}: found the keys {', '.join(row.value) or 'none'}; expected {_ACCEPTED}")


def _read(layout: Layout, row: dict[str, Any], source: str, notes: Notes) -> Example | None:
    tools = read_tools(row.get(layout.columns.get("tools", "")), layout.columns.get("tools", ""), notes)
    if layout.style == "conversation":
        messages = conversation_turns(layout, row, notes, open_end=False)
    elif layout.style == "completion" and isinstance(row.get(layout.columns["prompt"]), list):
        messages = _completion_turns(layout, row, notes)
    else:
        prompt, [answer] = alpaca_turns(layout, row, ("response",), notes)
        messages = [*prompt, {"role": "assistant", "content": answer}]
    return None if notes.problems else Example(tuple(messages), source, tools)


def conversation_turns(layout: Layout, row: dict[str, Any], notes: Notes, *, open_end: bool) -> list[Message]:
    """The system text and the list of messages of a row; `open_end` says that its last is a question."""
    key = layout.columns["messages"]
    if key not in row:
        notes.problems.append(layout.missing("messages", row))
        return []
    naming = layout.naming or message_keys_of(row[key])
    messages = check_messages(row[key], key, notes, naming)
    if layout.alternates and not notes.problems:
        check_alternation(messages, key, notes, naming, open_end=open_end)
    elif row[key] == []:
        notes.problems.append(f'"{key}": the list is empty, expected at least one user and one assistant message')
    system = _optional_text(layout, row, "system", notes)
    if system and any(message["role"] == "system" for message in messages):
        notes.problems.append(f'"{layout.columns["system"]}": "{key}" hold a system message too; keep one of the two')
    return [{"role": "system", "content": system}, *messages] if system else messages


def _completion_turns(layout: Layout, row: dict[str, Any], notes: Notes) -> list[Message]:
    """Both parts as lists of messages, as TRL has them."""
    key = layout.columns["response"]
    if key not in row:
        notes.problems.append(layout.missing("response", row))
        return []
    prompt = check_messages(row[layout.columns["prompt"]], layout.columns["prompt"], notes)
    if not isinstance(row[key], str):
        return [*prompt, *check_messages(row[key], key, notes)]
    return [*prompt, {"role": "assistant", "content": check_text(row[key], f'"{key}"', notes)}]


def alpaca_turns(
    layout: Layout, row: dict[str, Any], answers: Sequence[str], notes: Notes
) -> tuple[list[Message], list[str]]:
    """(system, history and question; the texts of the columns `answers`), empty where there are problems."""
    columns = layout.columns
    texts: dict[str, str] = {}
    needed = [column for column in layout.needed if column not in SIDES and column != "response"]
    for column in (*needed, *answers):
        key = columns[column]
        if key not in row:
            notes.problems.append(layout.missing(column, row))
        elif row[key] is None and column == "prompt" and row.get(columns.get("query", "")):
            texts[column] = ""
        else:
            texts[column] = check_text(row[key], f'"{key}"', notes)
    question = [texts.get("prompt", ""), texts.get("query", "") or _optional_text(layout, row, "query", notes)]
    system = _optional_text(layout, row, "system", notes)
    turns = _history(row.get(columns.get("history", "")), columns.get("history", ""), notes)
    if notes.problems:
        return [], [""] * len(answers)
    prompt: list[Message] = [{"role": "system", "content": system}] if system else []
    for asked, answer in turns:
        prompt += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": "\n".join(filter(None, question))})
    return prompt, [texts[column] for column in answers]


def _optional_text(layout: Layout, row: dict[str, Any], column: str, notes: Notes) -> str:
    key = layout.columns.get(column)
    value = None if key is None or column in layout.needed else row.get(key)
    return "" if value is None else check_text(value, f'"{key}"', notes)


def _history(value: Any, key: str, notes: Notes) -> list[tuple[str, str]]:
    if value is None:
        return []
    if not isinstance(value, list):
        notes.problems.append(f'"{key}": found {kind_of(value)}, expected a list of [question, answer] pairs')
        return []
    turns: list[tuple[str, str]] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            shown = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
            notes.problems.append(f'"{key}"[{i}]: found {shown}, expected a list of question and answer')
            continue
        question, answer = (check_text(text, f'"{key}"[{i}][{j}]', notes) for j, text in enumerate(pair))
        turns.append((question, answer))
    return turns


def _recognize_text(path: Path, row: Row) -> Layout:
    if "text" in row.value:
        return Layout("text", "text", {"prompt": "text"})
    raise DataError(
        f"{path}: {place_of(path)} {row.number}: found the keys {', '.join(row.value) or 'none'}; stage: pt needs "
        'text, or a key that dataset_info.json maps: "columns": {"prompt": KEY}; to train on answers set stage: sft'
    )


def _read_text(layout: Layout, row: dict[str, Any], source: str, notes: Notes) -> Text | None:
    if layout.style == "conversation":
        notes.problems.append(f"stage: pt needs texts, found {layout.name} rows; set stage: sft")
        return None
    # alpaca rows, as a data set's entry names them: the prompt and what stands below it
    column = layout.needed[0]
    key = layout.columns[column]
    if key not in row:
        notes.problems.append(layout.missing(column, row))
        return None
    below = _optional_text(layout, row, "query", notes)
    text = "\n".join(filter(None, (check_text(row[key], f'"{key}"', notes), below)))
    return None if notes.problems else Text(text, source)


def _contents(example: Conversation) -> Iterator[str]:
    return (message["content"] for message in example.messages)


EXAMPLES: Reading[Example] = Reading(_recognize, _read, _contents)
TEXTS: Reading[Text] = Reading(_recognize_text, _read_text, lambda text: iter((text.text,)))
