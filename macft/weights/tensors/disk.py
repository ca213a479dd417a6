"""Check the room on a disk, hash and flush large files while they are written, and report errors in one line."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from macft.errors import ModelError
from macft.text import size

_FLUSH = 128 << 20  # bytes after which a flush is started


class HashedFile:
    """A file that is hashed as it is written and flushed before it is complete."""

    def __init__(self, file: BinaryIO, flusher: ThreadPoolExecutor) -> None:
        self._file, self._flusher = file, flusher
        self._digest = hashlib.sha256()
        self._unflushed = 0
        self._flush: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._digest.update(data)
        self._file.write(data)
        self._unflushed += memoryview(data).nbytes
        if self._unflushed >= _FLUSH and (self._flush is None or self._flush.done()):
            self._file.flush()
            # the disk works while the next bytes are computed, not after the last
            self._flush, self._unflushed = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def finish(self) -> str:
        """Wait for the flush; returns the SHA-256 of everything written."""
        if self._flush is not None:
            self._flush.result()
        return self._digest.hexdigest()


@contextmanager
def disk_problems(destination: Path | str, needed: int) -> Iterator[None]:
    """Turn an OSError into a one-line ModelError, for a writer that leaves nothing behind."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{destination}: cannot be written: {error.strerror or error}; {size(needed)} are needed, nothing "
            "was left behind"
        ) from None


def check_room(needed: Mapping[Path, int], name: str | None = None) -> None:
    """Raise ModelError when a disk has too little room for the files or folders that will be written to it.

    `name` is what the error calls them, by default their paths.
    """
    disks: dict[int, list[Path]] = {}
    for path in needed:
        path.parent.mkdir(parents=True, exist_ok=True)
        disks.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in disks.values():
        expected = sum(needed[path] for path in paths)
        free = shutil.disk_usage(paths[0].parent).free
        if free < expected:
            name = name or ", ".join(map(str, paths))
            raise ModelError(
                f"{name}: {size(expected)} are needed, the disk has {size(free)}; make room or name another destination"
            )
