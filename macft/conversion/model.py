"""Convert a model folder (HF layout, MLX layout or litgpt) into another layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from macft.errors import UsageError
from macft.weights.layouts.litgpt import is_litgpt, litgpt_notes, open_litgpt
from macft.weights.layouts.mlx import as_hf, layout_of, lost_in_mlx, mlx_config, to_mlx
from macft.weights.layouts.mlx_rules import SHIFT_NORMS, is_shifted_norm, shift
from macft.weights.quantization.model import check_quantization, quantize
from macft.weights.source import Source, WeightLayout, open_model
from macft.weights.tensors.lazy import Array, LazyTensor, from_array
from macft.weights.tensors.safetensors import open_safetensors
from macft.weights.writer import write_model

# Norms of the HF layout, stored next to the weights of an MLX folder, where adding one lost their last digits.
NORMS = "hf_norms.safetensors"


@dataclass(frozen=True)
class ConvertReport:
    """What was converted: `lost` names tensors for which the new layout has no place, `notes` are for the user."""

    came_as: WeightLayout | Literal["litgpt"]
    model_type: str
    was_quantized: bool
    lost: tuple[str, ...]
    notes: tuple[str, ...]


def convert_model(
    folder: Path, destination: Path, *, to: WeightLayout, bits: int | None = None, group_size: int = 64
) -> ConvertReport:
    """Write the model of `folder` to the new folder `destination`, in the layout `to`.

    A quantized source comes out dequantized unless `bits` (MLX only) quantizes it again. From HF to MLX
    and back every tensor is the same to the bit, except those in `ConvertReport.lost`. Raises
    UsageError for bits with HF, ModelError for a broken source, a model type without a known MLX layout, a
    destination that exists and a disk that is too full; nothing is left behind then.
    """
    if bits is not None:
        if to != "mlx":
            raise UsageError("--bits quantizes to MLX's own format: add --to mlx, or leave --bits out")
        check_quantization(bits, group_size)
    is_lit = is_litgpt(folder)
    source = open_litgpt(folder) if is_lit else open_model(folder)
    config, tensors = source.config, source.tensors
    lost: list[str] = []
    norms: list[LazyTensor] = []
    if source.layout == "hf" and to == "mlx":
        lost = lost_in_mlx(config, tensors)
        norms = _inexact_norms(source, lost)
        config, tensors = mlx_config(config, tensors), to_mlx(config, tensors)
    elif source.layout == "mlx" and to == "hf":
        config, tensors = as_hf(source)
        tensors = _with_norms(folder, tensors)
    if bits is not None:
        config, tensors = quantize(config, tensors, bits, group_size)
    beside = {NORMS: norms} if norms else {}
    write_model(destination, config, tensors, source_folder=folder, layout=to, beside=beside)
    return ConvertReport(
        came_as="litgpt" if is_lit else source.layout,
        model_type=source.config["model_type"],
        was_quantized=source.quantization is not None or source.is_fp8,
        lost=tuple(lost),
        notes=litgpt_notes(folder) if is_lit else (),
    )


def _inexact_norms(source: Source, lost: list[str]) -> list[LazyTensor]:
    """The norms that are not restored when one is subtracted from what MLX stores."""
    if SHIFT_NORMS not in layout_of(source.config).rules:
        return []
    norms = {t.name: t.read() for t in source.tensors if is_shifted_norm(t) and t.name not in lost}
    return [
        from_array(name.replace("model.language_model.", "model.", 1), norm)
        for name, norm in norms.items()
        if not np.array_equal(shift(shift(norm, 1), -1), norm)
    ]


def _with_norms(folder: Path, tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    """HF-layout tensors with the last digits of their norms restored, where the MLX folder kept them."""
    path = folder / NORMS
    kept = {tensor.name: tensor for tensor in open_safetensors(path).tensors} if path.exists() else {}
    return [_exact_norm(tensor, kept[tensor.name]) if tensor.name in kept else tensor for tensor in tensors]


def _exact_norm(found: LazyTensor, kept: LazyTensor) -> LazyTensor:
    """The kept numbers wherever the found ones were rounded from them; the others have changed since."""
    if (found.dtype, found.shape) != (kept.dtype, kept.shape):
        return found

    def read() -> Array:
        now, before = found.read(), kept.read()
        return np.where(shift(shift(before, 1), -1) == now, before, now)

    return LazyTensor(found.name, found.dtype, found.shape, read)
