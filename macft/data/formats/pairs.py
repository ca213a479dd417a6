"""Read pairs of answers to one prompt from the rows of a preference data file, and check them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from macft.data.formats.columns import ALPACA, BESIDE, SIDES, RowFormat, message_keys_of
from macft.data.formats.conversations import alpaca_turns, conversation_turns, with_beside
from macft.data.formats.lost import lost_key
from macft.data.formats.messages import RowErrors, check_message, check_messages, check_text
from macft.data.formats.reader import DataRow, RowReader
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import kind_of
from macft.data.templates.chat_template import Message
from macft.errors import DataError

_SIDE_COLUMNS = {side: side for side in SIDES}


@dataclass(frozen=True)
class _Turns:
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class PairExample(DataRow):
    """A prompt with its preferred and its rejected answer; `source` is its file:line."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """See DataRow."""
        return (*self.prompt, *self.chosen, *self.rejected)

    @property
    def turns(self) -> tuple[Message, ...]:
        """See DataRow."""
        return self.prompt

    @property
    def answers(self) -> int:
        """See DataRow."""
        return sum(message["role"] == "assistant" for message in (*self.prompt, *self.chosen))

    @property
    def identity(self) -> Any:
        """See DataRow."""
        return self.prompt, self.chosen, self.rejected

    @property
    def question(self) -> Any:
        """See DataRow."""
        return self.prompt

    @property
    def opposite(self) -> Any:
        """See DataRow."""
        return self.prompt, self.rejected, self.chosen


def holds_pairs(source: DataSource, keys: Collection[str]) -> bool:
    """Whether a data set with these keys in its first row holds preference pairs."""
    return set(SIDES) <= set(keys) if source.is_ranking is None else source.is_ranking


def _check_source(source: DataSource) -> DataSource:
    if source.is_ranking is False:
        raise DataError(
            f'{source.name}: dataset_info.json does not say "ranking": true, which a preference stage needs; '
            "add it if the rows hold chosen and rejected, else set stage: sft"
        )
    return source


def _recognize(at: str, row: dict[str, Any]) -> RowFormat:
    keys = row.keys()
    if not keys & set(SIDES):
        raise DataError(
            f"{at}: found the keys {', '.join(keys) or 'none'}; a preference stage needs prompt, chosen and rejected; "
            "to train on single answers set stage: sft"
        )
    # unread columns of a table are present as null
    has_prompt = row.get("prompt") is not None
    if has_prompt or not keys & {"conversations", "instruction"}:
        return RowFormat("preference", "preference", {"prompt": "prompt", **_SIDE_COLUMNS, **BESIDE})
    if "conversations" in keys:
        columns = {"messages": "conversations", **_SIDE_COLUMNS, **BESIDE}
        return RowFormat("ShareGPT preference", "conversation", columns, alternates=True)
    columns = {key: ALPACA[key] for key in ("prompt", "query", "system", "history")}
    return RowFormat("alpaca preference", "alpaca", columns | _SIDE_COLUMNS | BESIDE)


def _read(row_format: RowFormat, row: dict[str, Any], source: str, errors: RowErrors) -> PairExample | None:
    _refuse_tools(row_format, row, errors)
    readers = {"alpaca": _from_alpaca, "conversation": _from_conversation, "preference": _from_preference}
    turns = readers[row_format.style](row_format, row, errors)
    # the turns can only be judged once every message is valid
    if not errors.problems:
        _check_turns(row_format, turns, errors)
    if errors.problems:
        return None
    prompt, chosen, rejected = (
        tuple(map(_without_weight, side)) for side in (turns.prompt, turns.chosen, turns.rejected)
    )
    return PairExample(prompt, chosen, rejected, source)


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _refuse_tools(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> None:
    for key in (row_format.columns.get(column, "") for column in ("tools", "functions")):
        if row.get(key) and row[key] != "[]":
            errors.problems.append(f'"{key}": tool definitions are not supported in preference pairs; remove them')


def _from_alpaca(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> _Turns:
    prompt, [chosen, rejected] = alpaca_turns(row_format, row, SIDES, errors)
    return _Turns(prompt, [_answer(chosen)], [_answer(rejected)])


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _from_conversation(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> _Turns:
    prompt = conversation_turns(row_format, row, errors, open_end=True)
    naming = row_format.naming or message_keys_of(row.get(row_format.columns["messages"]))
    answers: dict[str, list[Message]] = {}
    for side in SIDES:
        key = row_format.columns[side]
        if key not in row:
            expected = f"{row_format.columns['messages']}, chosen and rejected"
            errors.problems.append(
                row_format.missing(side, row) if row_format.is_declared else _missing(key, expected, row)
            )
            continue
        message = check_message(row[key], f'"{key}"', errors, naming)
        answers[side] = [] if message is None else [message]
    return _Turns(prompt, answers.get("chosen", []), answers.get("rejected", []))


def _from_preference(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> _Turns:
    """TRL's rows: messages or texts; where the answers begin with the prompt, `prompt` may be missing or repeat it."""
    turns = _split_preference(row_format, row, errors)
    return replace(turns, prompt=with_beside(row_format, row, "prompt", turns.prompt, errors))


