"""Quantize the matrices of a model in MLX's layout as mlx-lm's own conversion does."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from threading import Condition
from typing import Any

import ml_dtypes
import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.layouts.mlx import layout_of
from macft.weights.model_config import Config
from macft.weights.quantization.affine import BITS, quantize_affine
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows

GROUP_SIZES = (32, 64, 128)
# what mlx-lm gives the few modules that it does not quantize to fewer bits
_DELICATE = {"group_size": 64, "bits": 8}
_FLOATS = frozenset(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
_QUANTIZED_AT_ONCE = 1 << 22  # elements quantized at a time

Parts = tuple[Array, Array, Array]  # packed numbers, scales, biases
# (tensor, first row, row after the last, bits, group size) -> those rows quantized
RowQuantizer = Callable[[LazyTensor, int, int, int, int], Parts]


def quantize_rows(tensor: LazyTensor, start: int, stop: int, bits: int, group_size: int) -> Parts:
    """Rows `start` to `stop` of a matrix (some experts of a stack) by MLX's rule."""
    return quantize_affine(read_rows(tensor, start, stop), bits=bits, group_size=group_size)


def check_quantization(bits: int, group_size: int) -> None:
    """Raise ModelError unless MLX has affine quantization with these bits and this group size."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ModelError(
            f"{bits} bits in groups of {group_size}: accepted are {', '.join(map(str, BITS))} bits in groups of "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )


def quantize(
    config: Config,
    tensors: list[LazyTensor],
    bits: int,
    group_size: int,
    quantizer: RowQuantizer = quantize_rows,
) -> tuple[dict[str, Any], list[LazyTensor]]:
    """(config, tensors) with every linear, embedding and stack of experts quantized that mlx-lm would quantize.

    That is each whose width `group_size` divides. `X.weight` becomes packed uint32 `X.weight` and `X.scales` and
    `X.biases` of its own type, computed by `quantizer` when they are read. Raises ModelError for a model type
    without a known layout, for bits and group sizes that MLX does not have, and for modules that mlx-lm itself
    could not quantize.
    """
    check_quantization(bits, group_size)
    delicate = layout_of(config).eight_bits
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    result: list[LazyTensor] = []
    problems: list[str] = []
    for tensor in tensors:
        if not _is_matrix(tensor) or tensor.shape[-1] % group_size:
            result.append(tensor)
            continue
        module = tensor.name.removesuffix(".weight")
        own = _DELICATE if module.endswith(delicate) else None
        if own is not None:
            settings[module] = dict(own)
        form = own or settings
        if tensor.shape[-1] % form["group_size"] or tensor.dtype not in _FLOATS:
            problems.append(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected float32, float16 or bfloat16 of a "
                f"width that {form['group_size']} divides"
            )
            continue
        result += _quantized(module, tensor, form["bits"], form["group_size"], quantizer)
    raise_problems("these weights cannot be quantized:", problems)
    return {**config, "quantization": settings, "quantization_config": settings}, result


def _is_matrix(tensor: LazyTensor) -> bool:
    """Whether this is the weight of a linear, an embedding or a stack of experts, not of a convolution."""
    is_stack = ".switch_mlp." in tensor.name or ".mlp.experts." in tensor.name
    return tensor.name.endswith(".weight") and len(tensor.shape) == (3 if is_stack else 2)


def _quantized(
    module: str, tensor: LazyTensor, bits: int, group_size: int, quantizer: RowQuantizer
) -> list[LazyTensor]:
    packed_shape = (*tensor.shape[:-1], tensor.shape[-1] * bits // 32)
    small_shape = (*tensor.shape[:-1], tensor.shape[-1] // group_size)
    small = _SmallParts(small_shape, group_size, lambda start, stop: quantizer(tensor, start, stop, bits, group_size))
    return [
        from_rows(f"{module}.weight", np.dtype(np.uint32), packed_shape, small.packed),
        LazyTensor(f"{module}.scales", tensor.dtype, small_shape, lambda: small.read(0)),
        LazyTensor(f"{module}.biases", tensor.dtype, small_shape, lambda: small.read(1)),
    ]


class _SmallParts:
    """One matrix, quantized in parts; its scales and biases are kept until both have been read.

    A reader waits for rows that another thread is quantizing, so that a writer, which asks for the packed numbers
    first, has each row quantized only once.
    """

    def __init__(self, shape: tuple[int, ...], group_size: int, quantized: Callable[[int, int], Parts]) -> None:
        self._shape, self._quantized = shape, quantized
        self._step = max(1, _QUANTIZED_AT_ONCE // (prod(shape[1:]) * group_size))
        self._changed = Condition()
        self._forget()

    def _forget(self) -> None:
        self._kept: tuple[Array, Array] | None = None
        self._is_begun, self._is_known = np.zeros((2, self._shape[0]), bool)
        self._is_read: set[int] = set()

    def packed(self, start: int, stop: int) -> Array:
        """The packed numbers of some rows (of some experts, in a stack)."""
        with self._changed:
            self._is_begun[start:stop] = True
        try:
            packed, scales, biases = self._quantized(start, stop)
        except BaseException:
            with self._changed:
                # a thread that waits for these rows then meets the problem itself
                self._is_begun[start:stop] = False
                self._changed.notify_all()
            raise
        with self._changed:
            if self._kept is None:
                self._kept = (np.empty(self._shape, scales.dtype), np.empty(self._shape, scales.dtype))
            self._kept[0][start:stop], self._kept[1][start:stop] = scales, biases
            self._is_begun[start:stop] = self._is_known[start:stop] = True
            self._changed.notify_all()
        return packed

    def read(self, which: int) -> Array:
        """All scales (0) or all biases (1); rows that have not been quantized yet are quantized now."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not (self._is_begun & ~self._is_known).any())
                if self._is_known.all():
                    return self._take(which)
                start = int(np.argmin(self._is_known))
            self.packed(start, min(start + self._step, self._shape[0]))

    def _take(self, which: int) -> Array:
        assert self._kept is not None
        found = self._kept[which]
        self._is_read.add(which)
        if len(self._is_read) == 2:
            self._forget()
        return found
