"""Read conversations from the rows of a data file, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from macft.data.formats.columns import SIDES, RowFormat, likely_key, message_keys_of, recognize_format
from macft.data.formats.lost import lost_key_or_rating
from macft.data.formats.messages import RowErrors, Tools, check_alternation, check_messages, check_text, read_tools
from macft.data.formats.reader import DataRow, RowReader
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import first_keys, kind_of
from macft.data.templates.chat_template import Message
from macft.errors import DataError

_ACCEPTED = (
    "messages, conversations (ShareGPT), instruction/input/output (alpaca), prompt and completion, "
    "query and response, or keys that dataset_info.json maps"
)


@dataclass(frozen=True)
class Example(DataRow):
    """One conversation, with the tools it may call; `source` is its file:line."""

    messages: tuple[Message, ...]
    source: str
    tools: Tools | None = None

    @property
    def has_tools(self) -> bool:
        """See DataRow."""
        return self.tools is not None

    @property
    def identity(self) -> Any:
        """See DataRow."""
        return self.messages, self.tools

    @property
    def question(self) -> Any:
        """Everything before the last answer; conversations that only begin alike ask different questions."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        asked = self.messages[: answers[-1]] if answers else self.messages
        return (asked, self.tools) if asked else None


def _check_source(source: DataSource) -> DataSource:
    refuse_ranking(source)
    row_format = source.row_format
    if row_format is not None and "kto_tag" in row_format.columns:
        raise DataError(f"{source.name}: dataset_info.json maps kto_tag: these are rated answers; set stage: kto")
    if row_format is not None and row_format.style == "alpaca" and "response" not in row_format.columns:
        raise DataError(
            f"{source.name}: the columns in dataset_info.json map no response{_offer(source, row_format)}, "
            "or set stage: pt to continue pre-training on the prompts"
        )
    return source


def refuse_ranking(source: DataSource) -> None:
    """Raise DataError for a data set that holds pairs, according to dataset_info.json."""
    if source.is_ranking:
        raise DataError(f'{source.name}: dataset_info.json says "ranking": true: these are pairs; set stage: dpo')


def _offer(source: DataSource, row_format: RowFormat) -> str:
    """The key of the first row that may be the answer."""
    try:
        keys = [key for key in first_keys(source.files[0]) if key not in row_format.keys]
    except DataError:
        keys = []
    likely = likely_key("response", "response", keys)
    return f'; add "response": "{likely}"' if likely else "; add it"


def _recognize(at: str, row: dict[str, Any]) -> RowFormat:
    row_format = recognize_format(row)
    if row_format is not None:
        return row_format
    refuse_pairs(at, row)
    if "text" in row:
        raise DataError(f"{at}: found text: rows without questions; set stage: pt to continue pre-training on them")
    raise DataError(f"{at}: found the keys {', '.join(row) or 'none'}; expected {_ACCEPTED}")


def refuse_pairs(at: str, row: dict[str, Any]) -> None:
    """Raise DataError for a row that holds a preference pair."""
    if set(SIDES) <= row.keys():
        raise DataError(f"{at}: found chosen and rejected: these are preference pairs; set stage: dpo")


def _read(row_format: RowFormat, row: dict[str, Any], source: str, errors: RowErrors) -> Example | None:
    tools = _tools(row_format, row, errors)
    if row_format.style == "conversation":
        messages = conversation_turns(row_format, row, errors, open_end=False)
    elif row_format.style == "completion" and isinstance(row.get(row_format.columns["prompt"]), list):
        messages = _completion_turns(row_format, row, errors)
    else:
        prompt, [answer] = alpaca_turns(row_format, row, ("response",), errors)
        messages = [*prompt, {"role": "assistant", "content": answer}]
    return None if errors.problems else Example(tuple(messages), source, tools)


def conversation_turns(
    row_format: RowFormat, row: dict[str, Any], errors: RowErrors, *, open_end: bool
) -> list[Message]:
    """The system text and the messages of a row; with `open_end` the last message is a question."""
    key = row_format.columns["messages"]
    if key not in row:
        errors.problems.append(row_format.missing("messages", row))
        return []
    naming = row_format.naming or message_keys_of(row[key])
    messages = check_messages(row[key], key, errors, naming)
    if row_format.alternates and not errors.problems:
        check_alternation(messages, key, errors, naming, open_end=open_end)
    elif row[key] == []:
        errors.problems.append(f'"{key}": the list is empty, expected at least one user and one assistant message')
    return with_beside(row_format, row, key, messages, errors)


