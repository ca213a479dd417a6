"""Tokenize the rows of data sets into a table, or load the table of an earlier run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from macft.data.cache.store import read_part, read_table, table_bytes, with_digest, write_table
from macft.data.cache.workers import Builder, Encoder, chunks, unwritable
from macft.data.formats.dataset import Request
from macft.data.formats.reader import DataRow
from macft.data.notes import Note
from macft.data.sources.resolve import DataSource
from macft.data.sources.tables import count_table
from macft.data.sources.text import kind
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.table import Table
from macft.errors import DataError
from macft.files import cache_dir, write_json
from macft.system import usable_cores
from macft.text import plural, size

logger = logging.getLogger("macft")

# Part of every key: raise it when the same rows give different tokens, masks, counts or files.
VERSION = 3

# this many chunks, at most 8,000 rows, are encoded before processes would have started
SMALL = 4

# shows progress: takes the number of all rows, or None, and gives a function that is told how many more are done
Shown = AbstractContextManager[Callable[[int], None]]
Progress = Callable[[int | None], Shown]

_BLOCK = 1 << 20
# a file that has only just changed can change again without a new date
_SETTLED_SECONDS = 2.0


def tokenized(
    request: Request,
    encoding: Encoding,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Table, list[Note]]:
    """The rows of a request as a table, mapped from the cache and built first if it is not there, and notes on them.

    `overwrite` builds it again; `workers` processes tokenize (default: one per core). Raises DataError for missing or
    invalid data and for conversations that the template refuses, MacftError when a process dies.
    """
    if request.found.problems:
        # reading also reports the problems of the other files
        for _ in request.rows():
            pass
    files = request.found.files
    folder = cache_dir() / "data" / cache_key(request, encoding)
    if overwrite:
        for old in (folder, _parts_of(folder)):
            shutil.rmtree(old, ignore_errors=True)
    elif (found := read_table(folder, files)) is not None:
        table, notes = found
        text = f"data: {plural(len(table), 'row')} tokenized before ({folder}, {size(table_bytes(folder))})"
        return table, [*notes, Note(text, is_warning=False)]
    encoder = Encoder(request.kind, encoding, {path: i for i, path in enumerate(files)})
    show = partial(progress or (lambda _: nullcontext(lambda _: None)), _total(request))
    return _build(request, folder, encoder, workers or usable_cores(), show)


def _parts_of(folder: Path) -> Path:
    """Where the parts of a table stay until it is whole, also those of a run that was killed."""
    return folder.with_name(f"{folder.name}.parts")


def cache_key(request: Request, encoding: Encoding) -> str:
    """Identifies everything that tokens, masks and counts depend on; files by their contents, not their path."""
    kind, sources, mixture, template = request.kind, request.found.sources, request.mixture, encoding.template
    draws = mixture.interleave_probs is not None or any(source.num_samples is not None for source in sources)
    parts: dict[str, Any] = {
        "version": [VERSION, tokenizers.__version__],
        "kind": kind.name,
        "sources": [_named(source) for source in sources],
        "mix": [mixture.mix_strategy, mixture.interleave_probs] if len(sources) > 1 else None,
        "seed": mixture.seed if draws else None,
        "max_samples": request.max_samples,
        "tokenizer": encoding.tokenizer.fingerprint,
    }
    if encoding.embedding_rows is not None and encoding.tokenizer.last_id >= encoding.embedding_rows:
        # a table that another model could read
        parts["embedding_rows"] = encoding.embedding_rows
    if not kind.has_template and encoding.tokenizer.opening:
        # the tokenizer's fingerprint leaves out what is put around a text
        parts["opening"] = encoding.tokenizer.opening
    if kind.has_template and template is not None:
        parts["template"] = template.source
        # such a template writes the date into the text
        parts["date"] = datetime.now().strftime("%Y-%m-%d") if "strftime_now" in template.source else None
    if not kind.fills_rows:
        parts["cutoff_len"] = encoding.cutoff_len
    if kind.has_masks:
        parts["masks"] = [encoding.train_on_prompt, encoding.mask_history]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _named(source: DataSource) -> Any:
    row_format = None if source.row_format is None else asdict(source.row_format)
    held = [[kind(path), path.suffix, contents(path).digest] for path in source.files]
    return [held, row_format, source.is_ranking, source.num_samples, source.bounds]


def _total(request: Request) -> int | None:
    """How many rows there are to read; None if only reading them tells."""
    sources = request.found.sources
    if request.max_samples is not None or request.mixture.mix_strategy != "concat":
        return None
    if any(source.num_samples is not None or source.bounds is not None for source in sources):
        return None
    counts = [contents(path).rows for source in sources for path in source.files]
    return sum(count for count in counts if count is not None) if None not in counts else None


def _build(
    request: Request, folder: Path, encoder: Encoder, workers: int, show: Callable[[], Shown]
) -> tuple[Table, list[Note]]:
    start = time.perf_counter()
    parts: Iterable[Table]
    notes: list[Note] = []
    rest = chunks(request.rows(notes.append))
    first = list(islice(rest, SMALL + 1))
    if is_small := len(first) <= SMALL:
        parts = [encoder([row for chunk in first for row in chunk])]
    else:
        parts = _read_parts(_build_parts(_parts_of(folder), encoder, workers, chain(first, rest), show))
    warnings = [note for note in dict.fromkeys(notes) if note.is_warning]
    try:
        write_table(folder, parts, request.kind.width, encoder.files, warnings)
    except OSError as error:
        if not is_small:
            raise unwritable(folder, error) from None
        logger.warning("data: not cached for later runs: %s: %s", folder, error.strerror)
        [table] = parts
        return with_digest(table), notes
    shutil.rmtree(_parts_of(folder), ignore_errors=True)
    found = read_table(folder, request.found.files)
    if found is None:
        raise DataError(f"{folder}: damaged as soon as it was written; check the disk, or set MACFT_CACHE")
    seconds, kept = time.perf_counter() - start, f"{folder} ({size(table_bytes(folder))})"
    text = f"data: {plural(len(found[0]), 'row')} tokenized in {seconds:.1f} s, kept in {kept}"
    return found[0], [*notes, Note(text, is_warning=False)]


def _build_parts(
    folder: Path, encoder: Encoder, workers: int, rows: Iterable[list[DataRow]], show: Callable[[], Shown]
) -> list[Path]:
    with show() as advance:
        builder = Builder(encoder, folder, workers, advance)
        try:
            parts = builder.build(rows)
        except DataError:
            # fixing this will change the data
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            raise unwritable(folder, error) from None
    if builder.kept:
        logger.info("data: %d of %d parts kept from a run that was stopped", builder.kept, len(parts))
    return parts


def _read_parts(paths: Iterable[Path]) -> Iterator[Table]:
    for path in paths:
        part = read_part(path)
        if part is None:
            raise DataError(f"{path}: missing or damaged; is another run using the same data? start again")
        yield part


@dataclass(frozen=True)
class Contents:
    """The `digest` of a file's bytes, and its number of `rows` (None: only parsing it tells)."""

    digest: str
    rows: int | None


def contents(path: Path) -> Contents:
    """The contents of a file, read only if its size or date has changed since the last time. Raises OSError."""
    stat = path.stat()
    place = str(path.resolve())
    known = _known()
    match known.get(place):
        case [int(size), int(changed), str(digest), int() | None as rows] if [size, changed] == [
            stat.st_size,
            stat.st_mtime_ns,
        ]:
            return Contents(digest, rows)
    found = _read(path)
    if time.time() - stat.st_mtime > _SETTLED_SECONDS:
        # if this fails, the file is read again the next time
        with suppress(OSError):
            write_json(_memory(), _known() | {place: [stat.st_size, stat.st_mtime_ns, found.digest, found.rows]})
    return found


def _memory() -> Path:
    return cache_dir() / "data" / "files.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(_memory().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _read(path: Path) -> Contents:
    digest = hashlib.sha256()
    line_ends = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            line_ends += block.count(b"\n")
    has_lines = path.suffix == kind(path) and path.suffix in (".jsonl", ".txt", ".csv")
    return Contents(digest.hexdigest(), line_ends if has_lines else count_table(path))
