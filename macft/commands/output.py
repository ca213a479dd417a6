"""Print what several commands report when they finish."""

from __future__ import annotations

from pathlib import Path

import click

from macft.files import folder_size
from macft.text import size


def say_model(folder: Path, to: str) -> None:
    """Print the line on a whole model that was written."""
    from macft.api.conversions import LAYOUT_NAMES

    can_talk = any(any(folder.glob(name)) for name in ("tokenizer.json", "vocab.*", "tokenizer.model"))
    use = f"talk to it: macft chat {folder}" if can_talk else "it has no tokenizer, as its source had none"
    click.echo(f"{folder}: a whole model in {LAYOUT_NAMES[to]}, {size(folder_size(folder))}; {use}")
