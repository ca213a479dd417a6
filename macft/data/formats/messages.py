"""Check the messages, texts and tools of a row, and convert them to the form that chat templates take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from macft.data.formats.columns import PLAIN, MessageKeys
from macft.data.formats.lost import MARKS, lost_key
from macft.data.sources.rows import kind_of, parse_json
from macft.data.templates.chat_template import Message
from macft.data.templates.thoughts import THOUGHT, THOUGHT_KEYS

Tools = tuple[dict[str, Any], ...]

_SURROGATE = re.compile("[\ud800-\udfff]")
_THOUGHT = re.compile(r"\s*(<think>.*?</think>\s*)(?=[\[{])", re.DOTALL)
_PLAIN_ROLES = ("user", "assistant", "system")
_MESSAGE_KEYS = {"tool_calls", "tool_call_id", "name", "function_call", *MARKS, *THOUGHT_KEYS}
# the tag for a role name that the user's tags leave out
_TAGS = {
    **{"human": "user_tag", "user": "user_tag", "gpt": "assistant_tag", "assistant": "assistant_tag"},
    **{"observation": "observation_tag", "tool": "observation_tag", "function_call": "function_tag"},
    "system": "system_tag",
}


@dataclass
class RowErrors:
    """The problems of one row, and the unused keys of its messages."""

    problems: list[str] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)


def check_text(value: Any, place: str, errors: RowErrors) -> str:
    """The text itself, or an empty string after adding a problem."""
    if not isinstance(value, str):
        errors.problems.append(f"{place}: found {kind_of(value)}, expected a string")
        return ""
    broken = None if _is_whole(value) else _SURROGATE.search(value)
    if broken:
        errors.problems.append(f"{place}: half a character (\\u{ord(broken[0]):04x}) at position {broken.start()}")
        return ""
    return value


def _is_whole(text: str) -> bool:
    if text.isascii():
        return True
    try:
        # much faster than a search
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_messages(value: Any, key: str, errors: RowErrors, naming: MessageKeys = PLAIN) -> list[Message]:
    """The messages of a list under `key`, without invalid ones, whose problems are added."""
    if not isinstance(value, list):
        errors.problems.append(f'"{key}": found {kind_of(value)}, expected a list')
        return []
    found: list[Message] = []
    for i, message in enumerate(value):
        # most messages are two plain strings
        if isinstance(message, dict) and len(message) == 2:
            role, content = message.get(naming.role), message.get(naming.content)
            meaning = naming.roles.get(role) if isinstance(role, str) else None
            if meaning in _PLAIN_ROLES and isinstance(content, str) and _is_whole(content):
                found.append({"role": meaning, "content": content})
                continue
        checked = check_message(message, f'"{key}"[{i}]', errors, naming)
        if checked is not None:
            found.append(checked)
    return found


def check_message(value: Any, place: str, errors: RowErrors, naming: MessageKeys = PLAIN) -> Message | None:
    """One message under the keys `role` and `content`; None, after adding problems, if it is invalid."""
    if not isinstance(value, dict):
        expected = f"an object with {naming.role} and {naming.content}"
        errors.problems.append(f"{place}: found {kind_of(value)}, expected {expected}")
        return None
    before = len(errors.problems)
    calls = _given_calls(value, place, errors)
    role = _role(value, place, errors, naming)
    if naming.content in value or calls is None:
        content = _content(value, place, errors, naming, may_be_null=calls is not None)
    else:
        content = ""
    thought = _thought(value, role, place, errors)
    unused = value.keys() - _MESSAGE_KEYS - {naming.role, naming.content}
    list_key = place.split('"')[1]
    errors.unused |= {f"{list_key}[].{key}" for key in unused}
    errors.problems += [f"{place} {lost}" for key in sorted(unused) if (lost := lost_key(key, value[key]))]
    weight = _weight(value, place, errors)
    if role == "function" and calls is None and len(errors.problems) == before:
        content, calls = _split_calls(content, f'{place} "{naming.content}"', errors)
    elif calls is not None:
        if role not in ("assistant", "function", None):
            errors.problems.append(f'{place} "tool_calls": found in a {role} message, expected an assistant message')
        calls = _calls(calls, f'{place} "tool_calls"', errors)
    if len(errors.problems) > before or role is None:
        return None
    message: Message = {"role": "assistant" if role == "function" else role, "content": content}
    if thought:
        message[THOUGHT] = thought
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
    # answers are trained on, all other messages are not, unless a mark says otherwise
    return message if weight is None or (role in ("assistant", "function") and weight) else message | {"weight": weight}


def _given_calls(value: dict[str, Any], place: str, errors: RowErrors) -> Any:
    """The tool calls of a message as a list, the single one of OpenAI's older format too; None if there are none."""
    calls, single = value.get("tool_calls") or None, value.get("function_call") or None
    if calls is not None and single is not None:
        errors.problems.append(f'{place} "function_call": "tool_calls" are given too; keep one of the two')
    return calls if calls is not None or single is None else [single]


