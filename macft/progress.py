"""Show how far a long job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

from macft.files import folder_size
from macft.text import size

logger = logging.getLogger("macft")

T = TypeVar("T")
Advance = Callable[[int], None]  # takes how many more are done

_SECONDS_BEFORE_BAR = 1.0
_SECONDS_BETWEEN_LINES = 30.0


def stderr_is_terminal() -> bool:
    """Whether progress can be drawn: on a terminal that moves its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def tracked(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the items while showing how many of `total` are done."""
    with _shown(label, total, lambda done: f"{done} of {total} batches") as advance:
        for item in items:
            yield item
            advance(1)


def counting(label: str, total: int | None) -> AbstractContextManager[Advance]:
    """Yield a function that takes how many more rows are done; `total` may be unknown."""
    of_total = f" of {total}" if total is not None else ""
    return _shown(label, total, lambda done: f"{done}{of_total} rows")


def counting_bytes(total: int, label: str) -> AbstractContextManager[Advance]:
    """Yield a function that takes how many more bytes of `total` are done; a bar appears only after a second."""
    return _shown(label, total, lambda done: f"{100 * done // total}% of {size(total)}", is_bytes=True)


@contextmanager
def watching(destination: Path, label: str) -> Iterator[None]:
    """While the block runs, show how much of the new folder `destination` is written."""
    stop = Event()
    thread = Thread(target=_watch, args=(destination, label, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _shown(
    label: str, total: int | None, describe: Callable[[int], str], *, is_bytes: bool = False
) -> Iterator[Advance]:
    if stderr_is_terminal():
        with _bar(label, total, is_bytes=is_bytes) as advance:
            yield advance
        return
    done, last_line = 0, time.monotonic()

    def tell(more: int) -> None:
        nonlocal done, last_line
        done += more
        if done != total and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            logger.info("%s: %s", label, describe(done))
            last_line = time.monotonic()

    yield tell


@contextmanager
def _bar(label: str, total: int | None, *, is_bytes: bool) -> Iterator[Advance]:
    # rich takes long to import, and a log does without it
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    byte_columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*(byte_columns if is_bytes else ()), console=Console(stderr=True), transient=True)
    task = progress.add_task(label, total=total)
    show_after = time.monotonic() + (_SECONDS_BEFORE_BAR if is_bytes else 0.0)
    if not is_bytes:
        progress.start()

    def advance(more: int) -> None:
        progress.advance(task, more)
        if not progress.live.is_started and time.monotonic() > show_after:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()


def _watch(destination: Path, label: str, stop: Event) -> None:
    is_terminal = sys.stderr.isatty()
    last_line, is_shown = time.monotonic(), False
    while not stop.wait(0.5):
        if not is_terminal and time.monotonic() - last_line < _SECONDS_BETWEEN_LINES:
            continue
        last_line = time.monotonic()
        text = f"{label}: {size(_written(destination))} written"
        if is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            is_shown = True
        else:
            logger.info(text)
    if is_shown:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _written(destination: Path) -> int:
    """Bytes in the hidden folder that becomes `destination`; files that vanish meanwhile count as none."""
    try:
        return sum(folder_size(folder) for folder in destination.parent.glob(f".{destination.name}.*.tmp"))
    except OSError:
        return 0
