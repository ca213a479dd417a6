"""Rows of a preference data file in; pairs of answers to one prompt, checked, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from macft.data.formats import (
    MESSAGE_KEYS,
    Convert,
    Naming,
    alpaca_turns,
    check_message,
    check_messages,
    check_text,
    check_tools,
    convert_rows,
    warn_of_placeholders,
    warn_of_unused_keys,
)
from macft.data.sources import Row, kind_of
from macft.data.template import Message
from macft.errors import DataError

_SHAREGPT = Naming("from", "value", {"human": "user", "gpt": "assistant", "system": "system"})
_SIDES = ("chosen", "rejected")
_ROW_KEYS = {
    "preference": {"prompt", "chosen", "rejected", "tools"},
    "alpaca preference": {"instruction", "input", "chosen", "rejected", "system", "history"},
    "ShareGPT preference": {"conversations", "chosen", "rejected", "system", "tools"},
}


@dataclass(frozen=True)
class _Turns:
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class PairExample:
    """A prompt with the answer that is wanted and the one that is not; `source` is its file:line."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """Every message of the pair, for what looks at all its texts."""
        return (*self.prompt, *self.chosen, *self.rejected)


def holds_pair(row: Row) -> bool:
    """Whether a row is a preference pair, by its keys."""
    return set(_SIDES) <= row.value.keys()


def to_pairs(path: Path, rows: Sequence[Row], unread: Sequence[str] = ()) -> list[PairExample]:
    """The rows of one file as pairs, in the format its first row shows.

    `unread` are the faults of lines that are no rows. Raises DataError with these and with every
    faulty row's line, key, what was found and what was wanted.
    """
    kind, converted = convert_rows(path, rows, unread, _recognise)
    pairs = [PairExample(tuple(t.prompt), tuple(t.chosen), tuple(t.rejected), source) for source, t in converted]
    warn_of_placeholders(path, pairs)
    unused = {key for row in rows for key in row.value} - _ROW_KEYS[kind]
    known = MESSAGE_KEYS if kind == "preference" else {_SHAREGPT.role, _SHAREGPT.content}
    for row in rows:
        for place, value in row.value.items():
            if place in _ROW_KEYS[kind]:
                unused |= {f"{place}[].{key}" for message in _objects(value) for key in message.keys() - known}
    warn_of_unused_keys(path, unused)
    return pairs


def _objects(value: Any) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def _recognise(path: Path, row: Row) -> tuple[str, Convert[_Turns]]:
    keys = row.value.keys()
    if not keys & set(_SIDES):
        raise DataError(
            f"{path}: line {row.number}: found the keys {', '.join(keys) or 'none'}; a preference stage needs "
            "prompt, chosen and rejected; to train on single answers set stage: sft"
        )
    convert: Callable[[dict[str, Any], list[str]], _Turns]
    if "prompt" in keys or not keys & {"conversations", "instruction"}:
        kind, convert = "preference", _from_preference
    elif "conversations" in keys:
        kind, convert = "ShareGPT preference", _from_sharegpt
    else:
        kind, convert = "alpaca preference", _from_alpaca

    def checked(value: dict[str, Any], faults: list[str]) -> _Turns:
        turns = convert(value, faults)
        # what is wrong with a message comes first: the whole cannot be judged without it
        if not faults:
            _check_turns(turns, faults)
        return turns

    return kind, checked


def _from_alpaca(row: dict[str, Any], faults: list[str]) -> _Turns:
    prompt, [chosen, rejected] = alpaca_turns(row, _SIDES, faults)
    return _Turns(prompt, [_answer(chosen)], [_answer(rejected)])


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _from_sharegpt(row: dict[str, Any], faults: list[str]) -> _Turns:
    check_tools(row, faults)
    prompt: list[Message] = []
    if "conversations" in row:
        prompt = check_messages(row["conversations"], "conversations", faults, _SHAREGPT)
    else:
        faults.append(_missing("conversations", "conversations, chosen and rejected", row))
    system = "" if row.get("system") is None else check_text(row["system"], '"system"', faults)
    if system and any(message["role"] == "system" for message in prompt):
        faults.append('"system": "conversations" hold a system message too; keep one of the two')
    if system:
        prompt = [{"role": "system", "content": system}, *prompt]
    answers: dict[str, list[Message]] = {}
    for side in _SIDES:
        if side not in row:
            faults.append(_missing(side, "conversations, chosen and rejected", row))
            continue
        message = check_message(row[side], f'"{side}"', faults, _SHAREGPT)
        answers[side] = [] if message is None else [message]
    return _Turns(prompt, answers.get("chosen", []), answers.get("rejected", []))


def _from_preference(row: dict[str, Any], faults: list[str]) -> _Turns:
    """TRL's rows: messages or texts; `prompt` may be left out or repeated where the answers begin with it."""
    check_tools(row, faults)
    chosen, rejected = (_side(row, side, faults) for side in _SIDES)
    prompt = _turns(row["prompt"], "prompt", "user", faults) if row.get("prompt") is not None else []
    if faults:
        return _Turns([], [], [])
    if _begins_with_answer(chosen) and _begins_with_answer(rejected):
        if not prompt:
            faults.append(_missing("prompt", "prompt, or chosen and rejected that begin with the same messages", row))
        return _Turns(prompt, chosen, rejected)
    # at least one message of each side is its answer
    sides = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [message for message, _ in takewhile(lambda two: two[0] == two[1], sides)]
    rest = _Turns(shared, chosen[len(shared) :], rejected[len(shared) :])
    if not (_begins_with_answer(rest.chosen) and _begins_with_answer(rest.rejected)):
        faults.append(f"chosen and rejected answer different prompts: they part at message {len(shared) + 1}")
    elif prompt and shared[-len(prompt) :] != prompt:
        faults.append('"prompt": differs from the messages that chosen and rejected begin with; correct or remove it')
    return rest


def _side(row: dict[str, Any], side: str, faults: list[str]) -> list[Message]:
    if side not in row:
        faults.append(_missing(side, "chosen and rejected", row))
        return []
    return _turns(row[side], side, "assistant", faults)


def _missing(key: str, wanted: str, row: dict[str, Any]) -> str:
    return f'no "{key}"; a pair needs {wanted}, found {", ".join(row) or "none"}'


def _turns(value: Any, key: str, role: str, faults: list[str]) -> list[Message]:
    """The messages under `key`; a text is one message of `role`."""
    if isinstance(value, list):
        if not value:
            faults.append(f'"{key}": the list is empty, wanted at least one message')
        return check_messages(value, key, faults)
    if isinstance(value, str):
        return [{"role": role, "content": check_text(value, f'"{key}"', faults)}]
    faults.append(f'"{key}": found {kind_of(value)}, wanted a string or a list of messages')
    return []


def _begins_with_answer(messages: list[Message]) -> bool:
    return bool(messages[0]["role"] == "assistant")


def _check_turns(turns: _Turns, faults: list[str]) -> None:
    asked = [message for message in turns.prompt if message["role"] in ("user", "system")]
    if not any(message["content"].strip() for message in asked):
        faults.append("the prompt is empty: it holds no user text and no system text")
    elif turns.prompt[-1]["role"] == "assistant":
        faults.append("the prompt ends in an assistant message, wanted a user message")
    for side, messages in zip(_SIDES, (turns.chosen, turns.rejected), strict=True):
        last = messages[-1]
        if last["role"] != "assistant":
            faults.append(f'"{side}": ends in a {last["role"]} message, wanted an assistant message')
        elif not last["content"].strip():
            faults.append(f'"{side}": the answer is empty')
