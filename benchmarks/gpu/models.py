"""Write random models of known shapes, and batches for them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# from a source tree, with the makers of small models that tests use
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from macft.backends.shared import step_parts  # noqa: E402
from macft.data.batches import collate  # noqa: E402
from macft.data.tokenization.packing import PackedExample  # noqa: E402
from macft.data.tokenization.table import TokenizedExample  # noqa: E402
from macft.objectives.batch import NumpyBatch  # noqa: E402

# Qwen2.5's blocks of 0.5 and 3 billion parameters
HALF_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
THREE_BILLION = HALF_BILLION | {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}


def write_shape(folder: Path, shape: dict, device: str) -> Path:
    """A random bfloat16 model of a shape, drawn on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen2", **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    return folder


def trunk_parameters(shape: dict) -> int:
    """Numbers in the matrices of the blocks."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    return shape["num_hidden_layers"] * (2 * width * width + 2 * width * width * kv // heads + 3 * width * inner)


def parameters(shape: dict) -> int:
    """Numbers in the matrices of the blocks and in the embedding, which is the head too."""
    return trunk_parameters(shape) + shape["vocab_size"] * shape["hidden_size"]


def tokens_of_a_pass(batch: NumpyBatch, at_once: int | None) -> int:
    """The tokens of the largest pass in which a batch is computed."""
    return max(part.tokens.size for _, part in step_parts([batch], at_once, packs=True))


def flops_per_token(shape: dict, length: int) -> float:
    """Of a LoRA step in which every token is trained: forward and backward to activations, and attention."""
    head = shape["vocab_size"] * shape["hidden_size"]
    attention = 7 * length * shape["hidden_size"] * shape["num_hidden_layers"]
    return 4 * trunk_parameters(shape) + 4 * head + attention


def whole_rows(rows: int, length: int, seed: int = 0) -> NumpyBatch:
    """Rows of one length, every token trained."""
    rng = np.random.default_rng(seed)
    mask = np.ones(length + 1, dtype=bool)
    mask[0] = False
    draws = (rng.integers(3, 199, length + 1).astype(np.int32) for _ in range(rows))
    return collate([TokenizedExample(tokens, mask) for tokens in draws])


def packed_rows(rows: int, parts: int, length: int, seed: int = 0) -> NumpyBatch:
    """Rows of several examples of one length."""
    rng = np.random.default_rng(seed)
    mask = np.ones(length, dtype=bool)
    mask[0] = False

    def example() -> TokenizedExample:
        return TokenizedExample(rng.integers(3, 199, length).astype(np.int32), mask)

    return collate([PackedExample(tuple(example() for _ in range(parts))) for _ in range(rows)])
