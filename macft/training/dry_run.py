"""Try a training run: do everything it does, in two steps, and keep nothing."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from macft.config.settings import Settings
from macft.errors import StoppedError, UsageError
from macft.training.checks.output_dir import check_output_dir
from macft.training.log.report import read_log
from macft.training.run import train_into

logger = logging.getLogger("macft")


def dry_run(settings: Settings) -> str:
    """Do all that a run does in two steps, the first on the longest rows, in a folder that is deleted afterwards.

    Returns in a line what was learned from it.
    """
    try:
        check_output_dir(settings, Path(settings.output_dir).expanduser())
    except UsageError as error:
        logger.warning(error)
    with tempfile.TemporaryDirectory(prefix="macft-dry-run-") as folder:
        short = settings.model_copy(
            update={
                "output_dir": folder,
                "max_steps": 2,
                # the longest rows of a stream are not known
                "group_by_length": not settings.streaming,
                "logging_steps": 1,
                "eval_steps": settings.steps_per_evaluation,
                "report_to": "none",
                "resume_from_checkpoint": False,
            }
        )
        try:
            train_into(Path(folder), short)
        except StoppedError:
            raise StoppedError("stopped; a dry run keeps nothing") from None
        longest = read_log(Path(folder))[0]
    seconds = longest["total_tokens"] / longest["throughput"]
    which = "" if settings.streaming else " on the longest rows"
    return f"dry run: all of it works; a step{which} takes {seconds:.1f} s"
