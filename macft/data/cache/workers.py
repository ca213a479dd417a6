"""Rows in; their tokens in part files, written by processes that each take a chunk of rows at a time, out."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from macft.data.cache.store import read_part, write_part
from macft.data.formats.conversations import Example, Text
from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.conversations import encode_examples
from macft.data.tokenization.pairs import encode_pairs
from macft.data.tokenization.report import RefusedError
from macft.data.tokenization.table import Table
from macft.data.tokenization.texts import encode_texts
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, MacftError

logger = logging.getLogger("macft")

Kind = Literal["sft", "pt", "pairs"]
Row = Example | Text | PairExample

# a chunk ends when it has so many rows or characters: small enough for books, large enough to be fast
CHUNK_ROWS = 2000
CHUNK_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Encoder:
    """Turns rows into a table; it can be sent to another process. `files` numbers the files that rows stand in."""

    kind: Kind
    tokenizer: Tokenizer
    template: tuple[str, str] | None  # (source, name); texts need none
    cutoff_len: int
    train_on_prompt: bool
    mask_history: bool
    files: dict[str, int]

    @cached_property
    def _template(self) -> ChatTemplate:
        assert self.template is not None
        source, name = self.template
        return ChatTemplate(source, name=name, special_map=self.tokenizer.special_map)

    def __getstate__(self) -> dict[str, Any]:
        # a compiled template cannot be sent
        return {name: value for name, value in self.__dict__.items() if name != "_template"}

    def __call__(self, rows: Sequence[Any]) -> Table:
        """The rows as a table; RefusedError names those that the template refuses."""
        if self.kind == "pairs":
            return encode_pairs(rows, self.tokenizer, self._template, cutoff_len=self.cutoff_len, files=self.files)
        if self.kind == "pt":
            return encode_texts(rows, self.tokenizer, files=self.files)
        return encode_examples(
            rows,
            self.tokenizer,
            self._template,
            cutoff_len=self.cutoff_len,
            train_on_prompt=self.train_on_prompt,
            mask_history=self.mask_history,
            files=self.files,
        )


def chunks(rows: Iterable[Row], limit: int = CHUNK_ROWS) -> Iterator[list[Row]]:
    """The rows in lists of `limit` at most, which are the same ones for the same rows."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) if isinstance(row, Text) else sum(len(m["content"]) for m in row.messages)
        if len(chunk) == limit or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@dataclass
class Builder:
    """Encodes chunks in `workers` processes, each into a file of `folder`; whole ones that it finds there are kept."""

    encoder: Encoder
    folder: Path
    workers: int
    advance: Callable[[int], None]  # told how many more rows are done
    kept: int = 0
    parts: list[Path] = field(default_factory=list)
    _waiting: deque[tuple[Future[None], int]] = field(default_factory=deque)
    _problems: dict[str, tuple[str, int]] = field(default_factory=dict)

    def build(self, rows: Iterable[list[Row]]) -> list[Path]:
        """The part files, in order. Raises RefusedError for all chunks together; the errors of reading rows."""
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
                "a process that tokenizes has died, as it does when memory runs out; lower preprocessing_num_workers "
                "and start again: what is done is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self._problems:
            raise RefusedError(self._problems)
        return self.parts

    def _take(self, pool: ProcessPoolExecutor, chunk: list[Row]) -> None:
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


def default_workers() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# the encoder of a worker process
_own: list[Encoder] = []


def _start_worker(encoder: Encoder) -> None:
    # Ctrl-C is the parent's to handle; the processes are one a core, so each encodes on one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own.append(encoder)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_part(part: Path, chunk: list[Row]) -> None:
    table = _own[0](chunk)
    try:
        write_part(part, table)
    except OSError as error:
        raise unwritable(part, error) from None


def unwritable(path: Path, error: OSError) -> DataError:
    """The error of a cache without room."""
    return DataError(f"{path}: cannot be written: {error.strerror or error}; set MACFT_CACHE to a folder with room")
