"""Compute logits of a model with adapters, as mlx-lm itself reads them, to verify a conversion with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.utils import load_adapters

from macft.backends.base import MergedAdapter, ModelSpec
from macft.backends.mlx import lora
from macft.backends.mlx.model import load
from macft.backends.mlx.step import whole_logits
from macft.errors import ModelError


def logits(folder: Path, adapters: Sequence[MergedAdapter | Path], tokens: Sequence[int]) -> np.ndarray:
    """See `LogitsModule.logits`; mlx-lm attaches only one adapter, so one given as a folder must be the only one."""
    model = load(ModelSpec(folder, lora=None, precision="float32", max_length=len(tokens))).model
    for adapter in adapters:
        if isinstance(adapter, MergedAdapter):
            lora.merge(model, adapter)
        else:
            model = _with_adapter(model, adapter)
    model.eval()
    return whole_logits(model, tokens)


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    try:
        return load_adapters(model, str(folder))
    except Exception as error:  # any problem of a foreign loader
        raise ModelError(f"{folder}: mlx-lm cannot load it: {' '.join(str(error).split())[:160]}") from error