def _weight(value: dict[str, Any], place: str, errors: RowErrors) -> int | None:
    """Whether the message is marked to be trained on, 1 or 0; None if it is not marked."""
    found = {key: value[key] for key in MARKS if value.get(key) is not None} if len(value) > 2 else {}
    for key, mark in found.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            errors.problems.append(f'{place} "{key}": found {_mark(mark)}, expected 0 or 1, or false or true')
    if len({mark == 1 for mark in found.values() if isinstance(mark, bool | int | float)}) > 1:
        errors.problems.append(f"{place}: {' and '.join(found)} contradict each other; keep one of them")
    return int(next(iter(found.values())) == 1) if found else None


def _mark(mark: Any) -> str:
    return repr(mark) if isinstance(mark, str | int | float) else kind_of(mark)


def _role(value: dict[str, Any], place: str, errors: RowErrors, naming: MessageKeys) -> str | None:
    if naming.role not in value:
        errors.problems.append(f'{place}: no "{naming.role}"; found the keys {", ".join(value) or "none"}')
        return None
    role = value[naming.role]
    if isinstance(role, str) and role in naming.roles:
        return naming.roles[role]
    shown = repr(role) if isinstance(role, str) else kind_of(role)
    hint = ""
    if naming.is_tagged and isinstance(role, str) and role in _TAGS:
        hint = f'; if it is meant, add "{_TAGS[role]}": "{role}" to the tags in dataset_info.json'
    errors.problems.append(f'{place} "{naming.role}": found {shown}, expected one of {", ".join(naming.roles)}{hint}')
    return None


def _content(value: dict[str, Any], place: str, errors: RowErrors, naming: MessageKeys, *, may_be_null: bool) -> str:
    if naming.content not in value:
        errors.problems.append(f'{place}: no "{naming.content}"; found the keys {", ".join(value) or "none"}')
        return ""
    content = value[naming.content]
    place = f'{place} "{naming.content}"'
    if content is None and may_be_null:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        return "".join(_part(part, f"{place}[{i}]", errors) for i, part in enumerate(content))
    return check_text(content, place, errors)


def _thought(value: dict[str, Any], role: str | None, place: str, errors: RowErrors) -> str:
    """The thought in a field of its own; empty if there is none."""
    keys = [key for key in THOUGHT_KEYS if value.get(key)]
    if not keys:
        return ""
    texts = [check_text(value[key], f'{place} "{key}"', errors) for key in keys]
    if role not in ("assistant", "function", None) and any(text.strip() for text in texts):
        errors.problems.append(f'{place} "{keys[0]}": found in a {role} message, expected an assistant message')
    elif len(set(texts)) > 1:
        errors.problems.append(f"{place}: {' and '.join(keys)} hold different thoughts; keep one of them")
    return texts[0] if texts[0].strip() else ""


