"""A data file or a training config in, one example as the trainer sees it out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from macft.config.load import load_settings
from macft.config.settings import Settings
from macft.data.dataset import read_examples
from macft.data.preview import preview, preview_json
from macft.data.template import load_template, template_folder
from macft.data.tokenizer import load_tokenizer
from macft.weights.locate import locate_adapter, locate_model

DEFAULT_MODEL = "smollm2-135m"


def preview_source(source: str, overrides: Sequence[str], row: int, model: str | None, as_json: bool) -> None:
    """Print example `row` of a data set, or of a config's data set, to standard output."""
    settings = _settings(source, overrides, model)
    folder = locate_model(settings.model_name_or_path).path
    tokenizer = load_tokenizer(folder)
    adapter = settings.adapter_name_or_path
    source_folder = template_folder(folder, locate_adapter(adapter) if adapter is not None else None)
    template = load_template(source_folder, tokenizer.special_map, settings.template)
    examples = read_examples(settings.dataset, settings.dataset_dir, settings.max_samples)
    show = partial(
        preview_json if as_json else partial(preview, console=Console()),
        cutoff_len=settings.cutoff_len,
        train_on_prompt=settings.train_on_prompt,
        mask_history=settings.mask_history,
    )
    shown = show(examples, row, tokenizer, template)
    if as_json:
        sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")


def _settings(source: str, overrides: Sequence[str], model: str | None) -> Settings:
    named = [f"model_name_or_path={model}"] if model is not None else []
    if Path(source).suffix in (".yaml", ".yml"):
        return load_settings(Path(source), [*overrides, *named])
    defaults = [f"model_name_or_path={DEFAULT_MODEL}", f"dataset={source}", "output_dir=."]
    return load_settings(None, [*defaults, *overrides, *named])
