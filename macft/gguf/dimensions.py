"""State the sizes that tensor shapes are made of, and what llama.cpp assumes of a model without a field for it."""

from __future__ import annotations

from collections.abc import Mapping

Sizes = Mapping[str, int]  # numbers by the words that tensor rules use

# word: (GGUF field, keys of config.json)
_NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layers": ("block_count", ("num_hidden_layers",)),
    "hidden": ("embedding_length", ("hidden_size",)),
    "ffn": ("feed_forward_length", ("intermediate_size",)),
    "heads": ("attention.head_count", ("num_attention_heads",)),
    "context": ("context_length", ("max_position_embeddings",)),
    "kv_heads": ("attention.head_count_kv", ("num_key_value_heads",)),
    "head_dim": ("attention.key_length", ("head_dim",)),
    "experts": ("expert_count", ("num_experts", "num_local_experts")),
    "experts_used": ("expert_used_count", ("num_experts_per_tok",)),
    "expert_ffn": ("expert_feed_forward_length", ("moe_intermediate_size",)),
    "shared_ffn": ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
}
FIELDS = {word: field for word, (field, _) in _NAMES.items()}
KEYS = {word: keys for word, (_, keys) in _NAMES.items()}

# Layers of the two models whose attention is not scaled by the head size (gemma_pytorch, config.py).
GEMMA2_27B, GEMMA3_27B = 46, 62
# Every Nth layer of these has no window, no rotary positions or full attention.
GEMMA2_PERIOD, GEMMA3_PERIOD, SMOLLM3_PERIOD, HYBRID_PERIOD = 2, 6, 4, 4


def as_fields(sizes: Sizes, *words: str) -> dict[str, int]:
    """The sizes under their names in GGUF, without the architecture's prefix."""
    return {FIELDS[word]: sizes[word] for word in words if word in sizes}


def as_config(sizes: Sizes, *words: str) -> dict[str, int]:
    """The sizes under their names in config.json."""
    return {KEYS[word][0]: sizes[word] for word in words}


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
