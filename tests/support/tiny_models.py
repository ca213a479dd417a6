"""Build tiny random models that can fail: wide weights, an odd rope base, rows longer than the window."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from macft.data.batches import collate
from macft.data.tokenization.feedback import partners
from macft.data.tokenization.table import TokenizedExample, TokenizedFeedback, TokenizedPair, mismatched
from macft.objectives.batch import NumpyBatch

VOCABULARY = 199
ROPE_THETA = 123456.0
WINDOW = 12
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """OpenBLAS, where MLX has it, on one thread: on a busy machine its waiting threads take seven times the work."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "openblas_set_num_threads"):  # a Mac
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(1)
    yield
    library.openblas_set_num_threads(before)


def write_model(folder: Path, architecture: str, *, seed: int = 0, rope_theta: float = ROPE_THETA, **sizes) -> Path:
    """A random transformers model of this architecture, saved in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own: dict = {"head_dim": 16} if architecture in ("qwen3", "gemma3_text") else {}
    rope: dict = {"rope_theta": rope_theta, "rope_type": "default"}
    if architecture == "gemma3_text":
        # six layers: five with a sliding window, then one without
        own |= {"num_hidden_layers": 6, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
        local = {"rope_theta": rope_theta / 10, "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    if architecture == "llama":
        own |= {"tie_word_embeddings": True}
    config = AutoConfig.for_model(architecture, **{**_SIZES, **own, "rope_parameters": rope, **sizes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases start at constants, which would hide a missing one
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            del name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def write_mlx_quantized(source: Path, folder: Path, bits: int) -> Path:
    """The same model as mlx-lm quantizes and saves it: groups of 64."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    from macft.weights.model_config import normalize_config, read_config

    model, config = load_model(source, model_config=normalize_config(read_config(source)))
    model, config = quantize_model(model, config, 64, bits)
    folder.mkdir()
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def random_examples(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 40) -> list[TokenizedExample]:
    """Random tokens with a learnable pattern; the second half of a row is trained."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(shortest, longest + 1))
        tokens = rng.integers(3, VOCABULARY, length).astype(np.int32)
        tokens[1::2] = (tokens[0::2][: len(tokens[1::2])] * 3) % VOCABULARY
        mask = np.zeros(length, dtype=bool)
        mask[length // 2 :] = True
        examples.append(TokenizedExample(tokens, mask))
    return examples


def random_feedback(count: int, block: int, seed: int = 11) -> list[TokenizedFeedback]:
    """Rated answers of all shapes, each with its end token; both ratings in every block."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer = (rng.integers(3, VOCABULARY, rng.integers(1, most)) for most in (25, 20))
        tokens = np.concatenate([prompt, answer, [_SIZES["eos_token_id"]]]).astype(np.int32)
        rows.append(TokenizedExample(tokens, np.arange(len(tokens)) >= len(prompt)))
    others = partners(count, block)
    return [
        TokenizedFeedback(row, mismatched(row, rows[others[i]], 4096), i % block in (0, 3))
        for i, row in enumerate(rows)
    ]


def random_pairs(
    count: int, *, seed: int = 0, prompt: tuple[int, int] = (3, 30), answer: tuple[int, int] = (2, 19)
) -> list[TokenizedPair]:
    """Random prompts, each with two random answers; lengths are drawn from these closed ranges."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        start = int(rng.integers(prompt[0], prompt[1] + 1))
        shared = rng.integers(3, VOCABULARY, start)
        rows = []
        for _ in range(2):
            own = rng.integers(3, VOCABULARY, int(rng.integers(answer[0], answer[1] + 1)))
            tokens = np.concatenate([shared, own]).astype(np.int32)
            rows.append(TokenizedExample(tokens, np.arange(len(tokens)) >= start))
        pairs.append(TokenizedPair(rows[0], rows[1], start))
    return pairs


def steps_of(examples: list[TokenizedExample], batch_size: int, accumulation: int) -> list[list[NumpyBatch]]:
    """Micro-batches of every step, in the order of the examples."""
    size = batch_size * accumulation
    return [
        [collate(examples[i : i + batch_size]) for i in range(start, min(start + size, len(examples)), batch_size)]
        for start in range(0, len(examples), size)
    ]
