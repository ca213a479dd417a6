"""Give the rows of data sets as a table, tokenized now or by an earlier run."""

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

# Part of every key: raise it when the same rows become other tokens, masks, counts or files.
VERSION = 1

# so many chunks, 8,000 rows at most, are encoded sooner than processes start
SMALL = 4

# shows progress: given the number of all rows, or None, makes what is told how many more are done
Progress = Callable[[int | None], AbstractContextManager[Callable[[int], None]]]

_BLOCK = 1 << 20
# a file that has only just changed can change again without a new date
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class _Cache:
    """Where the rows of a request are kept, or will be."""

    folder: Path
    files: tuple[str, ...]

    @property
    def parts(self) -> Path:
        """What a run that was killed has left of a table."""
        return self.folder.with_name(f"{self.folder.name}.parts")

    def read(self) -> tuple[Table, list[Note]] | None:
        """The table, and the warnings about its files; None if there is none that is whole."""
        found = read_table(self.folder, self.files)
        if found is None:
            return None
        table, notes = found
        text = f"data: {plural(len(table), 'row')} tokenized before ({self.folder}, {_size(self.folder)})"
        return table, [*notes, Note(text, is_warning=False)]


def tokenized(
    request: Request,
    encoding: Encoding,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Table, list[Note]]:
    """The rows of a request as a table, mapped from the cache, where they are put first if they are not there.

    With it comes what there is to say about them. `overwrite` builds it again, `workers` processes tokenize
    (default: one a core). Raises DataError: data missing or invalid, conversations that the template refuses;
    MacftError when a process dies.
    """
    if request.found.problems:
        # reading tells the problems of the other files too
        for _ in request.rows():
            pass
    files = request.found.files
    cache = _Cache(cache_dir() / "data" / cache_key(request, encoding), files)
    if overwrite:
        for folder in (cache.folder, cache.parts):
            shutil.rmtree(folder, ignore_errors=True)
    elif (found := cache.read()) is not None:
        return found
    encoder = Encoder(request.kind, encoding, {path: i for i, path in enumerate(files)})
    show = partial(progress or (lambda _: nullcontext(lambda _: None)), _total(request))
    return _build(request, cache, encoder, workers or usable_cores(), show)


def cache_key(request: Request, encoding: Encoding) -> str:
    """Names everything that the tokens, masks and counts depend on; files by what they hold, not by their path."""
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
    if kind.has_template and template is not None:
        parts["template"] = template.source
        # such a template puts it into the text
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
    """How many rows there are to read, as far as that is known without reading them."""
    sources = request.found.sources
    if request.max_samples is not None or request.mixture.mix_strategy != "concat":
        return None
    if any(source.num_samples is not None or source.bounds is not None for source in sources):
        return None
    counts = [contents(path).rows for source in sources for path in source.files]
    return sum(count for count in counts if count is not None) if None not in counts else None


def _build(
    request: Request,
    cache: _Cache,
    encoder: Encoder,
    workers: int,
    show: Callable[[], AbstractContextManager[Callable[[int], None]]],
) -> tuple[Table, list[Note]]:
    start = time.perf_counter()
    parts: Iterable[Table]
    notes: list[Note] = []
    rest = chunks(request.rows(notes.append))
    first = list(islice(rest, SMALL + 1))
    if is_small := len(first) <= SMALL:
        parts = [encoder([row for chunk in first for row in chunk])]
    else:
        parts = _read_parts(_build_parts(cache.parts, encoder, workers, chain(first, rest), show))
    warnings = [note for note in dict.fromkeys(notes) if note.is_warning]
    try:
        write_table(cache.folder, parts, request.kind.width, encoder.files, warnings)
    except OSError as error:
        if not is_small:
            raise unwritable(cache.folder, error) from None
        logger.warning("data: not kept for later runs: %s: %s", cache.folder, error.strerror)
        [table] = parts
        return with_digest(table), notes
    shutil.rmtree(cache.parts, ignore_errors=True)
    found = read_table(cache.folder, cache.files)
    if found is None:
        raise DataError(f"{cache.folder}: damaged as soon as it was written; look at the disk, or set MACFT_CACHE")
    seconds, kept = time.perf_counter() - start, f"{cache.folder} ({_size(cache.folder)})"
    text = f"data: {plural(len(found[0]), 'row')} tokenized in {seconds:.1f} s, kept in {kept}"
    return found[0], [*notes, Note(text, is_warning=False)]


def _build_parts(
    folder: Path,
    encoder: Encoder,
    workers: int,
    rows: Iterable[list[DataRow]],
    show: Callable[[], AbstractContextManager[Callable[[int], None]]],
) -> list[Path]:
    with show() as advance:
        builder = Builder(encoder, folder, workers, advance)
        try:
            parts = builder.build(rows)
        except DataError:
            # the data will be others when this is mended
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            raise unwritable(folder, error) from None
    if builder.kept:
        logger.info("data: %d of %d parts were there from a run that was stopped", builder.kept, len(parts))
    return parts


def _read_parts(paths: Iterable[Path]) -> Iterator[Table]:
    for path in paths:
        part = read_part(path)
        if part is None:
            raise DataError(f"{path}: gone or damaged; is another run at work on the same data? start again")
        yield part


def _size(folder: Path) -> str:
    return size(table_bytes(folder))


@dataclass(frozen=True)
class Contents:
    """`digest` of all bytes; `rows` None: only reading it tells."""

    digest: str
    rows: int | None


def contents(path: Path) -> Contents:
    """What a file holds; read only if its size or date is not that of the last time. Raises OSError."""
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
        # without it the file is read again the next time
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
