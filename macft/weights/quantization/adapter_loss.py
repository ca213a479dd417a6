"""Quantize merged weights and measure how much of the adapters that loses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from macft.weights.quantization.affine import dequantize_affine, quantize_affine, roundtrip_affine
from macft.weights.quantization.model import Parts, RowQuantizer, quantize
from macft.weights.tensors.lazy import Array, LazyTensor, cast, read_rows

Form = tuple[int, int]  # bits, group size


@dataclass(frozen=True)
class Versions:
    """One model's tensors in three versions, in the same order.

    `base` is before merging and `merged` after, both not rounded yet; `rounded` is before merging, in the types
    that will be written.
    """

    base: list[LazyTensor]
    merged: list[LazyTensor]
    rounded: list[LazyTensor]


@dataclass
class AdapterLoss:
    """For each matrix, row by row: sums of squares of what was merged, and of what quantizing lost of it [2, rows].

    Sums are set, not added to, so that a row which is quantized twice counts once.
    """

    sums: list[Array] = field(default_factory=list)

    @property
    def share(self) -> float:
        """||Q(W + D) - Q(W) - D|| / ||D||, where Q quantizes and dequantizes and D was merged; 0 if nothing was."""
        merged, lost = (sum(float(found[index].sum()) for found in self.sums) for index in (0, 1))
        return float(np.sqrt(lost / merged)) if merged else 0.0


def planned_forms(config: dict[str, Any], tensors: list[LazyTensor], form: Form) -> dict[str, Form]:
    """The modules that mlx-lm would quantize when asked for this form, each with the form it gets."""
    found, quantized = quantize(config, tensors, *form)
    modules = [t.name.removesuffix(".scales") for t in quantized if t.name.endswith(".scales")]
    settings = found["quantization"]
    return {module: _form_of(settings.get(module, settings)) for module in modules}


def quantize_merged(
    config: dict[str, Any], versions: Versions, forms: dict[str, Form], default: Form, loss: AdapterLoss
) -> tuple[dict[str, Any], list[LazyTensor]]:
    """(config, tensors) with the modules of `forms` quantized and the rest rounded.

    `loss` is filled in while the tensors are read.
    """
    settings: dict[str, Any] = {"group_size": default[1], "bits": default[0], "mode": "affine"}
    result = []
    for before, after, like in zip(versions.base, versions.merged, versions.rounded, strict=True):
        module = after.name.removesuffix(".weight")
        if module not in forms:
            result.append(cast(after, like.dtype))
            continue
        quantizer = _measuring(before, after, loss)
        found, parts = quantize(config, [cast(after, like.dtype)], *forms[module], quantizer)
        result += parts
        own = _form_of(found["quantization"].get(module, found["quantization"]))
        if own != default:
            settings[module] = {"group_size": own[1], "bits": own[0]}
    return {**config, "quantization": settings, "quantization_config": settings}, result


def _form_of(setting: dict[str, Any]) -> Form:
    return setting["bits"], setting["group_size"]


def _measuring(before: LazyTensor, after: LazyTensor, loss: AdapterLoss) -> RowQuantizer:
    """A quantizer of `after`, rounded to the type of the tensor it is given, that records what this loses."""
    sums = np.zeros((2, after.shape[0]))
    loss.sums.append(sums)

    def quantized(like: LazyTensor, start: int, stop: int, bits: int, group_size: int) -> Parts:
        new, old = read_rows(after, start, stop), read_rows(before, start, stop)
        parts = quantize_affine(new.astype(like.dtype), bits=bits, group_size=group_size)
        delta = new.astype(np.float32) - old.astype(np.float32)
        if delta.any():
            lost = dequantize_affine(*parts, bits=bits, group_size=group_size) - delta
            lost -= roundtrip_affine(old.astype(like.dtype), bits=bits, group_size=group_size)
            for index, array in enumerate((delta, lost)):
                sums[index, start:stop] = np.square(array).reshape(len(array), -1).sum(axis=1, dtype=np.float64)
        return parts

    return quantized
