"""The name and shape of a parameter in; its value in a model that was never trained, the same on every engine, out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from macft.errors import ModelError

# Their norms multiply by 1 + weight.
_NORMS_AROUND_ZERO = ("gemma", "gemma2", "gemma3", "gemma3_text")


def initial_value(config: Mapping[str, Any], seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 `shape`: matrices are normal with the config's `initializer_range`, norms are 1, biases are 0.

    Each name has its own random numbers, so that their order does not matter. Raises ModelError for what
    is neither: a vector of another kind, or a stack of matrices, which engines cut in different ways.
    """
    if len(shape) == 2:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        spread = np.float32(config.get("initializer_range", 0.02))
        value: np.ndarray = rng.standard_normal(tuple(shape), dtype=np.float32) * spread
        return value
    owner, _, kind = name.rpartition(".")
    if len(shape) == 1 and kind == "bias":
        return np.zeros(tuple(shape), dtype=np.float32)
    if len(shape) == 1 and kind == "weight" and "norm" in owner.rpartition(".")[2]:
        start = 0.0 if config["model_type"] in _NORMS_AROUND_ZERO else 1.0
        return np.full(tuple(shape), start, dtype=np.float32)
    raise ModelError(
        f"train_from_scratch: nothing is known of how {name} {list(shape)} of a {config['model_type']} model starts; "
        "take a dense model (llama, qwen2, qwen3, gemma3_text, mistral, ...)"
    )
