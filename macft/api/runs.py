"""Load a configuration and train as it says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macft.config.load import load_settings
from macft.config.settings import Settings
from macft.files import StrPath


def load_config(path: StrPath | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Settings:
    """Read a YAML file and overrides into checked settings.

    `overrides` is a mapping of keys to values, or words as on the command line: `["max_steps=2"]`. Without `path` they
    are the whole configuration. What has no effect is logged under the name `macft`.
    Raises ConfigError, which lists every unknown key and wrong value.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items()]
    return load_settings(Path(path) if path is not None else None, overrides)


def train(settings: Settings) -> Path:
    """Train as the settings say and return the run folder, with the adapter or model, the log and the results.

    Progress goes to standard error and to the logger `macft`. Raises MacftError for what the settings, the data or the
    model make impossible, StoppedError when the user stops the run.
    """
    from macft.training.run import train as run

    return run(settings)


def dry_run(settings: Settings) -> str:
    """Do everything that a run does, with two steps, keep nothing, and return what was learned from it in a line."""
    from macft.training.dry_run import dry_run as run

    return run(settings)
