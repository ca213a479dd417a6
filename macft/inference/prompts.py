"""Read a file of prompts into one conversation per prompt."""

from __future__ import annotations

from pathlib import Path

from macft.data.formats.columns import RowFormat
from macft.data.formats.conversations import with_beside
from macft.data.formats.lost import MEDIA, lost_key
from macft.data.formats.messages import RowErrors
from macft.data.sources.rows import Row, read_rows
from macft.data.sources.text import nearest_file
from macft.data.templates.chat_template import Message
from macft.errors import DataError, join_problems

# a system text and earlier turns may stand beside the prompt, as in training
_BESIDE = RowFormat("prompt", "conversation", {"system": "system", "history": "history"})
_EXPECTED = 'expected {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


def read_prompts(path: Path) -> list[list[Message]]:
    """Read the conversations to answer: one prompt per line, or in a .jsonl file `prompt` or `messages` rows.

    Answers at the end of a `messages` row are left out; `system` and `history` may stand beside both. Raises DataError
    naming every invalid line.
    """
    if path.suffix == ".jsonl":
        return _from_rows(path, read_rows(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such prompt file{nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error}); save it as UTF-8") from None
    prompts = [user_turn(line) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path}: has no prompt; write one per line")
    return prompts


def user_turn(text: str) -> list[Message]:
    """The conversation of one question."""
    return [{"role": "user", "content": text}]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with a system prompt in front, unless it has its own."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def last_question(messages: list[Message]) -> str:
    """The text that stands for a conversation in a table: its last message."""
    return str(messages[-1]["content"])


def _from_rows(path: Path, rows: list[Row]) -> list[list[Message]]:
    prompts, problems = [], []
    for row in rows:
        errors = RowErrors()
        prompt = _conversation(row)
        if prompt is None:
            errors.problems.append(f"found keys {', '.join(row.value) or 'none'}; {_EXPECTED}")
        else:
            prompts.append(with_beside(_BESIDE, row.value, "messages", prompt, errors))
        lost = (_lost(key, value) for key, value in row.value.items())
        problems += [f"line {row.number}: {problem}" for problem in (*errors.problems, *filter(None, lost))]
    if problems:
        raise DataError(join_problems(f"{path}: {len(problems)} lines hold no prompt", problems))
    return prompts


def _lost(key: str, value: object) -> str | None:
    """Why a row that holds this is not answered."""
    if key in ("tools", "functions") and value and value != "[]":
        return f'"{key}": a model that answers prompts here is offered no tools; remove it, or the row'
    return lost_key(key, value) if key in MEDIA else None


def _conversation(row: Row) -> list[Message] | None:
    if isinstance(row.value.get("prompt"), str):
        return user_turn(row.value["prompt"])
    messages = row.value.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return None
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages or None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
