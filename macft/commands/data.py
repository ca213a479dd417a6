"""Define `macft data preview`, `stats` and `check`."""

from __future__ import annotations

from pathlib import Path

import click

from macft.commands.options import KEYS_AS_OPTIONS, PATH, data_options


@click.group()
def data() -> None:
    """Look at training data the way the trainer sees it.

    DATASET is a file, a name in the dataset_info.json of dataset_dir, or a data set on a hub.
    """


@data.command("preview", context_settings=KEYS_AS_OPTIONS)
@data_options
@click.option("--row", type=click.IntRange(0), default=0, show_default=True, help="Which row, from 0.")
def preview(source: str, overrides: tuple[str, ...], model: str | None, as_json: bool, row: int) -> None:
    """Show one row as it is trained on: template, trained tokens colored, counts."""
    from macft.inspection.dataset import preview_source

    preview_source(source, overrides, row, model, as_json)


@data.command("stats", context_settings=KEYS_AS_OPTIONS)
@data_options
@click.option("--plot", type=PATH, metavar="FILE.png", help="Draw the lengths into a picture.")
def stats(source: str, overrides: tuple[str, ...], model: str | None, as_json: bool, plot: Path | None) -> None:
    """Show how many rows and tokens there are, how long rows are, and what cutoff_len takes of them."""
    from macft.inspection.dataset import stats_source

    stats_source(source, overrides, model, plot, as_json)


@data.command("check", context_settings=KEYS_AS_OPTIONS)
@data_options
def check(source: str, overrides: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Find rows that training would refuse, leave out, or learn something unwanted from.

    The exit code is 1 if a row is invalid or would be left out.
    """
    from macft.inspection.dataset import check_source

    if not check_source(source, overrides, model, as_json):
        raise click.exceptions.Exit(1)
