"""A data file or a training config in, one example or pair as the trainer sees it out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from macft.config.load import load_settings, parse_overrides
from macft.config.settings import ALIASES, Settings
from macft.data.dataset import holds_pairs, read_examples, read_pairs
from macft.data.preview import preview, preview_json, preview_pair, preview_pair_json
from macft.data.template import ChatTemplate, load_template, template_folder
from macft.data.tokenizer import Tokenizer, load_tokenizer
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
    # a config says by its stage what its data are, a file by its first row
    is_silent = not _is_config(source) and "stage" not in settings.model_fields_set
    is_pair = holds_pairs(settings.dataset, settings.dataset_dir) if is_silent else settings.is_preference
    show = _pair if is_pair else _example
    shown = show(settings, row, tokenizer, template, as_json=as_json)
    if as_json:
        sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")


def _pair(
    settings: Settings, row: int, tokenizer: Tokenizer, template: ChatTemplate, *, as_json: bool
) -> dict[str, Any] | None:
    pairs = read_pairs(settings.dataset, settings.dataset_dir, settings.max_samples)
    if as_json:
        return preview_pair_json(pairs, row, tokenizer, template, cutoff_len=settings.cutoff_len)
    preview_pair(pairs, row, tokenizer, template, cutoff_len=settings.cutoff_len, console=Console())
    return None


def _example(
    settings: Settings, row: int, tokenizer: Tokenizer, template: ChatTemplate, *, as_json: bool
) -> dict[str, Any] | None:
    examples = read_examples(settings.dataset, settings.dataset_dir, settings.max_samples)
    show = partial(
        preview_json if as_json else partial(preview, console=Console()),
        cutoff_len=settings.cutoff_len,
        train_on_prompt=settings.train_on_prompt,
        mask_history=settings.mask_history,
    )
    return show(examples, row, tokenizer, template)


def _is_config(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _settings(source: str, overrides: Sequence[str], model: str | None) -> Settings:
    named = [f"model_name_or_path={model}"] if model is not None else []
    if _is_config(source):
        return load_settings(Path(source), [*overrides, *named])
    given = [*overrides, *named]
    defaults = {"model_name_or_path": DEFAULT_MODEL, "dataset": source, "output_dir": "."}
    named_keys = {ALIASES.get(key, key) for key in parse_overrides(given)}
    return load_settings(
        None, [*(f"{key}={value}" for key, value in defaults.items() if key not in named_keys), *given]
    )
