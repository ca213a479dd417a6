"""Load configurations in tests, and take the message of those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from macft.config.load import load_config
from macft.config.settings import Settings
from macft.errors import ConfigError

REQUIRED = ["model_name_or_path=m", "dataset=d.jsonl", "output_dir=o"]


def load(*overrides: str) -> Settings:
    return load_config(None, [*REQUIRED, *overrides])


def problem(*overrides: str) -> str:
    """The only problem of these overrides, without the headline."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    headline, *problems = str(caught.value).split("\n")
    assert headline == "1 problem in the configuration" and len(problems) == 1
    return problems[0].strip()


def from_file(folder: Path, text: str, *overrides: str) -> Settings:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_file(folder, text, *overrides)
    return str(caught.value).replace(str(folder), "DIR")


YAML = "model_name_or_path: m\ndataset: d.jsonl\noutput_dir: o\n"
