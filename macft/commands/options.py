"""Define the options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from macft.engines import BACKENDS
from macft.errors import UsageError

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)
LAYOUT = click.Choice(["hf", "mlx"])
# keys of a configuration may be written as options, which click does not know
KEYS_AS_OPTIONS = {"ignore_unknown_options": True}

_BACKEND = click.Choice(["auto", *BACKENDS])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
train_backend_option = click.option("--backend", type=_BACKEND, help="Training engine; overrides the config.")
verify_logits_option = click.option(
    "--verify", is_flag=True, help="Load source and result with an installed engine and compare their logits."
)
export_template_option = click.option(
    "--template", metavar="NAME|FILE", help="The chat template. Default: the adapter's, or the model's."
)


def answer_options(command: Command) -> Command:
    """Add the options of a model that answers."""
    return _add(
        command,
        click.option("--backend", type=_BACKEND, default="auto", show_default=True),
        click.option(
            "--template", metavar="FILE", help="A Jinja chat template. Default: the adapter's, or the model's."
        ),
        click.option(
            "--quantization-bit",
            type=click.Choice(["4", "8"]),
            callback=lambda _context, _parameter, value: int(value) if value else None,
            help="Load the base in so many bits. Default: as it was for the adapter's run.",
        ),
        click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True),
    )


def data_options(command: Command) -> Command:
    """Add what names the data to look at."""
    return _add(
        command,
        click.argument("source", metavar="DATASET|CONFIG.yaml"),
        click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[key=value]..."),
        click.option("--model", help="Whose tokenizer and template. Default: the config's, or smollm2-135m."),
        json_option,
    )


def merged_adapters_option(*, required: bool) -> Callable[[Command], Command]:
    """`--adapter`, which may be repeated, for commands that merge adapters into a model."""
    return click.option(
        "--adapter",
        "adapters",
        metavar="DIR",
        multiple=True,
        required=required,
        help="An adapter folder of PEFT or mlx-lm; may be repeated, and is merged in this order.",
    )


def config_and_overrides(arguments: tuple[str, ...], command: str) -> tuple[Path | None, list[str]]:
    """Split the words of a command line into the configuration file, if one comes first, and the overrides."""
    if not arguments:
        example = "configs/quickstart.yaml" if command == "train" else "run.yaml"
        raise UsageError(f"macft {command} needs a configuration: macft {command} {example} [key=value ...]")
    overrides = list(arguments)
    is_file = not overrides[0].startswith("--") and "=" not in overrides[0]
    return (Path(overrides.pop(0)) if is_file else None), overrides


def _add(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
