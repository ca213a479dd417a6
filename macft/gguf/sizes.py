"""State the sizes that tensor shapes are made of, and what llama.cpp assumes of a model without a field for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]  # the content of config.json
Sizes = Mapping[str, int]  # numbers by the words that tensor rules use

# Layers of the two models whose attention is not scaled by the head size (gemma_pytorch, config.py).
GEMMA2_27B, GEMMA3_27B = 46, 62
# Every Nth layer of these has no window, no rotary positions or full attention.
GEMMA2_PERIOD, GEMMA3_PERIOD, SMOLLM3_PERIOD, HYBRID_PERIOD = 2, 6, 4, 4


def with_products(sizes: Sizes) -> dict[str, int]:
    """Add the heights of the attention matrices and of a fused gate to the sizes of heads and MLP."""
    q, kv = sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
    return {**sizes, "q": q, "two_q": 2 * q, "kv": kv, "qkv": q + 2 * kv, "two_ffn": 2 * sizes.get("ffn", 0)}


def gemma_query_scalar(sizes: Sizes, layers_of_largest: int) -> int:
    """The number by whose root a gemma divides its attention scores."""
    return sizes["hidden"] // sizes["heads"] if sizes["layers"] == layers_of_largest else sizes["head_dim"]


def smollm3_rope_layers(layers: int) -> list[int]:
    """1 for each layer with rotary positions, 0 for every fourth, which has none."""
    return [int((layer + 1) % SMOLLM3_PERIOD != 0) for layer in range(layers)]
