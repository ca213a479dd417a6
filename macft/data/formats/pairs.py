"""Rows of a preference data file in; pairs of answers to one prompt, checked, out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from macft.data.formats.columns import ALPACA, SIDES, Layout, message_keys_of
from macft.data.formats.conversations import alpaca_turns, conversation_turns
from macft.data.formats.messages import Notes, check_message, check_messages, check_text
from macft.data.formats.reader import Reading, converted
from macft.data.sources.rows import Row, kind_of, place_of
from macft.data.templates.chat_template import Message
from macft.errors import DataError

_SIDE_COLUMNS = {side: side for side in SIDES}


@dataclass(frozen=True)
class _Turns:
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class PairExample:
    """A prompt with the answer that is expected and the one that is not; `source` is its file:line."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """Every message of the pair, for what looks at all its texts."""
        return (*self.prompt, *self.chosen, *self.rejected)


def holds_pair(keys: Collection[str]) -> bool:
    """Whether rows with these keys are preference pairs."""
    return set(SIDES) <= set(keys)


def to_pairs(path: Path, layout: Layout | None = None, limit: int | None = None) -> Iterator[PairExample]:
    """The pairs of one file, with the errors of `convert.converted`."""
    return converted(path, PAIRS, layout, limit)


def _recognize(path: Path, row: Row) -> Layout:
    keys = row.value.keys()
    if not keys & set(SIDES):
        raise DataError(
            f"{path}: {place_of(path)} {row.number}: found the keys {', '.join(keys) or 'none'}; a preference stage "
            "needs prompt, chosen and rejected; to train on single answers set stage: sft"
        )
    # a table's columns are known without their values, as null
    has_prompt = row.value.get("prompt") is not None
    if has_prompt or not keys & {"conversations", "instruction"}:
        return Layout("preference", "preference", {"prompt": "prompt", **_SIDE_COLUMNS, "tools": "tools"})
    if "conversations" in keys:
        columns = {"messages": "conversations", **_SIDE_COLUMNS, "system": "system", "tools": "tools"}
        return Layout("ShareGPT preference", "conversation", columns, alternates=True)
    columns = {key: ALPACA[key] for key in ("prompt", "query", "system", "history")}
    return Layout("alpaca preference", "alpaca", columns | _SIDE_COLUMNS)


def _read(layout: Layout, row: dict[str, Any], source: str, notes: Notes) -> PairExample | None:
    _refuse_tools(layout, row, notes)
    read = {"alpaca": _from_alpaca, "conversation": _from_conversation, "preference": _from_preference}[layout.style]
    turns = read(layout, row, notes)
    # what is wrong with a message comes first: the whole cannot be judged without it
    if not notes.problems:
        _check_turns(layout, turns, notes)
    if notes.problems:
        return None
    return PairExample(tuple(turns.prompt), tuple(turns.chosen), tuple(turns.rejected), source)


def _refuse_tools(layout: Layout, row: dict[str, Any], notes: Notes) -> None:
    key = layout.columns.get("tools", "")
    if row.get(key) and row[key] != "[]":
        notes.problems.append(f'"{key}": tool definitions are not supported in preference pairs; remove them')


def _from_alpaca(layout: Layout, row: dict[str, Any], notes: Notes) -> _Turns:
    prompt, [chosen, rejected] = alpaca_turns(layout, row, SIDES, notes)
    return _Turns(prompt, [_answer(chosen)], [_answer(rejected)])


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _from_conversation(layout: Layout, row: dict[str, Any], notes: Notes) -> _Turns:
    prompt = conversation_turns(layout, row, notes, open_end=True)
    naming = layout.naming or message_keys_of(row.get(layout.columns["messages"]))
    answers: dict[str, list[Message]] = {}
    for side in SIDES:
        key = layout.columns[side]
        if key not in row:
            expected = f"{layout.columns['messages']}, chosen and rejected"
            notes.problems.append(layout.missing(side, row) if layout.is_declared else _missing(key, expected, row))
            continue
        message = check_message(row[key], f'"{key}"', notes, naming)
        answers[side] = [] if message is None else [message]
    return _Turns(prompt, answers.get("chosen", []), answers.get("rejected", []))


def _from_preference(layout: Layout, row: dict[str, Any], notes: Notes) -> _Turns:
    """TRL's rows: messages or texts; `prompt` may be left out or repeated where the answers begin with it."""
    chosen, rejected = (_side(row, layout.columns[side], notes) for side in SIDES)
    prompt = _turns(row["prompt"], "prompt", "user", notes) if row.get("prompt") is not None else []
    if notes.problems:
        return _Turns([], [], [])
    if _begins_with_answer(chosen) and _begins_with_answer(rejected):
        if not prompt:
            expected = "prompt, or chosen and rejected that begin with the same messages"
            notes.problems.append(_missing("prompt", expected, row))
        return _Turns(prompt, chosen, rejected)
    # at least one message of each side is its answer
    sides = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [message for message, _ in takewhile(lambda two: two[0] == two[1], sides)]
    rest = _Turns(shared, chosen[len(shared) :], rejected[len(shared) :])
    if not (_begins_with_answer(rest.chosen) and _begins_with_answer(rest.rejected)):
        notes.problems.append(f"chosen and rejected answer different prompts: they part at message {len(shared) + 1}")
    elif prompt and shared[-len(prompt) :] != prompt:
        notes.problems.append(
            '"prompt": differs from the messages that chosen and rejected begin with; correct or remove it'
        )
    return rest


