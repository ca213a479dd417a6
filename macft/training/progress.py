"""Items in, the same items out, with a bar on a terminal and a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

logger = logging.getLogger("macft")

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 30.0


def tracked(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the items while showing how many of `total` are done."""
    console = Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        yield from track(items, description=label, total=total, console=console, transient=True)
        return
    said = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if count < total and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            logger.info("%s: %d of %d batches", label, count, total)
            said = time.monotonic()
