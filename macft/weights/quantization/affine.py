"""Quantize weights by MLX's affine rule, and dequantize its affine and mxfp4 formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from macft.errors import ModelError
from macft.weights.tensors.lazy import Array

BITS = (2, 3, 4, 5, 6, 8)
_UNPACKED_AT_ONCE = 1 << 20  # elements unpacked at a time

# the group size of `quantization_bit` on every backend
LOAD_GROUP_SIZE = 64

MXFP4 = (4, 32)  # bits, group size

# E2M1, by the four bits of a code: sign, two bits of exponent, one of mantissa. Source: OCP Microscaling 1.0, 5.3.3.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array((*_HALF, *(-value for value in _HALF)), np.float32)
# both codes of a byte at once, the lower four bits first
_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=-1)


@dataclass(frozen=True)
class Quantization:
    """How a folder is quantized; `layers` holds (bits, group_size) of module paths that differ.

    `mode` is "affine", or all modes of a folder that mixes several.
    """

    bits: int
    group_size: int
    mode: str
    layers: dict[str, tuple[int, int]]

    def of(self, module: str) -> tuple[int, int]:
        """(bits, group_size) of a module path, such as model.layers.0.mlp.up_proj."""
        return self.layers.get(module, (self.bits, self.group_size))


def quantization_of(config: dict[str, Any]) -> Quantization | None:
    """The MLX quantization that a config.json describes, or None. ModelError for values that MLX does not have."""
    found = config.get("quantization")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ModelError(f"config.json: quantization is {found!r}, expected an object with bits and group_size")
    mode = str(found.get("mode", "affine"))
    bits, group_size = _bits_and_group("quantization", found, mode)
    layers = {
        module: _bits_and_group(f"quantization of {module}", value, str(value.get("mode", mode)))
        for module, value in found.items()
        if isinstance(value, dict)
    }
    modes = {mode} | {str(value.get("mode", mode)) for value in found.values() if isinstance(value, dict)}
    return Quantization(bits, group_size, ", ".join(sorted(modes)), layers)


def _bits_and_group(where: str, value: dict[str, Any], mode: str) -> tuple[int, int]:
    bits, group_size = value.get("bits"), value.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int) or (mode == "affine" and bits not in BITS):
        raise ModelError(
            f"config.json: {where} has bits {bits!r} and group_size {group_size!r}; "
            f"expected bits of {', '.join(map(str, BITS))} and a whole group_size"
        )
    return bits, group_size


def dequantize_affine(packed: Array, scales: Array, biases: Array, *, bits: int, group_size: int) -> Array:
    """scale * q + bias for each group, in float32: [..., columns] from uint32 [..., columns * bits / 32].

    `scales` and `biases` are [..., columns / group_size], of any float type. ModelError if shapes disagree.
    """
    columns = scales.shape[-1] * group_size
    if packed.dtype != np.uint32 or packed.shape[-1] * 32 != columns * bits or biases.shape != scales.shape:
        raise ModelError(
            f"packed {packed.dtype} {list(packed.shape)}, scales {list(scales.shape)} and biases "
            f"{list(biases.shape)} do not fit {bits} bits in groups of {group_size}"
        )
    rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1])
    flat_scales = scales.reshape(-1, scales.shape[-1], 1)
    flat_biases = biases.reshape(-1, scales.shape[-1], 1)
    out = np.empty((rows.shape[0], columns), np.float32)
    step = max(1, _UNPACKED_AT_ONCE // columns)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        values = out[part].reshape(-1, scales.shape[-1], group_size)
        values[:] = _unpack(rows[part], bits).reshape(values.shape)
        values *= flat_scales[part].astype(np.float32)
        values += flat_biases[part].astype(np.float32)
    return out.reshape(*packed.shape[:-1], columns)


def _unpack(rows: Array, bits: int) -> Array:
    """Little-endian bit fields of `rows` [n, words] as small integers [n, columns]."""
    stream = rows.view(np.uint8)
    if 8 % bits == 0:
        fields: Array = np.stack([stream >> shift for shift in range(0, 8, bits)], axis=-1)
        fields &= (1 << bits) - 1
        return fields.reshape(rows.shape[0], -1)
    # eight fields fill `bits` whole bytes
    octets = stream.reshape(rows.shape[0], -1, bits).astype(np.uint64)
    joined = (octets << (8 * np.arange(bits, dtype=np.uint64))).sum(axis=-1, dtype=np.uint64)
    wide: Array = (joined[..., None] >> (bits * np.arange(8, dtype=np.uint64))) & np.uint64((1 << bits) - 1)
    return wide.astype(np.uint8).reshape(rows.shape[0], -1)


def quantize_affine(weight: Array, *, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """Quantize by MLX's rule: (packed uint32 [..., columns * bits / 32], scales, biases [..., columns / group_size]).

    The scale is chosen so that zero, and the end of the group farther from zero, are represented exactly; scales
    and biases have the type of `weight`. Source: the description and CPU kernel of mlx.core.quantize.
    """
    columns = weight.shape[-1]
    if columns % group_size or columns * bits % 32:
        raise ModelError(f"{columns} columns do not divide into groups of {group_size} with {bits} bits")
    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    top = np.float32((1 << bits) - 1)
    is_negative = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(is_negative, scale, -scale)
    edge = np.where(is_negative, low, high)
    steps = np.rint(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps != 0, steps, 1), scale)
    bias = np.where(steps != 0, edge, np.float32(0))
    fields = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, top).astype(np.uint8)
    packed = _pack(fields.reshape(-1, columns), bits).reshape(*weight.shape[:-1], -1)
    return packed, scale.astype(weight.dtype), bias.astype(weight.dtype)


def _pack(fields: Array, bits: int) -> Array:
    """The inverse of `_unpack`: [n, columns] small integers to uint32 [n, columns * bits / 32]."""
    spread = (fields[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    words: Array = np.packbits(spread.reshape(fields.shape[0], -1), axis=-1, bitorder="little").view(np.uint32)
    return words


def roundtrip_affine(weight: Array, *, bits: int, group_size: int) -> Array:
    """`weight` quantized and dequantized again, in float32."""
    return dequantize_affine(
        *quantize_affine(weight, bits=bits, group_size=group_size), bits=bits, group_size=group_size
    )


def dequantize_mxfp4(packed: Array, scales: Array) -> Array:
    """2^(scale - 127) * code, exact in float32: [..., columns] from uint32 [..., columns / 8].

    `scales` is uint8 [..., columns / 32]. ModelError if the shapes disagree.
    """
    _, group_size = MXFP4
    columns = scales.shape[-1] * group_size
    if packed.dtype != np.uint32 or scales.dtype != np.uint8 or packed.shape != (*scales.shape[:-1], columns // 8):
        raise ModelError(
            f"packed {packed.dtype} {list(packed.shape)} and scales {scales.dtype} {list(scales.shape)} do not fit "
            f"mxfp4 in groups of {group_size}"
        )
    codes = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1]).view(np.uint8)
    values = _PAIRS[codes].reshape(*scales.shape, group_size)
    values *= scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    return values.reshape(*scales.shape[:-1], columns)
