"""Tokenize chunks of rows in several processes, each into a part file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from macft.data.cache.store import read_part, write_part
from macft.data.formats.reader import DataRow
from macft.data.kinds import Kind
from macft.data.tokenization.embedding import check_table
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.report import RefusedError
from macft.data.tokenization.table import Table
from macft.errors import DataError, MacftError

# a chunk ends at this many rows or characters: small enough for books, large enough to be fast
CHUNK_ROWS = 2000
CHUNK_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Encoder:
    """Encodes rows into a table, in this process or another; `files` numbers the files of the rows."""

    kind: Kind
    encoding: Encoding
    files: Mapping[str, int]

    def __call__(self, rows: Sequence[Any]) -> Table:
        """The rows as a table. Raises RefusedError naming those that the template refuses, or the model cannot read."""
        table = self.kind.encode(rows, self.encoding, self.files)
        check_table(table, [row.source for row in rows], self.encoding)
        return table


def chunks(rows: Iterable[DataRow], limit: int = CHUNK_ROWS) -> Iterator[list[DataRow]]:
    """The rows in lists of at most `limit`; the same rows always give the same lists."""
    chunk: list[DataRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(map(len, row.texts))
        if len(chunk) == limit or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@dataclass
class Builder:
    """Encodes chunks in `workers` processes, each into a file of `folder`, and keeps intact files found there."""

    encoder: Encoder
    folder: Path
    workers: int
    advance: Callable[[int], None]  # told how many more rows are done
    kept: int = 0
    parts: list[Path] = field(default_factory=list)
    _waiting: deque[tuple[Future[None], int]] = field(default_factory=deque)
    _problems: dict[str, tuple[str, int]] = field(default_factory=dict)

    def build(self, rows: Iterable[list[DataRow]]) -> list[Path]:
        """The part files, in order. Raises RefusedError for all chunks together, and the errors of reading rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(self.encoder,))
        try:
            for chunk in rows:
                self._take(pool, chunk)
            while self._waiting:
                self._settle()
        except BrokenProcessPool:
            raise MacftError(
                "a tokenizing process died, probably because memory ran out; lower preprocessing_num_workers "
                "and start again: finished parts are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self._problems:
            raise RefusedError(self._problems)
        return self.parts

    def _take(self, pool: ProcessPoolExecutor, chunk: list[DataRow]) -> None:
        part = self.folder / f"{len(self.parts):06d}.npz"
        self.parts.append(part)
        found = read_part(part)
        if found is not None and len(found) == len(chunk):
            self.kept += 1
            self.advance(len(chunk))
            return
        # more would hold all rows in memory, fewer leave a worker idle
        while len(self._waiting) > self.workers:
            self._settle()
        self._waiting.append((pool.submit(_encode_part, part, chunk), len(chunk)))

    def _settle(self) -> None:
        """Wait for the oldest chunk."""
        future, count = self._waiting.popleft()
        try:
            future.result()
        except RefusedError as error:
            for cause, (first, more) in error.problems.items():
                before = self._problems.get(cause, (first, 0))
                self._problems[cause] = (before[0], before[1] + more)
        self.advance(count)


# the encoder of a worker process
_own: list[Encoder] = []


def _start_worker(encoder: Encoder) -> None:
    # the parent handles Ctrl-C; there is one process per core, so each encodes on one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own.append(encoder)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed, or it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_part(part: Path, chunk: list[DataRow]) -> None:
    table = _own[0](chunk)
    try:
        write_part(part, table)
    except OSError as error:
        raise unwritable(part, error) from None


def unwritable(path: Path, error: OSError) -> DataError:
    """The error for a cache that cannot be written."""
    return DataError(f"{path}: cannot be written: {error.strerror or error}; set MACFT_CACHE to a folder with room")
