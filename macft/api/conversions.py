"""Convert adapters and models between formats, and merge adapters into models."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from macft.conversion.adapter import convert_adapter as convert_adapter_folder
from macft.conversion.merged import MergeReport
from macft.conversion.merged import export_merged as merge_folder
from macft.conversion.model import ConvertReport
from macft.conversion.model import convert_model as convert_model_folder
from macft.engines import BACKENDS
from macft.errors import UsageError
from macft.files import StrPath
from macft.models.locate import resolve_adapter, resolve_model
from macft.progress import watching
from macft.verify.logits import EXACT, Subject, check_engine, tolerance_of
from macft.verify.logits import verify as compare
from macft.weights.adapters.fitting import read_on
from macft.weights.adapters.formats import AdapterFormat, read_any_adapter
from macft.weights.adapters.peft import CONFIG_NAME, Adapter
from macft.weights.folder import weight_files
from macft.weights.layouts.litgpt import is_litgpt
from macft.weights.model_config import read_config
from macft.weights.source import WeightLayout

logger = logging.getLogger("macft")

GROUP_SIZE = 64
LAYOUT_NAMES = {"hf": "Hugging Face layout", "mlx": "MLX layout"}


def convert(
    source: StrPath,
    destination: StrPath,
    *,
    to: Literal["hf", "mlx", "peft"],
    base: StrPath | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    verify: bool = False,
) -> Path:
    """Convert a model or an adapter and return `destination`, a new folder that is whole or not there.

    The source is an adapter when `to` is peft, `base` is given or the folder holds an adapter_config.json and no model:
    see `convert_adapter`. Anything else is a model: see `convert_model`, which `bits` and `group_size` are for.
    """
    folder = Path(source).expanduser()
    holds_adapter = (folder / CONFIG_NAME).is_file() and not weight_files(folder)
    is_adapter = to == "peft" or base is not None or holds_adapter
    if not is_adapter:
        assert to != "peft"
        convert_model(source, destination, to=to, bits=bits, group_size=group_size, verify=verify)
        return Path(destination)
    if bits is not None or group_size is not None:
        raise UsageError(f"{source}: an adapter is not quantized; leave out bits and group_size")
    if to == "hf":
        raise UsageError(f"{source}: an adapter is converted to peft or mlx, not to hf")
    return convert_adapter(source, destination, to=to, base=base, verify=verify)


def convert_adapter(
    source: StrPath, destination: StrPath, *, to: AdapterFormat, base: StrPath | None = None, verify: bool = False
) -> Path:
    """Convert the adapter `source`, of PEFT or mlx-lm, into the other's format and return the new folder.

    `base` is the model that it was trained on: every tensor is then checked against it. `verify` loads both on the
    base with an installed engine and compares their logits. Raises UsageError when `destination` exists or there is
    nothing to convert, ModelError for what does not fit, VerifyError when the logits differ.
    """
    new = _new(destination)
    if verify and base is None:
        raise UsageError("--verify loads the adapter on its model: name it with --base")
    model = resolve_model(os.fspath(base)) if base is not None else None
    folder = resolve_adapter(os.fspath(source))
    if verify:
        check_engine(folder)
    for note in convert_adapter_folder(folder, new, to, model):
        logger.warning(note)
    if verify and model is not None:
        before, after = (read_on(path, model.path) for path in (folder, new))
        prefers = next(name for name, engine in BACKENDS.items() if engine.adapter_format == to)
        logger.info(compare(Subject(model.path, (before,)), Subject(model.path, (after,)), EXACT, prefers=prefers))
    return new


def convert_model(
    source: StrPath,
    destination: StrPath,
    *,
    to: WeightLayout,
    bits: int | None = None,
    group_size: int | None = None,
    verify: bool = False,
) -> ConvertReport:
    """Convert the model `source` into the layout hf or mlx as a new folder, and report what was found.

    The source is a folder in HF or MLX layout, a hub id, a .gguf file, a litgpt checkpoint folder or `smollm2-135m`.
    `bits` (2 to 8, MLX only) quantizes in groups of `group_size` (64) numbers. `verify` compares the logits of source
    and result with an installed engine. Raises UsageError, ModelError or VerifyError.
    """
    new = _new(destination)
    if group_size is not None and bits is None:
        raise UsageError("--group-size does nothing without --bits; give both or neither")
    path = Path(source).expanduser()
    if verify:
        check_engine(path)
    folder = path if is_litgpt(path) else resolve_model(os.fspath(source)).path
    with watching(new, f"converting {source}"):
        size = GROUP_SIZE if group_size is None else group_size
        report = convert_model_folder(folder, new, to=to, bits=bits, group_size=size)
    if report.came_as == "litgpt":
        logger.info("a litgpt checkpoint, now model type %s", report.model_type)
    if report.lost:
        more = f" and {len(report.lost) - 5} more" if len(report.lost) > 5 else ""
        logger.warning("%s has no place for %s%s", LAYOUT_NAMES[to], ", ".join(report.lost[:5]), more)
    for note in report.notes:
        logger.warning(note)
    if verify:
        prefers = "mlx" if "mlx" in (to, report.came_as) else "auto"
        _verify_model(folder, new, is_rounded=report.was_quantized, prefers=prefers)
    return report


def export_merged(
    model: StrPath,
    output: StrPath,
    *,
    adapters: Sequence[StrPath],
    to: WeightLayout = "hf",
    bits: int | None = None,
    requantize: bool = False,
    verify: bool = False,
) -> MergeReport:
    """Merge adapters into a model, in order, and write the whole model as the new folder `output`.

    `bits` (2 to 8, MLX only) quantizes the result; `requantize` quantizes it as the base is. `verify` compares the
    logits of base and adapters with those of the result. Raises UsageError, ModelError or VerifyError.
    """
    new = _new(output)
    base = resolve_model(os.fspath(model))
    if verify:
        check_engine(base.path)
    read = read_adapters(adapters, base.path)
    with watching(new, f"merging into {model}"):
        report = merge_folder(base, read, new, layout=to, bits=bits, requantize=requantize)
    for note in report.notes:
        logger.warning(note)
    logger.info("merged %d modules", report.modules)
    if verify:
        _verify_model(base.path, new, read, is_rounded=True, prefers="mlx" if to == "mlx" else "auto")
    return report


def read_adapters(adapters: Sequence[StrPath], base: Path) -> tuple[Adapter, ...]:
    """Read the adapters to merge into the model folder `base`, with all the tensors they saved."""
    config = read_config(base)
    return tuple(read_any_adapter(resolve_adapter(os.fspath(name)), config, with_saved=True) for name in adapters)


def _new(destination: StrPath) -> Path:
    path = Path(destination)
    if path.exists():
        raise UsageError(f"{path}: exists already; name a folder that does not, or remove this one")
    return path


def _verify_model(
    source: Path, result: Path, adapters: tuple[Adapter, ...] = (), *, is_rounded: bool, prefers: str
) -> None:
    tolerance = tolerance_of(result, is_rounded=is_rounded)
    logger.info(compare(Subject(source, adapters), Subject(result), tolerance, prefers=prefers))
