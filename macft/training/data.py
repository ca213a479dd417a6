"""Settings in; the tokenized rows to train on and to evaluate on out, from the cache where an earlier run left them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np

from macft.config.settings import Settings
from macft.data.cache import Request, tokenized
from macft.data.dataset import Gathering, split_examples
from macft.data.fate import TokenizeReport
from macft.data.packing import PackedRows, pack
from macft.data.rows import Examples, Rows, Table
from macft.data.template import ChatTemplate
from macft.data.texts import take_texts
from macft.data.tokenize import take_examples
from macft.data.tokenize_pairs import take_pairs
from macft.data.tokenizer import Tokenizer
from macft.errors import ConfigError
from macft.files import cache_dir
from macft.training.progress import counting


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
    if settings.streaming:
        raise ConfigError(
            "streaming: not supported; remove it: data is tokenized once, in bounded memory, and kept on disk "
            f"({cache_dir() / 'data'})"
        )
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


def seed(settings: Settings) -> int:
    """What the choice and the order of the data depend on."""
    return settings.seed if settings.data_seed is None else settings.data_seed


@dataclass(frozen=True)
class _Job:
    """What reading and tokenizing need, besides the names of the data."""

    settings: Settings
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def table(self, dataset: str) -> Table:
        settings = self.settings
        # probabilities are those of the training data sets
        is_mixed = dataset == settings.dataset
        probs = settings.interleave_probs
        request = Request(
            kind="pairs" if settings.is_preference else "pt" if settings.stage == "pt" else "sft",
            dataset=dataset,
            dataset_dir=settings.dataset_dir,
            cutoff_len=settings.cutoff_len,
            max_samples=settings.max_samples,
            gathering=Gathering(
                hub=settings.hub,
                mix_strategy=settings.mix_strategy if is_mixed else "concat",
                interleave_probs=tuple(probs) if is_mixed and probs is not None else None,
                seed=seed(settings),
            ),
            train_on_prompt=settings.train_on_prompt,
            mask_history=settings.mask_history,
        )
        return tokenized(
            request,
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
