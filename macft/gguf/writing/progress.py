"""Show how much of a long write is done: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("macft")

_SECONDS_BEFORE_BAR = 1.0
_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def watched(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes done since the last call, out of `total`."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _bar(total, label) as advance:
            yield advance
        return
    done, said = 0, time.monotonic()

    def tell(count: int) -> None:
        nonlocal done, said
        done += count
        if done < total and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            logger.info("%s: %d%% of %.1f GB", label, 100 * done // total, total / 1e9)
            said = time.monotonic()

    yield tell


@contextmanager
def _bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    # slow to import, and not needed in a log
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(label, total=total)
    begun = time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        if not progress.live.is_started and time.monotonic() - begun > _SECONDS_BEFORE_BAR:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()
