"""Write a Modelfile whose values Ollama's parser gives back unchanged."""

from __future__ import annotations

import re

from macft.errors import UsageError, join_problems
from macft.ollama.client import ModelRequest

_QUOTES = '"""'
# kept by the parser, which drops all other characters that do not print
_WHITE_SPACE = "\n\r\t"


def modelfile(source: str, request: ModelRequest) -> str:
    """The Modelfile for `FROM source`; UsageError, with every problem, for what its grammar cannot hold."""
    go, system, requires = request.template, request.system, request.requires
    problems = _problems_of_line("FROM", source) + _problems("TEMPLATE", go or "") + _problems("SYSTEM", system or "")
    for name, value in request.parameters:
        problems += _problems(f"PARAMETER {name}", str(value))
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            problems.append(f"PARAMETER {name!r}: a name has letters, digits and underscores only")
    if requires is not None and not re.fullmatch(r"\d+\.\d+\.\d+", requires):
        problems.append(f"REQUIRES {requires!r}: expected a version such as 0.30.0")
    if problems:
        raise UsageError(join_problems("a Modelfile cannot hold this:", problems) if len(problems) > 1 else problems[0])
    lines = [f"FROM {source}"]
    lines += [f"REQUIRES {requires}"] if requires is not None else []
    lines += [f"TEMPLATE {_QUOTES}{go}{_QUOTES}"] if go is not None else []
    lines += [f"SYSTEM {_QUOTES}{system}{_QUOTES}"] if system is not None else []
    lines += [f"PARAMETER {name} {_value(value)}" for name, value in request.parameters]
    return "\n".join(lines) + "\n"


def _value(value: str | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    # between single quotes a quote at either end would count as one of three
    return f"{_QUOTES}{value}{_QUOTES}" if '"' in value or "\n" in value or "\r" in value else f'"{value}"'


def _problems(what: str, text: str) -> list[str]:
    problems = _unprintable(what, text, _WHITE_SPACE)
    for place in (match.start() for match in re.finditer(r"[\n\r]", text)):
        if text[:place].rstrip().endswith(_QUOTES):
            line = text.count("\n", 0, place) + 1
            problems.append(f'{what}: line {line} ends with """, which ends the value in a Modelfile; change that line')
            break
    return problems


def _problems_of_line(what: str, text: str) -> list[str]:
    problems = _unprintable(what, text, "")
    if not text or text != text.strip() or text.startswith('"'):
        problems.append(f"{what} {text!r}: expected a name without quotes or spaces around it")
    return problems


def _unprintable(what: str, text: str, allowed: str) -> list[str]:
    for place, character in enumerate(text):
        if not character.isprintable() and character not in allowed:
            near = text[max(0, place - 10) : place]
            return [
                f"{what}: the character U+{ord(character):04X} (after {near!r}) does not print, and Ollama's parser "
                "drops it; remove it"
            ]
    return []