def with_beside(
    row_format: RowFormat, row: dict[str, Any], key: str, messages: list[Message], errors: RowErrors
) -> list[Message]:
    """The messages under `key` after the system text and the earlier turns that stand beside them."""
    system = optional_text(row_format, row, "system", errors)
    earlier = _history(row_format, row, errors)
    own = messages[:1] if messages and messages[0]["role"] == "system" else []
    if system and system != (own[0]["content"] if own else None):
        if any(message["role"] == "system" for message in messages):
            errors.problems.append(
                f'"{row_format.columns["system"]}": "{key}" also hold a system message; keep one of the two'
            )
        return [{"role": "system", "content": system}, *earlier, *messages]
    return [*own, *earlier, *messages[len(own) :]]


def _tools(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> Tools | None:
    keys = [row_format.columns[column] for column in ("tools", "functions") if column in row_format.columns]
    found = [key for key in keys if row.get(key)]
    if len(found) > 1:
        errors.problems.append(f'"{found[1]}": "{found[0]}" are given too; keep one of the two')
    return read_tools(row[found[0]], found[0], errors) if found else None


def _completion_turns(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> list[Message]:
    """The messages of prompt and completion where these are lists, as in TRL."""
    key = row_format.columns["response"]
    if key not in row:
        errors.problems.append(row_format.missing("response", row))
        return []
    prompt_key = row_format.columns["prompt"]
    prompt = with_beside(row_format, row, prompt_key, check_messages(row[prompt_key], prompt_key, errors), errors)
    if not isinstance(row[key], str):
        return [*prompt, *check_messages(row[key], key, errors)]
    return [*prompt, {"role": "assistant", "content": check_text(row[key], f'"{key}"', errors)}]


def alpaca_turns(
    row_format: RowFormat, row: dict[str, Any], answers: Sequence[str], errors: RowErrors
) -> tuple[list[Message], list[str]]:
    """(system, history and question; the texts of the columns `answers`), empty where there are problems."""
    columns = row_format.columns
    texts: dict[str, str] = {}
    needed = [column for column in row_format.needed if column not in SIDES and column != "response"]
    for column in (*needed, *answers):
        key = columns[column]
        if key not in row:
            errors.problems.append(row_format.missing(column, row))
        elif row[key] is None and column == "prompt" and row.get(columns.get("query", "")):
            texts[column] = ""
        else:
            texts[column] = check_text(row[key], f'"{key}"', errors)
    question = [texts.get("prompt", ""), texts.get("query", "") or optional_text(row_format, row, "query", errors)]
    system = optional_text(row_format, row, "system", errors)
    turns = _history(row_format, row, errors)
    if errors.problems:
        return [], [""] * len(answers)
    prompt: list[Message] = [{"role": "system", "content": system}] if system else []
    prompt += turns
    prompt.append({"role": "user", "content": "\n".join(filter(None, question))})
    return prompt, [texts[column] for column in answers]


def optional_text(row_format: RowFormat, row: dict[str, Any], column: str, errors: RowErrors) -> str:
    """The text of a column that may be missing; empty where it is."""
    key = row_format.columns.get(column)
    value = None if key is None or column in row_format.needed else row.get(key)
    return "" if value is None else check_text(value, f'"{key}"', errors)


def _history(row_format: RowFormat, row: dict[str, Any], errors: RowErrors) -> list[Message]:
    key = row_format.columns.get("history", "")
    value = row.get(key)
    # an empty cell of a CSV file
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        errors.problems.append(f'"{key}": found {kind_of(value)}, expected a list of [question, answer] pairs')
        return []
    turns: list[Message] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            shown = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
            errors.problems.append(f'"{key}"[{i}]: found {shown}, expected a list of question and answer')
            continue
        question, answer = (check_text(text, f'"{key}"[{i}][{j}]', errors) for j, text in enumerate(pair))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


EXAMPLES: RowReader[Example] = RowReader(_check_source, _recognize, _read, lost_key_or_rating)
