"""What large files need of a disk: room before, one line when it fails, a hash and an early flush while writing."""

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

_FLUSH = 128 << 20  # bytes after which the disk is told to begin


class HashedFile:
    """A file that is hashed as it is written, and that the disk begins to store before it is whole."""

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
            # the disk works while the next bytes are made, not after the last
            self._flush, self._unflushed = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def finish(self) -> str:
        """The SHA-256 of all that was written."""
        if self._flush is not None:
            self._flush.result()
        return self._digest.hexdigest()


@contextmanager
def disk_problems(destination: Path | str, needed: int) -> Iterator[None]:
    """Make one line of what the system refuses, for a writer that leaves nothing behind."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{destination}: cannot be written: {error.strerror or error}; {size(needed)} are needed, nothing "
            "was left behind"
        ) from None


def check_room(needed: Mapping[Path, int]) -> None:
    """ModelError when a disk has fewer free bytes than the files or folders that are to be made on it need."""
    disks: dict[int, list[Path]] = {}
    for path in needed:
        path.parent.mkdir(parents=True, exist_ok=True)
        disks.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in disks.values():
        expected = sum(needed[path] for path in paths)
        free = shutil.disk_usage(paths[0].parent).free
        if free < expected:
            raise ModelError(
                f"{', '.join(map(str, paths))}: {size(expected)} are needed, the disk has {size(free)}; make "
                "room or name another destination"
            )
