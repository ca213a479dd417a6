"""Build a tiny chat model with data for it, and runs on it that take well under a second."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from macft.backends import load_model
from macft.config.settings import Settings
from macft.engines import BACKENDS
from macft.training import run
from macft.training.log.report import read_log
from support.tiny_models import write_model
from support.tiny_tokenizer import write_tiny_model

ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in BACKENDS]

_WORDS = ("the", "quick", "brown", "fox", "lazy dog", "hello", "one", "two", "three", "four", "Paris", "capital")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for matrices this small its threads cost more than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_toy_model(folder: Path, architecture: str = "llama", *, seed: int = 0, **sizes: Any) -> Path:
    """A model folder that trains and chats: random weights, a small tokenizer, ChatML."""
    write_tiny_model(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {
        "eos_token_id": vocabulary.token_to_id("<|im_end|>"),
        "bos_token_id": vocabulary.token_to_id("<s>"),
        "pad_token_id": vocabulary.token_to_id("<|endoftext|>"),
    }
    return write_model(folder, architecture, seed=seed, **{**ids, "vocab_size": vocabulary.get_vocab_size(), **sizes})


def write_rows(path: Path, count: int = 10, seed: int = 0) -> Path:
    """Conversations of one turn and of different lengths."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        question, answer = (" ".join(rng.choice(_WORDS, int(rng.integers(2, 12)))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_pairs(path: Path, count: int = 10, seed: int = 0) -> Path:
    """Preference rows: questions, each with two answers, of different lengths."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        texts = [" ".join(rng.choice(_WORDS, int(rng.integers(2, 12)))) for _ in range(3)]
        turns = zip(("prompt", "chosen", "rejected"), ("user", "assistant", "assistant"), texts, strict=True)
        lines.append(json.dumps({key: [{"role": role, "content": text}] for key, role, text in turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_feedback(path: Path, count: int = 10, seed: int = 0) -> Path:
    """Questions with an answer each, of different lengths, rated desirable and undesirable by turns."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        prompt, completion = (" ".join(rng.choice(_WORDS, int(rng.integers(2, 12)))) for _ in range(2))
        lines.append(json.dumps({"prompt": prompt, "completion": completion, "label": i % 2 == 0}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def toy_settings(model: Path, data: Path, output_dir: Path, backend: str, **keys: Any) -> Settings:
    """Ten rows, two a step, two epochs: ten steps, each logged; no picture."""
    values = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
        "lora_rank": 4,
    }
    return Settings(
        **{
            **values,
            "model_name_or_path": str(model),
            "dataset": str(data),
            "output_dir": str(output_dir),
            "backend": backend,
            **keys,
        }
    )


def curve(output_dir: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, learning rate and gradient norm of every training row of the log."""
    rows = [row for row in read_log(output_dir) if "loss" in row]
    return [(row["current_steps"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


class _StopsAt:
    """A model during whose step of this number (from 0) the user presses Ctrl-C."""

    def __init__(self, model: Any, step: int):
        self._model = model
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def train_step(self, *arguments: Any, step: int, **keys: Any) -> Any:
        if step == self._step:
            raise KeyboardInterrupt
        return self._model.train_step(*arguments, step=step, **keys)


def press_ctrl_c_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the next runs after `step` optimizer steps."""
    monkeypatch.setattr(run, "load_model", lambda *arguments: _StopsAt(load_model(*arguments), step))
