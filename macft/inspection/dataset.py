"""A data file or a training config in; its rows as the trainer sees them, one by one or as a whole, out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from macft.config.load import load_settings, overridden_keys
from macft.config.settings import Settings
from macft.data.cache.cache import Request
from macft.data.cache.workers import Encoder, Kind
from macft.data.formats.columns import recognize_style
from macft.data.formats.dataset import Mixture, holds_pairs
from macft.data.sources.resolve import resolve_sources
from macft.data.sources.rows import Row, scan
from macft.data.sources.tables import is_table, table_columns
from macft.data.templates.chat_template import ChatTemplate, template_folder
from macft.data.templates.markers import warn_of_missing_marker
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError, UsageError
from macft.inspection.check import check
from macft.inspection.findings import as_json as check_json
from macft.inspection.findings import show as show_check
from macft.inspection.preview import (
    preview,
    preview_json,
    preview_pair,
    preview_pair_json,
    preview_text,
    preview_text_json,
)
from macft.inspection.stats import as_json as stats_json
from macft.inspection.stats import measure, plot
from macft.inspection.stats import show as show_stats
from macft.models.from_config import locate_shape
from macft.models.locate import resolve_adapter, resolve_model
from macft.progress import counting
from macft.training.model import resolve_template

DEFAULT_MODEL = "smollm2-135m"
# what a file without a config is taken for
_STAGES: dict[Kind, str] = {"sft": "sft", "pt": "pt", "pairs": "dpo"}
# what stats tries besides cutoff_len, as multiples of it
_CUTOFFS = (0.5, 1, 2, 4)
_SHOW: dict[Kind, tuple[Callable[..., None], Callable[..., dict[str, Any]]]] = {
    "sft": (preview, preview_json),
    "pt": (preview_text, preview_text_json),
    "pairs": (preview_pair, preview_pair_json),
}


@dataclass(frozen=True)
class Look:
    """A data set, and how a model would have it."""

    settings: Settings
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has none, and texts need none

    @property
    def kind(self) -> Kind:
        """What the rows stand for."""
        return "pairs" if self.settings.is_preference else "pt" if self.settings.stage == "pt" else "sft"

    @property
    def request(self) -> Request:
        """Which rows training would read."""
        settings = self.settings
        probs = settings.interleave_probs
        seed = settings.seed if settings.data_seed is None else settings.data_seed
        return Request(
            kind=self.kind,
            dataset=settings.dataset,
            dataset_dir=settings.dataset_dir,
            cutoff_len=settings.cutoff_len,
            max_samples=settings.max_samples,
            mixture=Mixture(settings.hub, settings.mix_strategy, None if probs is None else tuple(probs), seed),
            train_on_prompt=settings.train_on_prompt,
            mask_history=settings.mask_history,
        )

    @property
    def encoder(self) -> Encoder:
        """How training would tokenize them."""
        return Encoder(
            kind=self.kind,
            tokenizer=self.tokenizer,
            template=None if self.template is None else (self.template.source, self.template.name),
            cutoff_len=self.settings.cutoff_len,
            train_on_prompt=self.settings.train_on_prompt,
            mask_history=self.settings.mask_history,
            files={},
        )


def look_at(source: str, overrides: Sequence[str], model: str | None) -> Look:
    """A data set (a path, a hub id, a name in dataset_info.json), or the one of a config, with its tokenizer."""
    settings = _settings(source, overrides, model)
    # a config says by its stage what its data are, a file by its first row
    if not _is_config(source) and "stage" not in settings.model_fields_set:
        settings = settings.model_copy(update={"stage": _STAGES[_kind(settings)]})
    folder = _tokenizer_folder(settings)
    tokenizer = load_tokenizer(folder)
    adapter = settings.adapter_name_or_path
    source_folder = template_folder(folder, resolve_adapter(adapter) if adapter is not None else None)
    template = resolve_template(settings, source_folder, tokenizer)
    if settings.stage != "pt" and template is not None:
        warn_of_missing_marker(template, tokenizer)
    return Look(settings, tokenizer, template)


def preview_source(source: str, overrides: Sequence[str], row: int, model: str | None, as_json: bool) -> None:
    """Print row `row` (from 0) of a data set, or of a config's data set, to standard output."""
    look = look_at(source, overrides, model)
    # what follows it is not read: one row of a large data set shows at once
    rows: list[Any] = list(islice(look.request.rows(), row + 1))
    show, show_json = _SHOW[look.kind]
    arguments: list[Any] = [rows, row, look.tokenizer]
    keys: dict[str, Any] = {"cutoff_len": look.settings.cutoff_len}
    if look.kind != "pt":
        arguments.append(look.template)
    if look.kind == "sft":
        keys |= {"train_on_prompt": look.settings.train_on_prompt, "mask_history": look.settings.mask_history}
    if as_json:
        sys.stdout.write(json.dumps(show_json(*arguments, **keys), ensure_ascii=False) + "\n")
    else:
        show(*arguments, **keys, console=Console())


