"""Read a Modelfile as Ollama does, from a description of its grammar: commands, three kinds of values, no escapes."""

from __future__ import annotations

import re

_COMMANDS = {
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
}  # fmt: skip
_WHITE_SPACE = " \t\n\r"


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(name, value) of each command, FROM as `model`, a parameter under its own name; ValueError when it is wrong."""
    commands: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        if text[place] in _WHITE_SPACE:
            place += 1
        elif text[place] == "#":
            place = _line_end(text, place)
        else:
            name, place = _word(text, place)
            if name.lower() not in _COMMANDS:
                raise ValueError(f"unknown command {name!r}")
            name = name.lower()
            role = ""
            if name == "parameter":
                name, place = _word(text, place, also="_0123456789")
            elif name == "message":
                role, place = _word(text, place)
            value, place = _value(text, place)
            commands.append(("model" if name == "from" else name, f"{role}: {value}" if role else value))
    if "model" not in dict(commands):
        raise ValueError("no FROM")
    return commands


def _line_end(text: str, place: int) -> int:
    return min((end for end in (text.find("\n", place), text.find("\r", place)) if end >= 0), default=len(text))


def _word(text: str, place: int, also: str = "") -> tuple[str, int]:
    start = place
    while place < len(text) and (re.match("[A-Za-z]", text[place]) or text[place] in also):
        place += 1
    if place == len(text) or text[place] not in " \t":
        raise ValueError(f"a word ends badly at {text[start : place + 1]!r}")
    return text[start:place], place + 1


def _value(text: str, place: int) -> tuple[str, int]:
    """The value is over at the first line end at which its quotes are closed. What does not print is dropped."""
    kept = ""
    while place < len(text):
        character = text[place]
        if character in "\n\r" and _unquoted(kept) is not None:
            break
        if character.isprintable() or character in _WHITE_SPACE:
            kept += character
        place += 1
    value = _unquoted(kept)
    if value is None:
        raise ValueError("a quoted value has no end")
    return value, place


def _unquoted(raw: str) -> str | None:
    """Without its quotes; None while they are not closed."""
    text = raw.strip()
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text.encode()) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
