"""A model folder in HF or MLX layout in; a new folder with the same model in the layout asked for out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macft.errors import ModelError, UsageError
from macft.files import new_file, write_text
from macft.weights.lazy import Array, LazyTensor
from macft.weights.mlx_layout import hf_config, layout_of, lost_in_mlx, mlx_config, to_hf, to_mlx
from macft.weights.mlx_layout_rules import SHIFT_NORMS, is_shifted_norm, shift
from macft.weights.quantize_model import check_quantization, quantize
from macft.weights.safetensors_file import open_safetensors
from macft.weights.source import Layout, Source, open_model
from macft.weights.stream import TensorSlot, write_safetensors
from macft.weights.writer import SUMS, write_model

# Norms as the HF layout has them, beside the weights of an MLX folder, where adding one lost their last digits.
NORMS = "hf_norms.safetensors"


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion found, and the names of tensors for which the new layout has no place."""

    came_as: Layout
    lost: tuple[str, ...]


def convert_model(
    folder: Path, destination: Path, *, to: Layout, bits: int | None = None, group_size: int = 64
) -> ConvertReport:
    """Write the model of `folder` to the new folder `destination`, in the layout `to`.

    A quantized source comes out dequantized unless `bits` (MLX only) asks for quantization anew. From HF to
    MLX and back every tensor is the same to the bit, but for those of `ConvertReport.lost`. Raises
    UsageError for bits with HF, ModelError for a broken source, a model type without a known MLX layout, a
    destination that exists and a disk without room; nothing is left behind then.
    """
    if bits is not None:
        if to != "mlx":
            raise UsageError("bits quantizes to MLX's own format; leave it out, or convert to mlx")
        check_quantization(bits, group_size)
    source = open_model(folder)
    config, tensors = source.config, source.tensors
    lost: list[str] = []
    norms: dict[str, Array] = {}
    if source.layout == "hf" and to == "mlx":
        lost, norms = lost_in_mlx(config, tensors), _inexact_norms(source)
        config, tensors = mlx_config(config, tensors), to_mlx(config, tensors)
    elif source.layout == "mlx" and to == "hf":
        config, tensors = hf_config(config, tensors), to_hf(config, tensors)
        tensors = _with_norms(folder, tensors)
    if bits is not None:
        config, tensors = quantize(config, tensors, bits, group_size)
    write_model(destination, config, tensors, source_folder=folder, layout=to)
    if norms:
        _write_norms(destination, norms)
    return ConvertReport(source.layout, tuple(lost))


def _flat_name(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)


def _is_exact(norm: Array) -> bool:
    """Whether taking one from what MLX stores gives this norm again."""
    return np.array_equal(shift(shift(norm, 1), -1), norm)


def _inexact_norms(source: Source) -> dict[str, Array]:
    if SHIFT_NORMS not in layout_of(source.config).rules:
        return {}
    lost = set(lost_in_mlx(source.config, source.tensors))
    norms = {t.name: t.read() for t in source.tensors if is_shifted_norm(t) and t.name not in lost}
    return {_flat_name(name): norm for name, norm in norms.items() if not _is_exact(norm)}


def _write_norms(destination: Path, norms: dict[str, Array]) -> None:
    slots = [TensorSlot(name, norm.dtype, norm.shape) for name, norm in norms.items()]
    try:
        with new_file(destination / NORMS) as temporary:
            write_safetensors(temporary, slots, norms.values())
        digest = hashlib.sha256((destination / NORMS).read_bytes()).hexdigest()
        lines = (destination / SUMS).read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(destination / SUMS, "".join(sorted([*lines, f"{digest}  {NORMS}\n"], key=_name_in_sums)))
    except BaseException as error:
        shutil.rmtree(destination, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ModelError(
            f"{destination}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from None


def _name_in_sums(line: str) -> str:
    return line.partition("  ")[2]


def _with_norms(folder: Path, tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """HF-layout tensors with the digits of their norms that the MLX layout had lost, where the folder kept them."""
    path = folder / NORMS
    kept = {tensor.name: tensor for tensor in open_safetensors(path).tensors} if path.exists() else {}
    return [_exact_norm(tensor, kept[tensor.name]) if tensor.name in kept else tensor for tensor in tensors]


def _exact_norm(found: LazyTensor, kept: LazyTensor) -> LazyTensor:
    """The kept numbers where they are what the found ones were rounded from; the others were changed since."""
    if (found.dtype, found.shape) != (kept.dtype, kept.shape):
        return found

    def read() -> Array:
        now, before = found.read(), kept.read()
        return np.where(shift(shift(before, 1), -1) == now, before, now)

    return LazyTensor(found.name, found.dtype, found.shape, read)
