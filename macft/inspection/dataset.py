"""Preview, measure or check the rows of a data file or a training config as the trainer sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from macft.config.load import load_config, overridden_keys
from macft.config.settings import Settings
from macft.data.cache.workers import Encoder
from macft.data.formats.dataset import Request
from macft.data.kinds import kind_of_source
from macft.data.notes import Note, log_notes
from macft.data.sources.resolve import resolve_sources
from macft.data.templates.chat_template import template_folder
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.tokenizer import load_tokenizer, read_json
from macft.errors import UsageError
from macft.inspection.check import as_json as check_json
from macft.inspection.check import check
from macft.inspection.check import show as show_check
from macft.inspection.preview import show as show_preview
from macft.inspection.stats import as_json as stats_json
from macft.inspection.stats import measure, plot
from macft.inspection.stats import show as show_stats
from macft.models.from_config import locate_shape
from macft.models.locate import resolve_adapter, resolve_model
from macft.progress import counting
from macft.training.data import encoding_of, held_out_request, request_of, template_notes
from macft.training.model import resolve_template
from macft.weights.model_config import embedding_rows

DEFAULT_MODEL = "smollm2-135m"
# the values that stats tries, as multiples of cutoff_len
_CUTOFFS = (0.5, 1, 2, 4)


@dataclass(frozen=True)
class Inspected:
    """The rows of a data set, and how training would tokenize them."""

    settings: Settings
    request: Request
    encoding: Encoding

    @property
    def encoder(self) -> Encoder:
        """An encoder for tables without file names."""
        return Encoder(self.request.kind, self.encoding, {})


def inspect(source: str, overrides: Sequence[str], model: str | None) -> Inspected:
    """A data set (a path, a hub id, a name in dataset_info.json), or the one of a config, with its tokenizer."""
    settings = _settings(source, overrides, model)
    found = resolve_sources(settings.dataset, settings.dataset_dir, settings.hub)
    # a config determines its kind of data by its stage, a file by its first row
    if not _is_config(source) and "stage" not in settings.model_fields_set and found.sources:
        settings = settings.model_copy(update={"stage": kind_of_source(found.sources[0]).stages[0]})
    folder = _tokenizer_folder(settings)
    tokenizer = load_tokenizer(folder)
    adapter = settings.adapter_name_or_path
    source_folder = template_folder(folder, resolve_adapter(adapter) if adapter is not None else None)
    template = resolve_template(settings, source_folder, tokenizer)
    encoding = encoding_of(settings, tokenizer, template, _embedding_rows(settings, folder))
    inspected = Inspected(settings, request_of(settings, found), encoding)
    log_notes([*found.notes, *template_notes(inspected.request, inspected.encoding)])
    return inspected


def preview_source(source: str, overrides: Sequence[str], row: int, model: str | None, as_json: bool) -> None:
    """Print row `row` (from 0) of a data set, or of a config's data set, to standard output."""
    inspected = inspect(source, overrides, model)
    # later rows are not read, so that a row of a large data set shows at once
    rows = list(islice(inspected.request.rows(_log), row + 1))
    if not 0 <= row < len(rows):
        raise UsageError(f"row {row}: there are {len(rows)} rows, expected 0 to {len(rows) - 1}")
    preview = inspected.request.kind.preview(rows[row], inspected.encoding)
    if as_json:
        _print_json(preview.value)
    else:
        show_preview(preview, Console())


def stats_source(source: str, overrides: Sequence[str], model: str | None, picture: Path | None, as_json: bool) -> None:
    """Print the figures of a data set to standard output, and draw its lengths into the file `picture`."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(f"--plot {picture}: expected a file that ends in .png")
    inspected = inspect(source, overrides, model)
    cutoff_len = inspected.settings.cutoff_len
    cutoffs = sorted({max(2, round(cutoff_len * factor)) for factor in _CUTOFFS})
    rows, packing = inspected.request.rows(_log), inspected.settings.is_packed
    with counting("tokenizing", None) as advance:
        stats = measure(rows, inspected.encoder, cutoffs, packing=packing, advance=advance)
    if picture is not None:
        plot(stats, cutoff_len, picture)
    if as_json:
        _print_json(stats_json(stats))
    else:
        show_stats(stats, cutoff_len, Console())


def check_source(source: str, overrides: Sequence[str], model: str | None, as_json: bool) -> bool:
    """Print what is wrong with a data set, and with the config's eval_dataset; False if training would suffer."""
    inspected = inspect(source, overrides, model)
    settings, held_out = inspected.settings, held_out_request(inspected.settings)
    if held_out is not None:
        log_notes(held_out.found.notes)
    with counting("checking", None) as advance:
        report = check(
            inspected.request, inspected.encoder, held_out, say=_log, val_size=settings.val_size, advance=advance
        )
    if as_json:
        _print_json(check_json(report))
    else:
        show_check(report, Console())
    return report.is_sound


def _log(note: Note) -> None:
    log_notes([note])


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _tokenizer_folder(settings: Settings) -> Path:
    """A folder as given, since no weights are needed here; anything else is the name of a model."""
    name = settings.tokenizer_name_or_path or settings.model_name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return (locate_shape if settings.train_from_scratch else resolve_model)(name, settings.hub).path


def _embedding_rows(settings: Settings, folder: Path) -> int | None:
    """Those of the model whose tokenizer this is; another tokenizer must fit as a whole, which training checks."""
    config = {} if settings.tokenizer_name_or_path is not None else read_json(folder / "config.json")
    return embedding_rows({**config, **settings.model_overrides})


def _is_config(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _settings(source: str, overrides: Sequence[str], model: str | None) -> Settings:
    named = [f"model_name_or_path={model}"] if model is not None else []
    if _is_config(source):
        return load_config(Path(source), [*overrides, *named])
    given = [*overrides, *named]
    defaults = {"model_name_or_path": DEFAULT_MODEL, "dataset": source, "output_dir": "."}
    named_keys = overridden_keys(given)
    return load_config(None, [*(f"{key}={value}" for key, value in defaults.items() if key not in named_keys), *given])
