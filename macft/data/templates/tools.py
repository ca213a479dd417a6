"""Prepare tool calls for a chat template, and refuse them where it has no place for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.errors import DataError

Tools = Sequence[dict[str, Any]]

_NAME, _VALUE, _RESULT = "macft_probe_name", "macft-probe-value", "macft-probe-result"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "a probe",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "a key"}}},
    },
}
# some templates want an id of nine letters and digits
_CALL = {"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": {"key": _VALUE}}}
_QUESTION: Message = {"role": "user", "content": "question"}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_ANSWERED: Message = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": "probe0001"}


def with_objects(messages: Sequence[Message]) -> list[Message]:
    """The messages, with the arguments of their calls as objects instead of JSON text."""
    return [_with_objects(message) if message.get("tool_calls") else message for message in messages]


def check_tools(template: ChatTemplate, messages: Sequence[Message], tools: Tools | None) -> None:
    """Raise DataError if the template has no place for the tools of a conversation."""
    lists, calls, results = _places(template)
    missing = []
    if tools and not lists:
        missing.append("the list of tools")
    if not calls and any(message.get("tool_calls") for message in messages):
        missing.append("tool calls")
    if not results and any(message["role"] == "tool" for message in messages):
        missing.append("tool results")
    if missing:
        raise DataError(
            f"the chat template ({template.name}) has no place for {' and '.join(missing)}; "
            "give a template that has one, or leave the tools out"
        )


def uses_tools(messages: Sequence[Message], tools: Tools | None) -> bool:
    """Whether a conversation defines, calls or answers tools."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


@lru_cache(maxsize=16)
def _places(template: ChatTemplate) -> tuple[bool, bool, bool]:
    """Whether the template renders the list of tools, the calls, the results.

    True where it refuses the probe: then its error for a real conversation is clearer.
    """
    listed = _rendered(template, [_QUESTION], [_TOOL])
    called = _rendered(template, [_QUESTION, _CALLS], None)
    answered = _rendered(template, [_QUESTION, _CALLS, _ANSWERED], None)
    return (
        listed is None or _NAME in listed,
        called is None or (_NAME in called and _VALUE in called),
        answered is None or _RESULT in answered,
    )


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
    try:
        return template.render(messages, tools=tools)
    except DataError:
        return None


def _with_objects(message: Message) -> Message:
    return {**message, "tool_calls": [_call_with_object(call) for call in message["tool_calls"]]}


def _call_with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
