"""Make adapters of each shape that PEFT gives a file: resized vocabularies, trained tokens, tied matrices, biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.tiny_adapters import write_word_tokenizer
from support.tiny_models import VOCABULARY, write_model

MORE = 4  # tokens that a grown vocabulary has
BASES = {
    "tied": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "biases": ("qwen2", {}),
    "scaled": ("gemma3_text", {}),  # its embedding is multiplied by a constant, and tied
}
LINEAR = ["q_proj", "up_proj"]


@dataclass(frozen=True)
class Shape:
    """Settings of PEFT; `more` rows of vocabulary; whether a tied base stays tied."""

    settings: dict[str, Any] = field(default_factory=dict)
    more: int = 0
    stays_tied: bool = True
    save_embedding_layers: bool | str = "auto"


NEW = [*range(VOCABULARY, VOCABULARY + MORE)]
SHAPES = {
    # a resized vocabulary
    "grown, both saved": Shape({"modules_to_save": ["embed_tokens", "lm_head"]}, MORE, stays_tied=False),
    "grown, embedding saved": Shape({"modules_to_save": ["embed_tokens"]}, MORE, stays_tied=False),
    "grown, head saved": Shape({"modules_to_save": ["lm_head"]}, MORE, stays_tied=False),
    "grown, saved and tied": Shape({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, MORE),
    "grown, not trained": Shape({}, MORE),
    "grown, lora on both": Shape({"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}, MORE, stays_tied=False),
    "grown, new tokens": Shape({"trainable_token_indices": NEW}, MORE),
    "grown, some new tokens": Shape({"trainable_token_indices": {"embed_tokens": NEW[1:3]}}, MORE),
    "shrunk": Shape({}, -9),
    # copies
    "copies": Shape(save_embedding_layers=True),
    # one matrix for head and embedding
    "tying, nothing to tie": Shape({"ensure_weight_tying": True}),
    "tying, embedding saved": Shape({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}),
    "tying, head saved": Shape({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}),
    "tying, lora on the embedding": Shape({"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "tying, lora on the head": Shape({"ensure_weight_tying": True, "target_modules": ["q_proj", "lm_head"]}),
    "tying, a regular expression": Shape({"ensure_weight_tying": True, "target_modules": r".*(q_proj|embed_tokens)"}),
    "tying, dora": Shape(
        {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, stays_tied=False
    ),
    "tying, tokens": Shape({"ensure_weight_tying": True, "trainable_token_indices": [3, 5]}),
    # trained tokens
    "tokens": Shape({"trainable_token_indices": [5, 3]}),
    "tokens of the head": Shape({"trainable_token_indices": {"lm_head": [4]}}, stays_tied=False),
    "tokens of both": Shape({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}}),
    "tokens of both, others": Shape(
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}, stays_tied=False
    ),
    # the rest
    "biases of lora": Shape({"bias": "lora_only"}),
    "all biases": Shape({"bias": "all"}),
    "a norm saved": Shape({"modules_to_save": ["norm"]}),
    "eva": Shape({"init_lora_weights": "eva"}),
    "mica": Shape({"init_lora_weights": "mica"}),
    "orthogonal": Shape({"init_lora_weights": "orthogonal"}),
}
# of the head no row is in the file, and the base has none for the new tokens
HALF = {
    "grown, lora on the embedding": Shape({"target_modules": [*LINEAR, "embed_tokens"]}, MORE, stays_tied=False),
    "grown, lora on the head": Shape({"target_modules": [*LINEAR, "lm_head"]}, MORE, stays_tied=False),
}


def write_bases(root: Path) -> dict[str, Path]:
    """A model with a tokenizer for each of `BASES`."""
    found = {name: write_model(root / name, kind, **sizes) for name, (kind, sizes) in BASES.items()}
    for folder in found.values():
        write_word_tokenizer(folder, VOCABULARY)
    return found


def resized(base: Path, more: int) -> torch.nn.Module:
    """The base in transformers with so many more rows of vocabulary, drawn anew each time."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if more:
        model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
    return model


def logits_of(model: torch.nn.Module, more: int) -> np.ndarray:
    """[tokens, vocabulary] of a fixed row, the new tokens at its end."""
    tokens = [*np.random.default_rng(0).integers(3, VOCABULARY + min(more, 0), 24).tolist(), 3, 4, 5]
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens + (NEW if more > 0 else [])])).logits[0].numpy()


def save(base: Path, shape: Shape, folder: Path) -> np.ndarray:
    """Write an adapter with random numbers in all that is trained, as PEFT does; its logits in PEFT."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **shape.settings}
    model = get_peft_model(resized(base, shape.more), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=shape.save_embedding_layers)
    if shape.more:
        write_word_tokenizer(folder, VOCABULARY + shape.more)
    return logits_of(model, shape.more)
