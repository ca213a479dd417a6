"""The settings in, docs/configuration.md out: the page cannot drift from the code."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, get_args, get_origin

from macft.config import settings as module
from macft.config.settings import ALIASES, IGNORED_KEYS, Settings


def configuration_page() -> str:
    """The Markdown page of every key, in the order and the sections of the source."""
    parts = [
        "# Configuration",
        "",
        "This page is generated from the code (`python -m macft.config.reference`).",
        "A run is one YAML file; `key=value` or `--key value` on the command line overrides it.",
        "Names and defaults are LLaMA-Factory's; where a default differs, the row says so.",
    ]
    for section, keys in _sections():
        parts += [
            "",
            f"## {section.capitalize()}",
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        parts += [_row(key) for key in keys]
    parts += ["", "## Other names", "", "| written | means |", "| --- | --- |"]
    parts += [f"| `{old}` | `{new}` |" for old, new in ALIASES.items()]
    parts += ["| `disable_gradient_checkpointing` | the opposite of `gradient_checkpointing` |"]
    parts += [
        "",
        "## Accepted without effect",
        "",
        "Said once in a warning.",
        "",
        "| key | why |",
        "| --- | --- |",
    ]
    parts += [f"| `{key}` | {reason} |" for key, reason in IGNORED_KEYS.items()]
    return "\n".join(parts) + "\n"


def _sections() -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(module.Settings).splitlines():
        if match := re.match(r"    # ---- (\w+)", line):
            sections.append((match[1], []))
        elif (match := re.match(r"    (\w+): ", line)) and match[1] in Settings.model_fields:
            sections[-1][1].append(match[1])
    return sections


def _row(key: str) -> str:
    field = Settings.model_fields[key]
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return " or ".join(map(_type, parts)) if parts else annotation.__name__


if __name__ == "__main__":
    import sys

    sys.stdout.write(configuration_page())
