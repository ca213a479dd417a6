"""Settings in; the tokenized rows to train on and to evaluate on out, from the cache where an earlier run left them."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from macft.config.settings import Settings
from macft.data.cache.cache import Request, tokenized
from macft.data.cache.workers import Encoder, Kind
from macft.data.formats.dataset import Mixture, split_examples
from macft.data.sources.resolve import resolve_sources
from macft.data.stream import Once, Stream
from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.markers import warn_of_missing_marker
from macft.data.tokenization.conversations import take_examples
from macft.data.tokenization.packing import PackedRows, pack
from macft.data.tokenization.pairs import take_pairs
from macft.data.tokenization.report import TokenizeReport
from macft.data.tokenization.table import Examples, Rows, Table
from macft.data.tokenization.texts import take_texts
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import ConfigError, DataError
from macft.progress import counting
from macft.text import plural

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class Data:
    """What is trained on, packed where the settings say so, and what is held out; `report` is of the former.

    `digest` names what is trained on.
    """

    train: Rows | PackedRows
    valid: Rows
    report: TokenizeReport
    digest: str


def read_data(settings: Settings, tokenizer: Tokenizer, template: ChatTemplate | None) -> Data:
    """The data sets of the settings, tokenized, and split where `val_size` says so.

    Only `stage: pt` does without a template.
    """
    job = _Job(settings, tokenizer, template)
    table = job.table(settings.dataset)
    if settings.eval_dataset is not None:
        held_out, chosen = job.table(settings.eval_dataset), np.arange(len(table))
        others = np.arange(len(held_out))
    else:
        split = split_examples(range(len(table)), settings.val_size, seed(settings))
        held_out, (chosen, others) = table, (np.array(part, dtype=np.int64) for part in split)
    train, report = job.take(table, chosen, packing=settings.is_packed)
    valid = job.take(held_out, others)[0] if len(others) else []
    assert not isinstance(valid, PackedRows)
    return Data(train, valid, report, _digest(settings, table, chosen))


@dataclass(frozen=True)
class StreamedData:
    """What is trained on, which is read while training, and what is held out, which is read now.

    `digest` names how the data are read, not what they are.
    """

    stream: Stream
    valid: Rows
    digest: str


def read_stream(settings: Settings, tokenizer: Tokenizer, template: ChatTemplate | None) -> StreamedData:
    """The data sets of the settings as a stream, read up to its first example.

    A count as `val_size` holds out the first rows. Raises ConfigError for packed conversations; DataError for data
    that are missing, or invalid up to the first example.
    """
    if settings.is_packed and settings.stage != "pt":
        raise ConfigError(
            "packing: conversations are packed by their lengths, which a stream does not know; remove packing or "
            "streaming"
        )
    if settings.val_size != int(settings.val_size):
        raise ConfigError(
            f"val_size: found {settings.val_size:g}, expected a whole count, for no share of a stream is known"
        )
    if settings.group_by_length and "group_by_length" in settings.model_fields_set:
        logger.info("group_by_length: off, for the lengths of a stream are not known")
    job, once = _Job(settings, tokenizer, template), Once()
    request, held_out = job.request(settings.dataset), int(settings.val_size)
    with once.applied():
        sources, problems = resolve_sources(settings.dataset, settings.dataset_dir, settings.hub)
    if problems:
        raise DataError("\n".join(problems))
    if request.kind != "pt" and template is not None:
        warn_of_missing_marker(template, tokenizer)
    files = dict.fromkeys(str(path) for source in sources for path in source.files)
    encoder = job.encoder({path: i for i, path in enumerate(files)})
    stream = Stream(
        rows=lambda: islice(request.rows(), held_out, None),
        encoder=encoder,
        packing=settings.is_packed,
        buffer_size=1 if settings.disable_shuffling else settings.buffer_size,
        seed=seed(settings),
        once=once,
    )
    valid: Rows | PackedRows = []
    if settings.eval_dataset is not None:
        table = job.table(settings.eval_dataset)
        valid, _ = job.take(table, np.arange(len(table)))
    elif held_out:
        with once.applied():
            rows = list(islice(request.rows(), held_out + 1))
        if len(rows) <= held_out:
            raise ConfigError(
                f"val_size: {held_out} leaves none of {plural(len(rows), 'example')} to train on; lower it"
            )
        valid, _ = job.take(encoder(rows[:held_out]), np.arange(held_out))
    assert not isinstance(valid, PackedRows)
    stream.check()
    return StreamedData(stream, valid, _stream_digest(stream, held_out, request.mixture))


def seed(settings: Settings) -> int:
    """What the choice and the order of the data depend on."""
    return settings.seed if settings.data_seed is None else settings.data_seed


@dataclass(frozen=True)
class _Job:
    """What reading and tokenizing need, besides the names of the data."""

    settings: Settings
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def kind(self) -> Kind:
        """What the rows stand for."""
        return "pairs" if self.settings.is_preference else "pt" if self.settings.stage == "pt" else "sft"

    def encoder(self, files: dict[str, int]) -> Encoder:
        settings, template = self.settings, self.template
        return Encoder(
            kind=self.kind,
            tokenizer=self.tokenizer,
            template=(template.source, template.name) if template is not None else None,
            cutoff_len=settings.cutoff_len,
            train_on_prompt=settings.train_on_prompt,
            mask_history=settings.mask_history,
            files=files,
        )

    def request(self, dataset: str) -> Request:
        settings = self.settings
        # probabilities are those of the training data sets
        is_mixed = dataset == settings.dataset
        probs = settings.interleave_probs
        return Request(
            kind=self.kind,
            dataset=dataset,
            dataset_dir=settings.dataset_dir,
            cutoff_len=settings.cutoff_len,
            max_samples=settings.max_samples,
            mixture=Mixture(
                hub=settings.hub,
                mix_strategy=settings.mix_strategy if is_mixed else "concat",
                interleave_probs=tuple(probs) if is_mixed and probs is not None else None,
                seed=seed(settings),
            ),
            train_on_prompt=settings.train_on_prompt,
            mask_history=settings.mask_history,
        )

    def table(self, dataset: str) -> Table:
        settings = self.settings
        return tokenized(
            self.request(dataset),
            self.tokenizer,
            self.template,
            overwrite=settings.overwrite_cache,
            workers=settings.preprocessing_num_workers,
            progress=partial(counting, "tokenizing"),
        )

    def take(
        self, table: Table, indices: np.ndarray, *, packing: bool = False
    ) -> tuple[Rows | PackedRows, TokenizeReport]:
        cutoff_len = self.settings.cutoff_len
        if self.settings.stage == "pt":
            return take_texts(table, self.tokenizer, cutoff_len=cutoff_len, packing=packing, indices=indices)
        assert self.template is not None
        take = take_pairs if self.settings.is_preference else take_examples
        rows, report = take(table, self.tokenizer, self.template, cutoff_len=cutoff_len, indices=indices)
        return (pack(rows, rows.lengths, cutoff_len) if packing and isinstance(rows, Examples) else rows), report


def _digest(settings: Settings, table: Table, rows: np.ndarray) -> str:
    packed = settings.cutoff_len if settings.is_packed or settings.stage == "pt" else None
    digest = hashlib.sha256(f"{table.digest} {packed} ".encode())
    digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _stream_digest(stream: Stream, held_out: int, mixture: Mixture) -> str:
    encoder = stream.encoder
    parts = [
        *(encoder.kind, encoder.tokenizer.fingerprint, encoder.template, encoder.cutoff_len),
        *(encoder.train_on_prompt, encoder.mask_history, stream.packing, stream.buffer_size, stream.seed),
        *(held_out, mixture.mix_strategy, mixture.interleave_probs),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
