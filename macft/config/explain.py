"""Show every value of a configuration and where it came from, as a colored table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from macft.config.load import LoadedConfig
from macft.config.parse import COMMAND_LINE
from macft.config.settings import Settings
from macft.config.translate import shown


class Value(NamedTuple):
    """The value of a key in this run and its origin; for a default that follows from other keys, from which."""

    value: Any
    origin: str  # default, command line, line 3, ...
    written: str | None
    follows_from: str | None


def values(loaded: LoadedConfig) -> dict[str, Value]:
    """Every key in the order of the settings."""
    found = {}
    followed = _followed(loaded.settings)
    for key in Settings.model_fields:
        value = getattr(loaded.settings, key)
        entry = loaded.entries.get(key)
        follows = None
        if value is None and key in followed:
            value, follows = followed[key]
        origin = entry.origin if entry is not None else "default"
        found[key] = Value(value, origin, entry.written if entry is not None else None, follows)
    return found


def as_json(loaded: LoadedConfig, config: Path | None) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "config": str(config) if config is not None else None,
        "values": {key: value._asdict() for key, value in values(loaded).items()},
        "without_effect": loaded.unused,
        "notes": loaded.notes,
        "warnings": loaded.warnings,
    }


def show(loaded: LoadedConfig, config: Path | None, console: Console) -> None:
    """Print the table; what was written stands out, defaults are dim."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "value", "from"):
        table.add_column(column, overflow="fold")
    for key, value in values(loaded).items():
        style = {"default": "dim", COMMAND_LINE: "yellow"}.get(value.origin, "green")
        text = value.value if isinstance(value.value, str) else shown(value.value)
        table.add_row(Text(key, style), Text(text, style), Text(_origin(value, config), style))
    console.print(table)
    for key, reason in loaded.unused.items():
        console.print(Text(f"no effect: {key} ({reason})", "magenta"))


def _origin(value: Value, config: Path | None) -> str:
    place = f"{config.name} {value.origin}" if config is not None and value.origin.startswith("line ") else value.origin
    if value.follows_from is not None:
        place += f", from {value.follows_from}"
    return f"{place}, as {value.written}" if value.written is not None else place


def _followed(settings: Settings) -> dict[str, tuple[Any, str]]:
    """What stands for a value that was not set -> (value, what it follows from)."""
    has_data = "eval_dataset and val_size"
    return {
        "lora_alpha": (settings.alpha, "2 x lora_rank"),
        "packing": (settings.is_packed, "stage"),
        "eval_strategy": (settings.when_to_evaluate, has_data),
        "eval_steps": (settings.steps_per_evaluation, "logging_steps"),
        "data_seed": (settings.seed, "seed"),
    }
