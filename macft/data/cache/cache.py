"""Names of data sets in; their rows as a table, tokenized now or by an earlier run, out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from macft.data.cache.contents import contents
from macft.data.cache.store import read_part, read_table, table_bytes, with_digest, write_table
from macft.data.cache.workers import Builder, Encoder, Kind, Row, chunks, default_workers, unwritable
from macft.data.formats.dataset import Mixture, iter_examples, iter_pairs, iter_texts
from macft.data.sources.resolve import DataSource, resolve_sources
from macft.data.sources.text import kind
from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.markers import warn_of_missing_marker
from macft.data.tokenization.table import Table
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError
from macft.files import cache_dir
from macft.text import plural, size

logger = logging.getLogger("macft")

# Part of every key: raise it when the same rows become other tokens, masks, counts or files.
VERSION = 1

# so many chunks, 8,000 rows at most, are encoded sooner than processes start
SMALL = 4

# shows progress: given the number of all rows, or None, makes what is told how many more are done
Progress = Callable[[int | None], AbstractContextManager[Callable[[int], None]]]

_READ: dict[Kind, Callable[..., Iterator[Row]]] = {"sft": iter_examples, "pt": iter_texts, "pairs": iter_pairs}


@dataclass(frozen=True)
class Request:
    """Which rows are expected, and how they are to be tokenized."""

    kind: Kind
    dataset: str
    dataset_dir: str
    cutoff_len: int
    max_samples: int | None = None
    mixture: Mixture = field(default_factory=Mixture)
    train_on_prompt: bool = False
    mask_history: bool = False

    def rows(self) -> Iterator[Row]:
        """The rows, read now."""
        return _READ[self.kind](self.dataset, self.dataset_dir, self.max_samples, self.mixture)


@dataclass(frozen=True)
class _Cache:
    """Where the rows of a request are kept, or will be."""

    folder: Path
    files: tuple[str, ...]

    @property
    def parts(self) -> Path:
        """What a run that was killed has left of a table."""
        return self.folder.with_name(f"{self.folder.name}.parts")

    def read(self) -> Table | None:
        """The table, with what was said about its rows said again; None if there is none that is whole."""
        found = read_table(self.folder, self.files)
        if found is None:
            return None
        table, notes = found
        for note in notes:
            logger.warning(_placed(note, self.files))
        logger.info(
            "data: %s tokenized before (%s, %s)",
            *(plural(len(table), "row"), self.folder, _size(self.folder)),
        )
        return table


def tokenized(
    request: Request,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Table:
    """The rows of a request as a table, mapped from the cache, where they are put first if they are not there.

    Only texts do without a template.
    `overwrite` builds anew, `workers` processes tokenize (default: one a core). Raises DataError: data missing
    or invalid, conversations that the template refuses; MacftError when a process dies.
    """
    # what is said of the data sets is said once, also when they are looked up once more to be read
    with _records(hold=True) as said:
        sources, problems = resolve_sources(request.dataset, request.dataset_dir, request.mixture.hub)
    if problems:
        # reading tells the problems of the other files too
        for _ in request.rows():
            pass
    if request.kind != "pt" and template is not None:
        warn_of_missing_marker(template, tokenizer)
    files = tuple(dict.fromkeys(str(path) for source in sources for path in source.files))
    key = cache_key(request, sources, tokenizer, template)
    cache = _Cache(cache_dir() / "data" / key, files)
    if overwrite:
        for folder in (cache.folder, cache.parts):
            shutil.rmtree(folder, ignore_errors=True)
    elif (table := cache.read()) is not None:
        for record in said:
            logger.handle(record)
        return table
    encoder = Encoder(
        kind=request.kind,
        tokenizer=tokenizer,
        template=(template.source, template.name) if template is not None else None,
        cutoff_len=request.cutoff_len,
        train_on_prompt=request.train_on_prompt,
        mask_history=request.mask_history,
        files={path: i for i, path in enumerate(files)},
    )
    show = partial(progress or (lambda _: nullcontext(lambda _: None)), _total(request, sources))
    return _build(request, cache, encoder, workers or default_workers(), show)


def cache_key(request: Request, sources: list[DataSource], tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    """Names everything that the tokens, masks and counts depend on; files by what they hold, not by their path."""
    mixture = request.mixture
    draws = mixture.interleave_probs is not None or any(source.num_samples is not None for source in sources)
    parts: dict[str, Any] = {
        "version": [VERSION, tokenizers.__version__],
        "kind": request.kind,
        "sources": [_named(source) for source in sources],
        "mix": [mixture.mix_strategy, mixture.interleave_probs] if len(sources) > 1 else None,
        "seed": mixture.seed if draws else None,
        "max_samples": request.max_samples,
        "tokenizer": tokenizer.fingerprint,
    }
    # texts are kept whole, and as they are
    if request.kind != "pt" and template is not None:
        parts["template"] = template.source
        # such a template puts it into the text
        parts["date"] = datetime.now().strftime("%Y-%m-%d") if "strftime_now" in template.source else None
        parts["cutoff_len"] = request.cutoff_len
    if request.kind == "sft":
        parts["masks"] = [request.train_on_prompt, request.mask_history]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _named(source: DataSource) -> Any:
    layout = None if source.layout is None else asdict(source.layout)
    held = [[kind(path), path.suffix, contents(path).digest] for path in source.files]
    return [held, layout, source.is_ranking, source.num_samples, source.bounds]


def _total(request: Request, sources: list[DataSource]) -> int | None:
    """How many rows there are to read, as far as that is known without reading them."""
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
) -> Table:
    start = time.perf_counter()
    width = 2 if request.kind == "pairs" else 1
    parts: Iterable[Table]
    with _records(hold=False) as said:
        rest = chunks(request.rows())
        first = list(islice(rest, SMALL + 1))
        if is_small := len(first) <= SMALL:
            parts = [encoder([row for chunk in first for row in chunk])]
        else:
            parts = _read_parts(_build_parts(cache.parts, encoder, workers, chain(first, rest), show))
    notes = [_unplaced(record.getMessage(), cache.files) for record in said if record.levelno >= logging.WARNING]
    try:
        write_table(cache.folder, parts, width, notes)
    except OSError as error:
        if not is_small:
            raise unwritable(cache.folder, error) from None
        logger.warning("data: not kept for later runs: %s: %s", cache.folder, error.strerror)
        [table] = parts
        return with_digest(table)
    shutil.rmtree(cache.parts, ignore_errors=True)
    found = read_table(cache.folder, cache.files)
    if found is None:
        raise DataError(f"{cache.folder}: damaged as soon as it was written; look at the disk, or set MACFT_CACHE")
    logger.info(
        "data: %s tokenized in %.1f s, kept in %s (%s)",
        *(plural(len(found[0]), "row"), time.perf_counter() - start),
        *(cache.folder, _size(cache.folder)),
    )
    return found[0]


def _build_parts(
    folder: Path,
    encoder: Encoder,
    workers: int,
    rows: Iterable[list[Row]],
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


class _Records(logging.Filter):
    """Keeps what is logged; `hold`: and lets nothing of it through."""

    def __init__(self, *, hold: bool) -> None:
        super().__init__()
        self.hold = hold
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.records.append(record)
        return not self.hold


@contextmanager
def _records(*, hold: bool) -> Iterator[list[logging.LogRecord]]:
    kept = _Records(hold=hold)
    logger.addFilter(kept)
    try:
        yield kept.records
    finally:
        logger.removeFilter(kept)


# what is kept is not kept under the path of the file, which may have another one the next time
def _unplaced(note: str, files: tuple[str, ...]) -> str:
    for i, path in enumerate(files):
        note = note.replace(path, f"\0{i}\0")
    return note


def _placed(note: str, files: tuple[str, ...]) -> str:
    for i, path in enumerate(files):
        note = note.replace(f"\0{i}\0", path)
    return note
