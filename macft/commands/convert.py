"""The commands that convert and merge weights: `macft convert adapter|model` and `macft export merged`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal

import click

from macft.errors import UsageError

if TYPE_CHECKING:
    from macft.weights.adapters.peft import Adapter

logger = logging.getLogger("macft")

_LAYOUT = click.Choice(["hf", "mlx"])
_LAYOUT_NAMES = {"hf": "Hugging Face layout", "mlx": "MLX layout"}
_FOLDER = click.Path(path_type=Path)
_VERIFY = click.option(
    "--verify", is_flag=True, help="Load source and result with an installed engine and compare their logits."
)
_GROUP_SIZE = 64
_SECONDS_BETWEEN_LINES = 30.0


@click.group()
def convert() -> None:
    """Convert weights between PEFT, MLX, Hugging Face, GGUF and litgpt."""


@click.group()
def export() -> None:
    """Write models that other programs load."""


@convert.command("adapter")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=_FOLDER)
@click.option("--to", "to", type=click.Choice(["mlx", "peft"]), required=True, help="Whose format to write.")
@click.option("--base", metavar="MODEL", help="The model it was trained on: the adapter is then checked against it.")
@_VERIFY
def convert_adapter_command(
    source: str, destination: Path, to: Literal["mlx", "peft"], base: str | None, verify: bool
) -> None:
    """Convert the adapter folder SRC, of PEFT or of mlx-lm, into the other's format as DST."""
    from macft.convert.adapter import convert_adapter
    from macft.models.locate import resolve_adapter, resolve_model
    from macft.weights.adapters.formats import read_any_adapter
    from macft.weights.model_config import read_config

    _check_new(destination)
    if verify and base is None:
        raise UsageError("--verify loads the adapter on its model: name it with --base")
    model = resolve_model(base) if base is not None else None
    folder = resolve_adapter(source)
    if verify:
        _check_engine(folder)
    for note in convert_adapter(folder, destination, to, model):
        logger.warning(note)
    if verify and model is not None:
        from macft.verify.logits import Subject, exact
        from macft.verify.logits import verify as compare

        config = read_config(model.path)
        before, after = (read_any_adapter(path, config) for path in (folder, destination))
        prefers = "mlx" if to == "mlx" else "torch"
        logger.info(compare(Subject(model.path, (before,)), Subject(model.path, (after,)), exact(), prefers=prefers))
    kind, use = {
        "peft": ("a PEFT adapter", "PeftModel.from_pretrained, vLLM or macft chat --adapter"),
        "mlx": ("an mlx-lm adapter", "mlx_lm.generate --adapter-path or macft chat --adapter"),
    }[to]
    click.echo(f"{destination}: {kind}, {_size(destination)}; use it with {use}")


@convert.command("model")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=_FOLDER)
@click.option("--to", "to", type=_LAYOUT, required=True, help="The layout to write.")
@click.option("--bits", type=int, help="Quantize to so many bits, 2 to 8 (MLX only).")
@click.option("--group-size", type=int, help=f"Numbers that share a scale when quantized; {_GROUP_SIZE} if not given.")
@_VERIFY
def convert_model_command(
    source: str, destination: Path, to: Literal["hf", "mlx"], bits: int | None, group_size: int | None, verify: bool
) -> None:
    """Convert the model SRC into another layout as the folder DST.

    SRC is a folder in HF or MLX layout, a hub id, a .gguf file, a litgpt checkpoint folder or `smollm2-135m`.
    """
    from macft.convert.model import convert_model
    from macft.models.locate import resolve_model
    from macft.weights.layouts.litgpt import is_litgpt

    _check_new(destination)
    if group_size is not None and bits is None:
        raise UsageError("--group-size does nothing without --bits; give both or neither")
    path = Path(source).expanduser()
    if verify:
        _check_engine(path)
    folder = path if is_litgpt(path) else resolve_model(source).path
    with _watched(destination, f"converting {source}"):
        size = _GROUP_SIZE if group_size is None else group_size
        report = convert_model(folder, destination, to=to, bits=bits, group_size=size)
    if report.came_as == "litgpt":
        logger.info("a litgpt checkpoint, now model type %s", report.model_type)
    if report.lost:
        more = f" and {len(report.lost) - 5} more" if len(report.lost) > 5 else ""
        logger.warning("%s has no place for %s%s", _LAYOUT_NAMES[to], ", ".join(report.lost[:5]), more)
    for note in report.notes:
        logger.warning(note)
    if verify:
        prefers = "mlx" if "mlx" in (to, report.came_as) else "auto"
        _verify_model(folder, destination, is_rounded=report.was_quantized, prefers=prefers)
    _say_model(destination, to)


