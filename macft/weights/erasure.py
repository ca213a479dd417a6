"""Merged weights in; the same quantized, and how much of what was merged that loses, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from macft.weights.lazy import Array, LazyTensor, cast, derived, read_rows
from macft.weights.quantize_model import quantize
from macft.weights.quantized import dequantize_affine, quantize_affine

Form = tuple[int, int]  # bits, group size
Config = dict[str, Any]


@dataclass(frozen=True)
class Versions:
    """One model's tensors three times, in the same order: before merging and after, neither of them rounded yet,
    and before merging in the types that are to be written."""

    base: list[LazyTensor]
    merged: list[LazyTensor]
    rounded: list[LazyTensor]


@dataclass
class Erasure:
    """Sums of squares over all blocks measured so far: of what was merged, and of what quantizing lost of it."""

    merged: float = 0.0
    lost: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    @property
    def share(self) -> float:
        """||Q(W + D) - Q(W) - D|| / ||D||, Q quantizing and back, D what was merged; 0 if nothing was."""
        return float(np.sqrt(self.lost / self.merged)) if self.merged else 0.0

    def add(self, delta: Array, lost: Array) -> None:
        """Count one block."""
        squares = [float(np.square(array).sum(dtype=np.float64)) for array in (delta, lost)]
        with self._lock:
            self.merged += squares[0]
            self.lost += squares[1]


def planned(config: Config, tensors: list[LazyTensor], form: Form) -> dict[str, Form]:
    """The modules that mlx-lm would quantize when asked for this form, each with its own."""
    found, quantized = quantize(config, tensors, *form)
    modules = [t.name.removesuffix(".scales") for t in quantized if t.name.endswith(".scales")]
    settings = found["quantization"]
    return {module: _form_of(settings.get(module, settings)) for module in modules}


def quantize_merged(
    config: Config, versions: Versions, forms: dict[str, Form], default: Form, erasure: Erasure
) -> tuple[Config, list[LazyTensor]]:
    """(config, tensors) with the modules of `forms` quantized and the rest rounded.

    `erasure` is measured while the tensors are read.
    """
    settings: Config = {"group_size": default[1], "bits": default[0], "mode": "affine"}
    result = []
    for before, after, like in zip(versions.base, versions.merged, versions.rounded, strict=True):
        module = after.name.removesuffix(".weight")
        if module not in forms:
            result.append(cast(after, like.dtype))
            continue
        watched = _watched(before, after, like.dtype, forms[module], erasure)
        found, parts = quantize(config, [watched], *forms[module])
        result += parts
        own = _form_of(found["quantization"].get(module, found["quantization"]))
        if own != default:
            settings[module] = {"group_size": own[1], "bits": own[0]}
    return {**config, "quantization": settings, "quantization_config": settings}, result


def _form_of(setting: Config) -> Form:
    return setting["bits"], setting["group_size"]


def _watched(before: LazyTensor, after: LazyTensor, dtype: np.dtype[Any], form: Form, erasure: Erasure) -> LazyTensor:
    """`after` rounded to `dtype`; what quantizing it loses is added up as it is read."""
    bits, group_size = form
    is_counted = np.zeros(after.shape[0], bool)
    lock = Lock()

    def roundtrip(array: Array) -> Array:
        parts = quantize_affine(array.astype(dtype), bits=bits, group_size=group_size)
        return dequantize_affine(*parts, bits=bits, group_size=group_size)

    def rows(start: int, stop: int) -> Array:
        new, old = read_rows(after, start, stop), read_rows(before, start, stop)
        # a thread that wants the scales may ask for rows that another one is quantizing
        with lock:
            fresh = ~is_counted[start:stop]
            is_counted[start:stop] = True
        delta = new[fresh].astype(np.float32) - old[fresh].astype(np.float32)
        if delta.any():
            erasure.add(delta, roundtrip(new[fresh]) - roundtrip(old[fresh]) - delta)
        return new.astype(dtype)

    return derived(after.name, dtype, after.shape, rows, before, after)
