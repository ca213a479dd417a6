"""Define `macft convert adapter` and `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from macft.commands.options import LAYOUT, PATH, verify_logits_option
from macft.commands.output import say_model
from macft.files import folder_size
from macft.text import size


@click.group()
def convert() -> None:
    """Convert weights between PEFT, MLX, Hugging Face, GGUF and litgpt."""


@convert.command("adapter")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=PATH)
@click.option("--to", "to", type=click.Choice(["mlx", "peft"]), required=True, help="Whose format to write.")
@click.option("--base", metavar="MODEL", help="The model it was trained on: the adapter is then checked against it.")
@verify_logits_option
def convert_adapter(source: str, destination: Path, to: Literal["mlx", "peft"], base: str | None, verify: bool) -> None:
    """Convert the adapter folder SRC, of PEFT or of mlx-lm, into the other's format as DST."""
    from macft.api import conversions

    conversions.convert_adapter(source, destination, to=to, base=base, verify=verify)
    kind, use = {
        "peft": ("a PEFT adapter", "PeftModel.from_pretrained, vLLM or macft chat --adapter"),
        "mlx": ("an mlx-lm adapter", "mlx_lm.generate --adapter-path or macft chat --adapter"),
    }[to]
    click.echo(f"{destination}: {kind}, {size(folder_size(destination))}; use it with {use}")


@convert.command("model")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=PATH)
@click.option("--to", "to", type=LAYOUT, required=True, help="The layout to write.")
@click.option("--bits", type=int, help="Quantize to so many bits, 2 to 8 (MLX only).")
@click.option("--group-size", type=int, help="Numbers that share a scale when quantized; 64 if not given.")
@verify_logits_option
def convert_model(
    source: str, destination: Path, to: Literal["hf", "mlx"], bits: int | None, group_size: int | None, verify: bool
) -> None:
    """Convert the model SRC into another layout as the folder DST.

    SRC is a folder in HF or MLX layout, a hub id, a .gguf file, a litgpt checkpoint folder or `smollm2-135m`.
    """
    from macft.api import conversions

    conversions.convert_model(source, destination, to=to, bits=bits, group_size=group_size, verify=verify)
    say_model(destination, to)
