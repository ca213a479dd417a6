"""Define `macft train`."""

from __future__ import annotations

import click

from macft.commands.options import KEYS_AS_OPTIONS, config_and_overrides, train_backend_option


@click.command(context_settings=KEYS_AS_OPTIONS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.yaml] [key=value | --key value]...")
@train_backend_option
@click.option("--dry-run", is_flag=True, help="Read all data, train two steps on the longest rows, keep nothing.")
def train(arguments: tuple[str, ...], backend: str | None, dry_run: bool) -> None:
    """Fine-tune as CONFIG.yaml says; key=value overrides a key of it."""
    from macft.config.load import load_config

    config, overrides = config_and_overrides(arguments, "train")
    if backend is not None:
        overrides.append(f"backend={backend}")
    settings = load_config(config, overrides)
    # only now, so that an error in the configuration shows at once
    from macft.training import dry_run as trial
    from macft.training import run

    click.echo(trial.dry_run(settings) if dry_run else run.train(settings))
