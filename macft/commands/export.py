"""Define `macft export merged`, `gguf` and `ollama`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from macft.commands.options import LAYOUT, PATH, export_template_option, merged_adapters_option, verify_logits_option
from macft.commands.output import say_model
from macft.errors import UsageError
from macft.text import size

if TYPE_CHECKING:
    from macft.gguf.writing.writer import Written

# said here too, as help must not wait for the import of what quantizes; a test compares
QUANT_NAMES = "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, q3_k_m"
_VERIFY = click.option(
    "--verify/--no-verify",
    default=None,
    help="Load the file in llama.cpp and compare it with its source. Default: where xllamacpp is installed.",
)


@click.group()
def export() -> None:
    """Write models that other programs load."""


@export.command("merged")
@click.argument("model")
@merged_adapters_option(required=True)
@click.option("--output", type=PATH, metavar="DIR", required=True, help="The folder to write; must not exist.")
@click.option("--to", "to", type=LAYOUT, default="hf", show_default=True, help="The layout to write.")
@click.option("--bits", type=int, help="Quantize the result to so many bits, 2 to 8, in groups of 64 (MLX only).")
@click.option("--requantize", is_flag=True, help="Quantize the result as the base is (MLX only).")
@verify_logits_option
def merged(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    to: Literal["hf", "mlx"],
    bits: int | None,
    requantize: bool,
    verify: bool,
) -> None:
    """Merge adapters into MODEL and write the whole model: a folder that needs no adapter."""
    from macft.api import conversions

    conversions.export_merged(model, output, adapters=adapters, to=to, bits=bits, requantize=requantize, verify=verify)
    say_model(output, to)


@export.command("gguf")
@click.argument("model")
@merged_adapters_option(required=False)
@click.option("--output", type=PATH, metavar="FILE", required=True, help="The .gguf file to write; must not exist.")
@click.option("--quant", "quants", help=f"One or more, with commas: {QUANT_NAMES}. Default: q8_0.")
@click.option("--adapter-only", is_flag=True, help="Write only the adapter, for llama.cpp's --lora, in float32.")
@export_template_option
@_VERIFY
def gguf(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    quants: str | None,
    adapter_only: bool,
    template: str | None,
    verify: bool | None,
) -> None:
    """Write MODEL, adapters merged, as a GGUF file for llama.cpp in one pass; several --quant give several files."""
    from macft.api import exports

    if adapter_only:
        given = {"--quant": quants, "--template": template, "--verify": verify or None}
        _check_adapter_only([name for name, value in given.items() if value is not None], adapters)
        report = exports.export_gguf_adapter(model, output, adapter=adapters[0])
        click.echo(f"{_line(report.files[0])}; use it: llama-server -m BASE.gguf --lora {output}")
        return
    chosen = "q8_0" if quants is None else quants
    report = exports.export_gguf(model, output, adapters=adapters, quants=chosen, template=template, verify=verify)
    for written in report.files:
        click.echo(_line(written))


def _check_adapter_only(without_effect: list[str], adapters: tuple[str, ...]) -> None:
    if without_effect:
        raise UsageError(
            "--adapter-only writes only the adapter, in float32, and compares it with nothing; "
            f"{', '.join(without_effect)} would have no effect: leave out the one or the other"
        )
    if len(adapters) != 1:
        raise UsageError("--adapter-only writes one adapter: give --adapter once")


def _line(written: Written) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(written.kinds.items()))
    return f"{written.path}: {written.quant}, {size(written.nbytes)} ({kinds})"


@export.command("ollama")
@click.argument("model")
@merged_adapters_option(required=False)
@click.option("--output", type=PATH, metavar="DIR", required=True, help="The folder to write; must not exist.")
@click.option("--name", help="What Ollama will call it. Default: from the model's and the adapter's name.")
@click.option("--quant", default="q4_k_m", show_default=True, help=f"One of {QUANT_NAMES}.")
@click.option("--system", metavar="TEXT", help="A system prompt for every conversation; by default there is none.")
@click.option("--create", is_flag=True, help="Make it a model of the Ollama that runs here (OLLAMA_HOST).")
@export_template_option
@_VERIFY
def ollama(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    name: str | None,
    quant: str,
    system: str | None,
    create: bool,
    template: str | None,
    verify: bool | None,
) -> None:
    """Write MODEL, adapters merged, as a folder for `ollama create`: the GGUF, a Modelfile, what was proven."""
    from macft.api import exports
    from macft.ollama.client import check_server
    from macft.ollama.report import report_lines

    if create:
        check_server()
    report = exports.export_ollama(
        model, output, adapters=adapters, name=name, quant=quant, system=system, template=template, verify=verify
    )
    for line in report_lines(report):
        click.echo(line)
    if create:
        created = exports.create_in_ollama(report)
        click.echo(f"created in Ollama {created.version} at {created.url}; talk to it: ollama run {created.name}")
