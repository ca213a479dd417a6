"""Paths of files that are to be made in; no empty folder left of them, when they cannot be, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_parents(paths: Iterable[Path]) -> Iterator[None]:
    """Remove the folders above `paths` that the block made, if it fails and they are empty."""
    parents = dict.fromkeys(parent for path in paths for parent in path.absolute().parents)
    missing = [parent for parent in parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                parent.rmdir()
        raise
