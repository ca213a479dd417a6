"""Write the Jinja source of a named template, for any tool to render."""

from __future__ import annotations

import re
from pathlib import Path

from macft.data.templates.llamafactory import NAMED, Slots

_SKELETON = Path(__file__).with_name("slots.jinja")
_SECTION = re.compile(r"^ *\{#- begin (\w+) #\}\n(.*?)^ *\{#- end \1 #\}\n", re.DOTALL | re.MULTILINE)
_VARIABLE = re.compile(r"\{(content|eos|bos)\}")
# a token that the model does not define is rendered as nothing
_EXPRESSIONS = {"eos": "eos_token", "bos": "(bos_token or '')"}
# the comment that every source holds
_NAME = re.compile(r"\{#- The texts of LLaMA-Factory's template (\S+)\. #\}")


def named_source(name: str, default_system: str | None, enable_thinking: bool) -> str:
    """The Jinja text of `name`, one of `NAMED`; `default_system` replaces the template's own."""
    slots = NAMED[name]
    system = slots.default_system if default_system is None else default_system
    opening, closing = slots.thought or ("", "")
    answer = _expression(slots.answer, "content")
    expressions = {
        "NAME": name,
        "ONE_ANSWER": _why_one_answer(slots),
        "DEFAULT_SYSTEM": literal(system),
        "THINKING": thinking_default(enable_thinking),
        "PREFIX": _expression(slots.prefix),
        "SYSTEM": _expression(slots.system, "system"),
        "USER": _expression(slots.user, "content"),
        "HEAD": _expression(slots.head),
        "ANSWER": f"{answer} + (eos_token if loop.last else '')" if slots.eos_once else answer,
        "OPEN": literal(opening),
        "CLOSE": literal(closing),
        "BARE_OPEN": literal(opening.strip()),
        "BARE_CLOSE": literal(closing.strip()),
        "EMPTY_THOUGHT": literal(slots.empty_thought or opening + closing),
    }
    names = "|".join(sorted(expressions, key=len, reverse=True))
    return re.sub(rf"\b({names})\b", lambda match: expressions[match[1]], _skeleton(slots))


def needs_eos(name: str) -> bool:
    """Whether the template `name` ends an answer with the model's eos token."""
    slots = NAMED[name]
    return slots.eos_once or "{eos}" in slots.user + slots.head + slots.answer + slots.system + slots.prefix


def slots_of(source: str) -> Slots | None:
    """The slots behind a source from `named_source`; None if it is another one."""
    found = _NAME.search(source)
    return NAMED.get(found[1]) if found else None


def one_answer_reason(source: str) -> str | None:
    """Why earlier answers cannot be trained on with a source from `named_source`; None if they can."""
    slots = slots_of(source)
    if slots is None or not slots.eos_once or slots.answer.partition("{content}")[2].strip():
        return None
    return "the eos token follows the last one alone"


def drops_thoughts(source: str) -> bool:
    """Whether a source from `named_source` was made to leave out every thought."""
    return slots_of(source) is not None and f"thinking = {thinking_default(False)} %}}" in source


def _why_one_answer(slots: Slots) -> str:
    # part of the texts that adapters and exports keep
    if slots.thought is not None:
        return "an earlier one loses its thoughts, which it had when it was given"
    return "the eos token follows the last one alone" if slots.eos_once else ""


def thinking_default(enable_thinking: bool) -> str:
    """A Jinja expression: the variable enable_thinking, or `enable_thinking` if a tool does not set it."""
    return "enable_thinking is not defined or enable_thinking" if enable_thinking else "enable_thinking is true"


def literal(text: str) -> str:
    """`text` as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _skeleton(slots: Slots) -> str:
    """The skeleton with the sections that these slots need."""
    expected = {
        "thinking": slots.thought is not None,
        "tools": slots.tools,
        "prefix": bool(slots.prefix),
        "one_answer": bool(_why_one_answer(slots)),
        "system_first": not slots.system_in_user,
        "system_in_user": slots.system_in_user,
    }
    text = _SKELETON.read_text(encoding="utf-8")
    return _SECTION.sub(lambda match: match[2] if expected[match[1]] else "", text)


def _expression(slot: str, content: str = "content") -> str:
    """A slot as a Jinja expression: its literal pieces and the variables between them."""
    names = {**_EXPRESSIONS, "content": content}
    pieces = _VARIABLE.split(slot)  # text, name, text, name, ..., text
    parts = [names[piece] if i % 2 else literal(piece) for i, piece in enumerate(pieces) if i % 2 or piece]
    return " + ".join(parts) or "''"
