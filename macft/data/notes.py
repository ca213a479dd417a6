"""Collect remarks about data, and log each one once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class Note:
    """A sentence about data for the user; where it is about one file, `path` names it and `text` does not."""

    text: str
    path: str = ""
    is_warning: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


def log_notes(notes: Iterable[Note]) -> None:
    """Log each note once, however often it was made."""
    for note in dict.fromkeys(notes):
        logger.log(logging.WARNING if note.is_warning else logging.INFO, "%s", note)
