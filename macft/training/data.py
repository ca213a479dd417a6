"""Read, tokenize and split the data that the settings name, from the cache where an earlier run left them."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from macft.config.settings import Settings
from macft.data.cache.cache import tokenized
from macft.data.cache.workers import Encoder
from macft.data.formats.dataset import Mixture, Request, split_examples
from macft.data.kinds import kind_of_stage
from macft.data.notes import Note, log_notes
from macft.data.sources.resolve import ResolvedSources, resolve_sources
from macft.data.stream import Stream
from macft.data.templates.chat_template import ChatTemplate, marker_notes
from macft.data.templates.ends import end_notes
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.feedback import in_blocks
from macft.data.tokenization.packing import PackedRows
from macft.data.tokenization.report import TokenizeReport
from macft.data.tokenization.table import Feedback, Rows, Table
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import ConfigError
from macft.progress import counting
from macft.text import plural

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class Data:
    """The rows to train on, packed if the settings say so, and those held out.

    `report` counts the training rows, and `digest` identifies them.
    """

    train: Rows | PackedRows
    valid: Rows
    report: TokenizeReport
    digest: str


def encoding_of(
    settings: Settings, tokenizer: Tokenizer, template: ChatTemplate | None, embedding_rows: int | None = None
) -> Encoding:
    """How the settings tokenize rows for a model with this embedding; only `stage: pt` needs no template."""
    return Encoding(
        tokenizer,
        template,
        cutoff_len=settings.cutoff_len,
        train_on_prompt=settings.train_on_prompt,
        mask_history=settings.mask_history,
        embedding_rows=embedding_rows,
    )


def request_of(settings: Settings, found: ResolvedSources | None = None) -> Request:
    """The rows to train on; `found`: the data sets of the settings, if they are already resolved."""
    probs = settings.interleave_probs
    return Request(
        kind_of_stage(settings.stage),
        found or resolve_sources(settings.dataset, settings.dataset_dir, settings.hub),
        settings.max_samples,
        Mixture(settings.mix_strategy, None if probs is None else tuple(probs), seed(settings)),
    )


def held_out_request(settings: Settings) -> Request | None:
    """The rows of `eval_dataset`, one data set after the other; None if it is not set."""
    if settings.eval_dataset is None:
        return None
    found = resolve_sources(settings.eval_dataset, settings.dataset_dir, settings.hub)
    return Request(kind_of_stage(settings.stage), found, settings.max_samples, Mixture(seed=seed(settings)))


def template_notes(request: Request, encoding: Encoding) -> list[Note]:
    """What there is to say about the template, where the rows are rendered with it."""
    if encoding.template is None or not request.kind.has_template:
        return []
    template, tokenizer = encoding.template, encoding.tokenizer
    return [*marker_notes(template, tokenizer), *end_notes(template, tokenizer)]


def read_data(settings: Settings, encoding: Encoding) -> Data:
    """The data sets of the settings, tokenized, and split where `val_size` says so."""
    request = request_of(settings)
    log_notes(template_notes(request, encoding))
    table = _table(settings, request, encoding)
    if (apart := held_out_request(settings)) is not None:
        held_out, chosen = _table(settings, apart, encoding), np.arange(len(table))
        others = np.arange(len(held_out))
    else:
        split = split_examples(range(len(table)), settings.val_size, seed(settings))
        held_out, (chosen, others) = table, (np.array(part, dtype=np.int64) for part in split)
    train, report = _take(request, encoding, table, chosen, packing=settings.is_packed)
    valid = _take_rows(request, encoding, held_out, others) if len(others) else []
    digest, block = _digest(settings, table, chosen), settings.per_device_train_batch_size
    if isinstance(valid, Feedback):
        valid = in_blocks(valid, block)
    if isinstance(train, Feedback):
        train, digest = in_blocks(train, block), _feedback_digest(digest, train, block)
    return Data(train, valid, report, digest)


@dataclass(frozen=True)
class StreamedData:
    """The rows to train on, read while training, and those held out, read before.

    `digest` identifies how the data are read, not their contents.
    """

    stream: Stream
    valid: Rows
    digest: str


def read_stream(settings: Settings, encoding: Encoding) -> StreamedData:
    """The data sets of the settings as a stream, read up to its first example.

    A `val_size` holds out the first rows. Raises ConfigError for packed conversations, and DataError for data that
    are missing, or invalid before the first example.
    """
    if settings.val_size != int(settings.val_size):
        raise ConfigError(
            f"val_size: found {settings.val_size:g}, expected a whole number: a stream has no known size to take a "
            "share of"
        )
    if settings.group_by_length and "group_by_length" in settings.model_fields_set:
        logger.info("group_by_length: off, because the lengths in a stream are not known")
    request = request_of(settings)
    skipped = int(settings.val_size)
    log_notes(request.found.notes)
    request.found.check()
    log_notes(template_notes(request, encoding))
    encoder = Encoder(request.kind, encoding, {path: i for i, path in enumerate(request.found.files)})
    stream = Stream(
        rows=lambda say: islice(request.rows(say), skipped, None),
        encoder=encoder,
        packing=settings.is_packed,
        buffer_size=1 if settings.disable_shuffling else settings.buffer_size,
        seed=seed(settings),
    )
    valid: Rows = []
    if (held_out := held_out_request(settings)) is not None:
        table = _table(settings, held_out, encoding)
        valid = _take_rows(held_out, encoding, table, np.arange(len(table)))
    elif skipped:
        rows = list(islice(request.rows(stream.say), skipped + 1))
        if len(rows) <= skipped:
            raise ConfigError(
                f"val_size: {skipped} leaves none of {plural(len(rows), 'example')} to train on; lower it"
            )
        valid = _take_rows(request, encoding, encoder(rows[:skipped]), np.arange(skipped))
    stream.check()
    return StreamedData(stream, valid, _stream_digest(stream, skipped, request.mixture))


def seed(settings: Settings) -> int:
    """The seed for the choice and the order of the data."""
    return settings.seed if settings.data_seed is None else settings.data_seed


def _table(settings: Settings, request: Request, encoding: Encoding) -> Table:
    table, notes = tokenized(
        request,
        encoding,
        overwrite=settings.overwrite_cache,
        workers=settings.preprocessing_num_workers,
        progress=partial(counting, "tokenizing"),
    )
    log_notes([*request.found.notes, *notes])
    return table


def _take(
    request: Request, encoding: Encoding, table: Table, indices: np.ndarray, *, packing: bool = False
) -> tuple[Rows | PackedRows, TokenizeReport]:
    """The trainable rows among some of a table, with the warnings about them logged."""
    rows, report = request.kind.take(table, encoding, indices, packing=packing)
    for warning in report.warnings:
        logger.warning(warning)
    return rows, report


def _take_rows(request: Request, encoding: Encoding, table: Table, indices: np.ndarray) -> Rows:
    rows, _ = _take(request, encoding, table, indices)
    assert not isinstance(rows, PackedRows)
    return rows


def _digest(settings: Settings, table: Table, rows: np.ndarray) -> str:
    is_cut = settings.is_packed or kind_of_stage(settings.stage).fills_rows
    digest = hashlib.sha256(f"{table.digest} {settings.cutoff_len if is_cut else None} ".encode())
    digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _feedback_digest(digest: str, rows: Feedback, block: int) -> str:
    """Add the ratings and the block size to a digest: training depends on them too."""
    return hashlib.sha256(f"{digest} {block} ".encode() + rows.is_desirable.tobytes()).hexdigest()


def _stream_digest(stream: Stream, held_out: int, mixture: Mixture) -> str:
    kind, encoding = stream.encoder.kind, stream.encoder.encoding
    template = None if encoding.template is None else (encoding.template.source, encoding.template.name)
    parts = [
        *(kind.name, encoding.tokenizer.fingerprint, template, encoding.cutoff_len),
        *(encoding.train_on_prompt, encoding.mask_history, stream.packing, stream.buffer_size, stream.seed),
        *(held_out, mixture.mix_strategy, mixture.interleave_probs),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