@export.command("merged")
@click.argument("model")
@click.option(
    "--adapter",
    "adapters",
    metavar="DIR",
    multiple=True,
    required=True,
    help="An adapter folder of PEFT or mlx-lm; may be repeated, and is merged in this order.",
)
@click.option("--output", type=_FOLDER, metavar="DIR", required=True, help="The folder to write; must not exist.")
@click.option("--to", "to", type=_LAYOUT, default="hf", show_default=True, help="The layout to write.")
@click.option(
    "--bits", type=int, help=f"Quantize the result to so many bits, 2 to 8, in groups of {_GROUP_SIZE} (MLX only)."
)
@click.option("--requantize", is_flag=True, help="Quantize the result as the base is (MLX only).")
@_VERIFY
def export_merged_command(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    to: Literal["hf", "mlx"],
    bits: int | None,
    requantize: bool,
    verify: bool,
) -> None:
    """Merge adapters into MODEL and write the whole model: a folder that needs no adapter."""
    from macft.convert.merged import export_merged
    from macft.models.locate import resolve_adapter, resolve_model
    from macft.weights.adapters.formats import read_any_adapter
    from macft.weights.model_config import read_config

    _check_new(output)
    base = resolve_model(model)
    if verify:
        _check_engine(base.path)
    config = read_config(base.path)
    read = [read_any_adapter(resolve_adapter(adapter), config, with_saved=True) for adapter in adapters]
    with _watched(output, f"merging into {model}"):
        report = export_merged(base, read, output, layout=to, bits=bits, requantize=requantize)
    for note in report.notes:
        logger.warning(note)
    logger.info("merged %d modules", report.modules)
    if verify:
        _verify_model(base.path, output, tuple(read), is_rounded=True, prefers="mlx" if to == "mlx" else "auto")
    _say_model(output, to)


def _check_new(destination: Path) -> None:
    if destination.exists():
        raise UsageError(f"{destination}: exists already; name a folder that does not, or remove this one")


def _check_engine(source: Path) -> None:
    from macft.verify.logits import check_engine

    check_engine(source)


def _verify_model(
    source: Path, result: Path, adapters: tuple[Adapter, ...] = (), *, is_rounded: bool, prefers: str
) -> None:
    from macft.verify.logits import Subject, tolerance_of, verify

    tolerance = tolerance_of(result, is_rounded=is_rounded)
    logger.info(verify(Subject(source, adapters), Subject(result), tolerance, prefers=prefers))


def _say_model(folder: Path, to: str) -> None:
    can_talk = (
        (folder / "tokenizer.json").exists() or any(folder.glob("vocab.*")) or any(folder.glob("tokenizer.model"))
    )
    use = f"talk to it: macft chat {folder}" if can_talk else "it has no tokenizer, as its source had none"
    click.echo(f"{folder}: a whole model in {_LAYOUT_NAMES[to]}, {_size(folder)}; {use}")


def _size(folder: Path) -> str:
    return _gigabytes(_bytes_of(folder))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def _watched(destination: Path, label: str) -> Iterator[None]:
    """Show how much is written while the block runs: a line that changes on a terminal, one now and then in a log."""
    stop = Event()
    thread = Thread(target=_watch, args=(destination, label, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(destination: Path, label: str, stop: Event) -> None:
    is_terminal = sys.stderr.isatty()
    said, is_shown = time.monotonic(), False
    while not stop.wait(0.5):
        if not is_terminal and time.monotonic() - said < _SECONDS_BETWEEN_LINES:
            continue
        said = time.monotonic()
        text = f"{label}: {_gigabytes(_written(destination))} written"
        if is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            is_shown = True
        else:
            logger.info(text)
    if is_shown:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _written(destination: Path) -> int:
    """Bytes in the hidden folder that becomes `destination`; files that vanish meanwhile count as none."""
    try:
        return sum(_bytes_of(folder) for folder in destination.parent.glob(f".{destination.name}.*.tmp"))
    except OSError:
        return 0