def stats_source(source: str, overrides: Sequence[str], model: str | None, picture: Path | None, as_json: bool) -> None:
    """Print the figures of a data set to standard output, and draw its lengths into the file `picture`."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(f"--plot {picture}: expected a file that ends in .png")
    look = look_at(source, overrides, model)
    cutoff_len = look.settings.cutoff_len
    cutoffs = sorted({max(2, round(cutoff_len * factor)) for factor in _CUTOFFS})
    with counting("tokenizing", None) as advance:
        stats = measure(look.request.rows(), look.encoder, cutoffs, packing=look.settings.is_packed, advance=advance)
    if picture is not None:
        plot(stats, cutoff_len, picture)
    if as_json:
        sys.stdout.write(json.dumps(stats_json(stats), ensure_ascii=False) + "\n")
    else:
        show_stats(stats, cutoff_len, Console())


def check_source(source: str, overrides: Sequence[str], model: str | None, as_json: bool) -> bool:
    """Print what is wrong with a data set, and with the config's eval_dataset; False if training would suffer."""
    look = look_at(source, overrides, model)
    settings, request = look.settings, look.request
    held_out = None
    if settings.eval_dataset is not None:
        held_out = replace(request, dataset=settings.eval_dataset, mixture=Mixture(settings.hub))
    with counting("checking", None) as advance:
        report = check(request, look.encoder, held_out, val_size=settings.val_size, advance=advance)
    if as_json:
        sys.stdout.write(json.dumps(check_json(report), ensure_ascii=False) + "\n")
    else:
        show_check(report, Console())
    return report.is_sound


def _tokenizer_folder(settings: Settings) -> Path:
    """A folder as it is, for no weights are needed here; anything else names a model."""
    name = settings.tokenizer_name_or_path or settings.model_name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return (locate_shape if settings.train_from_scratch else resolve_model)(name, settings.hub).path


def _kind(settings: Settings) -> Kind:
    """What the first row of the first data set stands for; conversations where it cannot be read."""
    if holds_pairs(settings.dataset, settings.dataset_dir, settings.hub):
        return "pairs"
    with suppress(DataError):
        sources, _ = resolve_sources(settings.dataset.split(",")[0], settings.dataset_dir, settings.hub)
        for source in sources:
            layout = source.layout
            if layout is not None:
                return "pt" if layout.style == "alpaca" and "response" not in layout.columns else "sft"
            return "pt" if _holds_text(source.files[0]) else "sft"
    return "sft"


def _holds_text(path: Path) -> bool:
    keys = (
        table_columns(path) if is_table(path) else next((list(r.value) for r in scan(path) if isinstance(r, Row)), [])
    )
    return "text" in keys and recognize_style(keys) is None


def _is_config(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _settings(source: str, overrides: Sequence[str], model: str | None) -> Settings:
    named = [f"model_name_or_path={model}"] if model is not None else []
    if _is_config(source):
        return load_settings(Path(source), [*overrides, *named])
    given = [*overrides, *named]
    defaults = {"model_name_or_path": DEFAULT_MODEL, "dataset": source, "output_dir": "."}
    named_keys = overridden_keys(given)
    return load_settings(
        None, [*(f"{key}={value}" for key, value in defaults.items() if key not in named_keys), *given]
    )
