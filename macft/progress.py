"""Items in, the same items out, with a bar on a terminal and a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track

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


@contextmanager
def counting(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """The same for rows that are done many at a time: yields what is told how many more are; `total` may be unknown."""
    console = Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda more: bar.advance(task, more)
        return
    said, done = time.monotonic(), 0

    def advance(more: int) -> None:
        nonlocal said, done
        done += more
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            logger.info("%s: %d%s rows", label, done, f" of {total}" if total is not None else "")
            said = time.monotonic()

    yield advance
