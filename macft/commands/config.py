"""The command that explains a configuration: `macft config explain`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click

from macft.errors import UsageError


@click.group()
def config() -> None:
    """Look at configurations."""


@config.command("explain", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG.yaml [key=value | --key value]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(arguments: tuple[str, ...], as_json: bool) -> None:
    """Every value that CONFIG.yaml gives a run, and where it came from."""
    from rich.console import Console

    from macft.config.explain import as_json as to_json
    from macft.config.explain import show
    from macft.config.load import load

    if not arguments:
        raise UsageError("macft config explain wants a configuration: macft config explain run.yaml [key=value ...]")
    overrides = list(arguments)
    path = None
    if not overrides[0].startswith("--") and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    loaded = load(path, overrides)
    if as_json:
        click.echo(json.dumps(to_json(loaded, path), indent=2, ensure_ascii=False))
        return
    logger = logging.getLogger("macft")
    for note in loaded.notes:
        logger.info(note)
    show(loaded, path, Console())
    for warning in loaded.warnings:
        logger.warning(warning)