def _split_preference(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> _Turns:
    chosen, rejected = (_side(row, row_format.columns[side], errors) for side in SIDES)
    prompt = _turns(row["prompt"], "prompt", "user", errors) if row.get("prompt") is not None else []
    if errors.problems:
        return _Turns([], [], [])
    if _begins_with_answer(chosen) and _begins_with_answer(rejected):
        if not prompt:
            expected = "prompt, or chosen and rejected that begin with the same messages"
            errors.problems.append(_missing("prompt", expected, row))
        return _Turns(prompt, chosen, rejected)
    # at least one message of each side is its answer
    sides = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [message for message, _ in takewhile(lambda two: two[0] == two[1], sides)]
    rest = _Turns(shared, chosen[len(shared) :], rejected[len(shared) :])
    if not (_begins_with_answer(rest.chosen) and _begins_with_answer(rest.rejected)):
        errors.problems.append(
            f"chosen and rejected answer different prompts: they diverge at message {len(shared) + 1}"
        )
    elif prompt and shared[-len(prompt) :] != prompt:
        errors.problems.append(
            '"prompt": differs from the messages that chosen and rejected begin with; correct or remove it'
        )
    return rest


def _side(row: dict[str, Any], side: str, errors: RowErrors) -> list[Message]:
    if side not in row:
        errors.problems.append(_missing(side, "chosen and rejected", row))
        return []
    return _turns(row[side], side, "assistant", errors)


def _missing(key: str, expected: str, row: dict[str, Any]) -> str:
    return f'no "{key}"; a pair needs {expected}, found {", ".join(row) or "none"}'


def _turns(value: Any, key: str, role: str, errors: RowErrors) -> list[Message]:
    """The messages under `key`; a text is one message of `role`."""
    if isinstance(value, list):
        if not value:
            errors.problems.append(f'"{key}": the list is empty, expected at least one message')
        return check_messages(value, key, errors)
    if isinstance(value, str):
        return [{"role": role, "content": check_text(value, f'"{key}"', errors)}]
    errors.problems.append(f'"{key}": found {kind_of(value)}, expected a string or a list of messages')
    return []


def _begins_with_answer(messages: list[Message]) -> bool:
    return bool(messages[0]["role"] == "assistant")


def _check_turns(row_format: RowFormat, turns: _Turns, errors: RowErrors) -> None:
    if any(
        message["role"] == "tool" or "tool_calls" in message
        for message in (*turns.prompt, *turns.chosen, *turns.rejected)
    ):
        errors.problems.append("tool calls are not supported in preference pairs; write them into the content")
        return
    asked = [message for message in turns.prompt if message["role"] in ("user", "system")]
    if not any(message["content"].strip() for message in asked):
        errors.problems.append("the prompt is empty: it holds no user text and no system text")
    elif turns.prompt[-1]["role"] == "assistant":
        errors.problems.append("the prompt ends in an assistant message, expected a user message")
    for side, messages in zip(SIDES, (turns.chosen, turns.rejected), strict=True):
        last = messages[-1]
        key = row_format.columns[side]
        if last["role"] != "assistant":
            errors.problems.append(f'"{key}": ends in a {last["role"]} message, expected an assistant message')
        elif not last["content"].strip():
            errors.problems.append(f'"{key}": the answer is empty')
        elif any(not message.get("weight", 1) for message in messages if message["role"] == "assistant"):
            errors.problems.append(f'"{key}": an answer is marked as not trained on; remove the mark, or the row')


PAIRS: RowReader[PairExample] = RowReader(_check_source, _recognize, _read, lost_key)
