"""Write tokenizers to convert to GGUF and back, and texts to compare their ids on."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Strings over all assigned characters, common blocks and white space more often than others."""
    rng = random.Random(seed)
    everything = [c for c in map(chr, range(1, 0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    for _ in range(count):
        pools = (range(32, 127), range(0xA0, 0x250), range(0x4E00, 0x9FA0), (9, 10, 13, 32, 32, 0x3000))
        yield "".join(
            rng.choice(everything) if rng.random() < 0.3 else chr(rng.choice(rng.choice(pools))) for _ in range(40)
        )


GEMMA_PIECES = ("<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁▁", "\t\t")

PHI_PIECES = ("<|user|>", "<|end|>", "<|assistant|>")

CHAT = "<|im_start|>user\nhi  there<|im_end|>\n <|im_start|>assistant\n\n"


def added(pieces: tuple[str, ...], first: int, *, special: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entry of tokenizer_config.json that names added tokens, as the real models have it."""
    entries = {str(first + i): {"content": piece, "special": piece in special} for i, piece in enumerate(pieces)}
    return {"added_tokens_decoder": entries}


def write_weights(folder: Path, model_type: str, vocab_size: int) -> None:
    """The smallest model that llama.cpp runs; nobody reads its numbers here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)


def sentencepiece_ids(folder: Path) -> Callable[[str], list[int]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda text: list(processor.encode(text))
