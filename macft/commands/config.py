"""Define `macft config explain`."""

from __future__ import annotations

import json
import logging

import click

from macft.commands.options import KEYS_AS_OPTIONS, config_and_overrides, json_option


@click.group()
def config() -> None:
    """Look at configurations."""


@config.command("explain", context_settings=KEYS_AS_OPTIONS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG.yaml [key=value | --key value]...")
@json_option
def explain(arguments: tuple[str, ...], as_json: bool) -> None:
    """Every value that CONFIG.yaml gives a run, and where it came from."""
    from rich.console import Console

    from macft.config.explain import as_json as to_json
    from macft.config.explain import show
    from macft.config.load import load

    path, overrides = config_and_overrides(arguments, "config explain")
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