def _part(part: dict[str, Any], place: str, errors: RowErrors) -> str:
    if part.get("type") != "text" or "text" not in part:
        errors.problems.append(
            f"{place}: found a part of type {part.get('type')!r}, expected text; only text is trained on"
        )
        return ""
    return check_text(part["text"], f'{place} "text"', errors)


def _split_calls(content: str, place: str, errors: RowErrors) -> tuple[str, list[dict[str, Any]]]:
    """(the thought before the calls, the calls) of a function_call message, whose content is JSON."""
    thought = _THOUGHT.match(content)
    try:
        calls = parse_json(content[thought.end() :] if thought else content)
    except (ValueError, RecursionError) as error:
        errors.problems.append(f"{place}: found {_short(content)}, expected tool calls as JSON ({error})")
        return "", []
    return thought[1] if thought else "", _calls(calls if isinstance(calls, list) else [calls], place, errors)


def _calls(calls: Any, place: str, errors: RowErrors) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        errors.problems.append(f"{place}: found {kind_of(calls)}, expected a list of tool calls")
        return []
    return [call for i, value in enumerate(calls) if (call := _call(value, f"{place}[{i}]", errors)) is not None]


def _call(value: Any, place: str, errors: RowErrors) -> dict[str, Any] | None:
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        found = f"the keys {', '.join(function) or 'none'}" if isinstance(function, dict) else kind_of(function)
        errors.problems.append(f"{place}: found {found}, expected an object with name and arguments")
        return None
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except (ValueError, RecursionError) as error:
            errors.problems.append(f'{place} "arguments": found {_short(arguments)}, expected JSON ({error})')
            return None
    if not isinstance(arguments, dict):
        errors.problems.append(f'{place} "arguments": found {kind_of(arguments)}, expected an object')
        return None
    call: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def read_tools(value: Any, key: str, errors: RowErrors) -> Tools | None:
    """The tools that a row defines, as a list or as JSON text, each in OpenAI's form; None if there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except (ValueError, RecursionError) as error:
            errors.problems.append(f'"{key}": found {_short(value)}, expected a list of tools as JSON ({error})')
            return None
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list):
        errors.problems.append(f'"{key}": found {kind_of(value)}, expected a list of tools')
        return None
    tools: list[dict[str, Any]] = []
    for i, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            found = f"the keys {', '.join(tool) or 'none'}" if isinstance(tool, dict) else kind_of(tool)
            errors.problems.append(f'"{key}"[{i}]: found {found}, expected an object with a name')
        else:
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def check_alternation(
    messages: Sequence[Message], key: str, errors: RowErrors, naming: MessageKeys, *, open_end: bool
) -> None:
    """Add a problem unless, after a system message, questions and answers take turns.

    With `open_end` a question must come last, else an answer. Consecutive tool results count as one question.
    """
    start = 1 if messages and messages[0]["role"] == "system" else 0
    turns = [
        (i, messages[i]["role"])
        for i in range(start, len(messages))
        if not (messages[i]["role"] == "tool" and i > start and messages[i - 1]["role"] == "tool")
    ]
    questions, answers = naming.names_of("user", "tool"), naming.names_of("assistant", "function")
    for turn, (i, role) in enumerate(turns):
        if role not in (("user", "tool") if turn % 2 == 0 else ("assistant",)):
            found, expected = naming.names_of(role), answers if turn % 2 else questions
            errors.problems.append(
                f'"{key}"[{i}] "{naming.role}": found {found}, expected {expected}: questions and answers take turns'
            )
            return
    if not turns:
        errors.problems.append(
            f'"{key}": the list is empty, expected at least one question{"" if open_end else " and answer"}'
        )
    elif open_end == (len(turns) % 2 == 0):
        expected = questions if open_end else answers
        errors.problems.append(
            f'"{key}": an {"even" if open_end else "odd"} number of turns ({len(turns)}), the last must be {expected}'
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
