"""Generate the tables of docs/ from the code, so that they cannot drift from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from macft.backends.footprint import DEVICES, largest
from macft.config import mlx_lm
from macft.config import settings as module
from macft.config.names import ALIASES, NO_EFFECT, REFUSED, REFUSED_VALUES
from macft.config.settings import Settings
from macft.config.translate import TRANSLATIONS
from macft.gguf.architectures import IMPORTED
from macft.weights.layouts.litgpt_config import CLASSES
from macft.weights.layouts.mlx import LAYOUTS
from macft.weights.layouts.mlx_rules import DROP_ROTARY


def configuration_page() -> str:
    """The Markdown page of every key, in the order and the sections of the source."""
    parts = [
        "# Configuration",
        "",
        "This page is generated from the code (`python -m macft.docs`).",
        "A run is one YAML file. `key=value`, `--key value`, `--key=value` or a bare `--key` (true) on the command",
        "line override it. `macft config explain FILE` prints every value of a run and where it came from.",
        "Names and defaults are LLaMA-Factory's; where a default differs, the row says so. Files of LLaMA-Factory, and",
        "[LoRA files of mlx-lm](#files-of-mlx-lm), run as they are. A key that is not on this page is an error.",
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
    meanings = {old: f"`{new}`" for old, new in ALIASES.items()}
    meanings |= {old: translation.meaning for old, translation in TRANSLATIONS.items()}
    parts += _table("Other names", "Of transformers, TRL, ms-swift and older releases.", ("written", "means"), meanings)
    parts += _table(
        "Accepted without effect",
        "Named once in a warning, unless the value asks for nothing (`false`, `0`, `null`).",
        ("key", "why"),
        NO_EFFECT,
    )
    parts += _table(
        "Refused",
        "What changes the result and is not done here is an error, unless the value asks for nothing.",
        ("key", "why"),
        REFUSED | {f"{key}: {value}": why for (key, value), why in REFUSED_VALUES.items()},
    )
    parts += ["", "## Files of mlx-lm", ""]
    parts += [
        "Recognized by their keys; what they leave out has mlx-lm's defaults. A run lists the differences first.",
        "",
    ]
    parts += ["| mlx-lm | here | difference |", "| --- | --- | --- |"]
    parts += [
        f"| `{key}` | {', '.join(f'`{name}`' for name in own.split(', ')) if own != 'none' else 'none'} | {said} |"
        for key, (own, said) in mlx_lm.TABLE.items()
    ]
    return "\n".join(parts) + "\n"


def _table(title: str, text: str, columns: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    lines = ["", f"## {title}", "", text, "", f"| {columns[0]} | {columns[1]} |", "| --- | --- |"]
    return lines + [f"| `{key}` | {value} |" for key, value in rows.items()]


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
    if get_origin(annotation) in (list, dict):
        return "numbers" if get_origin(annotation) is list else "keys and values"
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return " or ".join(map(_type, parts)) if parts else annotation.__name__


def conversion_table() -> str:
    """The table of docs/weights.md: which conversions know a model type (merging into HF layout knows all)."""
    from_gguf = set(IMPORTED.values())
    from_litgpt = set(CLASSES)
    rows = [
        f"| {name} | {_yes(name in LAYOUTS)} | {_yes(name in from_gguf)} | {_yes(name in from_litgpt)} |"
        for name in sorted({*LAYOUTS, *from_gguf, *from_litgpt})
    ]
    head = ["| model type | HF <-> MLX, MLX-quantized | GGUF -> HF, MLX | litgpt -> HF, MLX |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _yes(is_known: bool) -> str:
    return "yes" if is_known else "-"


def layout_table() -> str:
    """The table of docs/weights.md: what changes between HF and MLX for each model type."""
    groups: dict[str, list[str]] = {}
    for model_type, layout in LAYOUTS.items():
        changes = "; ".join(rule.note for rule in layout.rules if rule is not DROP_ROTARY)
        groups.setdefault(changes, []).append(model_type)
    rows = [f"| {', '.join(types)} | {changes or 'nothing'} |" for changes, types in groups.items()]
    return "\n".join(["| model type | the MLX layout differs from HF |", "|---|---|", *rows]) + "\n"


# English and Chinese: without gradient checkpointing a step is faster, with it more fits
_FITS_HEADS = {
    False: ("memory", "16 bits", "16 bits, checkpointing", "4 bits", "4 bits, checkpointing"),
    True: ("内存或显存", "16 位", "16 位，梯度检查点", "4 位", "4 位，梯度检查点"),
}


def fits_table(*, is_chinese: bool = False) -> str:
    """The table of README: the largest model whose LoRA training on one row at a time fits into each device."""
    head = _FITS_HEADS[is_chinese]
    rows = [head, ("---",) * len(head)]
    for device in DEVICES:
        fitting = [
            largest(device, bits=bits, checkpoints=checkpoints) for bits in (16, 4) for checkpoints in (False, True)
        ]
        rows.append((device.name, *("-" if shape is None else shape.name for shape in fitting)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    import sys

    sys.stdout.write(configuration_page())