def _side(row: dict[str, Any], side: str, notes: Notes) -> list[Message]:
    if side not in row:
        notes.problems.append(_missing(side, "chosen and rejected", row))
        return []
    return _turns(row[side], side, "assistant", notes)


def _missing(key: str, expected: str, row: dict[str, Any]) -> str:
    return f'no "{key}"; a pair needs {expected}, found {", ".join(row) or "none"}'


def _turns(value: Any, key: str, role: str, notes: Notes) -> list[Message]:
    """The messages under `key`; a text is one message of `role`."""
    if isinstance(value, list):
        if not value:
            notes.problems.append(f'"{key}": the list is empty, expected at least one message')
        return check_messages(value, key, notes)
    if isinstance(value, str):
        return [{"role": role, "content": check_text(value, f'"{key}"', notes)}]
    notes.problems.append(f'"{key}": found {kind_of(value)}, expected a string or a list of messages')
    return []


def _begins_with_answer(messages: list[Message]) -> bool:
    return bool(messages[0]["role"] == "assistant")


def _check_turns(layout: Layout, turns: _Turns, notes: Notes) -> None:
    if any(
        message["role"] == "tool" or "tool_calls" in message
        for message in (*turns.prompt, *turns.chosen, *turns.rejected)
    ):
        notes.problems.append("tool calls are not supported in preference pairs; write them into the content")
        return
    asked = [message for message in turns.prompt if message["role"] in ("user", "system")]
    if not any(message["content"].strip() for message in asked):
        notes.problems.append("the prompt is empty: it holds no user text and no system text")
    elif turns.prompt[-1]["role"] == "assistant":
        notes.problems.append("the prompt ends in an assistant message, expected a user message")
    for side, messages in zip(SIDES, (turns.chosen, turns.rejected), strict=True):
        last = messages[-1]
        key = layout.columns[side]
        if last["role"] != "assistant":
            notes.problems.append(f'"{key}": ends in a {last["role"]} message, expected an assistant message')
        elif not last["content"].strip():
            notes.problems.append(f'"{key}": the answer is empty')


def _contents(pair: PairExample) -> Iterator[str]:
    return (message["content"] for message in pair.messages)


PAIRS: Reading[PairExample] = Reading(_recognize, _read, _contents)
