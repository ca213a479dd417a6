"""Print what several commands say at their end."""

from __future__ import annotations

from pathlib import Path

import click


def say_model(folder: Path, to: str) -> None:
    """Print the line on a whole model that was written."""
    from macft.api.conversions import LAYOUT_NAMES

    can_talk = (
        (folder / "tokenizer.json").exists() or any(folder.glob("vocab.*")) or any(folder.glob("tokenizer.model"))
    )
    use = f"talk to it: macft chat {folder}" if can_talk else "it has no tokenizer, as its source had none"
    click.echo(f"{folder}: a whole model in {LAYOUT_NAMES[to]}, {folder_bytes(folder)}; {use}")


def folder_bytes(folder: Path) -> str:
    """How large a folder is, to read."""
    from macft.files import folder_size
    from macft.text import size

    return size(folder_size(folder))
