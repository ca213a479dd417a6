"""Weights in MLX's mxfp4 format in; the numbers they stand for out."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from macft.errors import ModelError
from macft.weights.tensors.lazy import Array

GROUP_SIZE = 32
BITS = 4

# E2M1, by the four bits of a code: sign, two bits of exponent, one of mantissa. Source: OCP Microscaling 1.0, 5.3.3.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array((*_HALF, *(-value for value in _HALF)), np.float32)
# both codes of a byte at once, the lower four bits first
_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=-1)


def dequantize_mxfp4(packed: Array, scales: Array) -> Array:
    """2^(scale - 127) * code, exact in float32: [..., columns] from uint32 [..., columns / 8].

    `scales` is uint8 [..., columns / 32]. ModelError if the shapes disagree.
    """
    columns = scales.shape[-1] * GROUP_SIZE
    if packed.dtype != np.uint32 or scales.dtype != np.uint8 or packed.shape != (*scales.shape[:-1], columns // 8):
        raise ModelError(
            f"packed {packed.dtype} {list(packed.shape)} and scales {scales.dtype} {list(scales.shape)} do not fit "
            f"mxfp4 in groups of {GROUP_SIZE}"
        )
    codes = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1]).view(np.uint8)
    values = _PAIRS[codes].reshape(*scales.shape, GROUP_SIZE)
    values *= scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    return values.reshape(*scales.shape[:-1], columns)
