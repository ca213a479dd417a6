"""A model folder, adapters and token ids in; the logits that MLX computes of them in float32 out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.utils import load_adapters

from macft.backends.base import ModelSpec, Under
from macft.backends.mlx import lora
from macft.backends.mlx.model import load
from macft.errors import ModelError

NATIVE_FORMAT = "mlx"


def logits(folder: Path, adapters: Sequence[Under | Path], tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V]; an adapter given as a folder, the only one then, is read and attached by mlx-lm itself."""
    model = load(ModelSpec(folder, lora=None, precision="float32", max_length=len(tokens))).model
    for adapter in adapters:
        if isinstance(adapter, Under):
            lora.merge(model, adapter)
        else:
            model = _with_adapter(model, adapter)
    model.eval()
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    try:
        return load_adapters(model, str(folder))
    except Exception as error:  # any problem of a foreign loader
        raise ModelError(f"{folder}: mlx-lm cannot load it: {' '.join(str(error).split())[:160]}") from error
