"""Check that a run may write to its folder, and clear an older run out of it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from macft.config.settings import Settings
from macft.errors import UsageError
from macft.training.checkpoint import list_checkpoints
from macft.training.log.plots import PICTURES
from macft.training.model_files import FULL_WEIGHTS, RUN_FILES
from macft.training.prepare import Prepared


def check_output_dir(settings: Settings, output_dir: Path) -> None:
    """Raise UsageError unless the run may write here: a folder, writable, without another run."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"output_dir: {output_dir} is a file; give a directory")
    _check_writable(output_dir)
    if settings.resume_from_checkpoint is not False or settings.overwrite_output_dir:
        return
    if any((output_dir / name).exists() for name in RUN_FILES) or any(output_dir.glob("checkpoint-*")):
        raise UsageError(
            f"output_dir: {output_dir} already holds a run; set resume_from_checkpoint=true to continue it, "
            "overwrite_output_dir=true to start again, or another output_dir"
        )


def _check_writable(output_dir: Path) -> None:
    """Make the folder and remove it again: some file systems refuse what their permissions allow."""
    absent = [path for path in (output_dir, *output_dir.absolute().parents) if not path.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(output_dir, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    for path in absent:
        with suppress(OSError):
            path.rmdir()
    if not is_writable:
        raise UsageError(f"output_dir: {output_dir} cannot be written; give another directory")


def check_base_is_safe(prepared: Prepared, output_dir: Path) -> None:
    """Raise UsageError if the run would overwrite its own base."""
    if output_dir.resolve() == prepared.base.path.resolve():
        raise UsageError(f"output_dir: {output_dir} is the folder of the base model; give another directory")


def clear_output_dir(output_dir: Path) -> None:
    """Remove an older run's files, and nothing else."""
    if (output_dir / FULL_WEIGHTS).exists():
        for name in ("config.json", "generation_config.json"):
            (output_dir / name).unlink(missing_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    for name in (*RUN_FILES, *PICTURES):
        (output_dir / name).unlink(missing_ok=True)
