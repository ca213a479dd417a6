"""Build chat templates and conversations to render with them."""

from __future__ import annotations

from typing import Any

from macft.data.templates.chat_template import ChatTemplate
from support.original_templates import original


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


CHATS = [
    chat("hi"),
    chat("hi", "hello there"),
    chat(
        "  你好 ",
        " 我是助手\n",
        'tell <b>more</b> & "quote" {{ x }}',
        "<think>\nhm\n</think>\n\nyes",
        "and?",
        "",
    ),
    chat("a", "b", "c", "d", system="You are terse."),
]


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def build(source: str, name: str = "test.jinja") -> ChatTemplate:
    return ChatTemplate(source, name=name, special_map=SPECIAL)


def published(name: str) -> ChatTemplate:
    """A model's own template, as TRL ships it."""
    return build(original(name), f"{name}.jinja")
