"""Talking to a quantized base as it was trained, and comparing models one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
from support.toy_backend import ENGINES, toy_settings, write_rows, write_toy_model

from macft.backends import load_model
from macft.backends.base import ModelSpec
from macft.inference import load as loading
from macft.inference.load import ChatOptions, compare_answers, load_chat_model
from macft.process_group import ONE_PROCESS
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

TOKENS = [5, 9, 3, 17, 4, 11]
HELLO = [[{"role": "user", "content": "hello"}]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("base"))


def run_of(base: Path, folder: Path, engine: str, **keys) -> Path:
    settings = toy_settings(base, write_rows(folder / "rows.jsonl"), folder / "run", engine, max_steps=2, **keys)
    train(settings)
    return folder / "run"


def logits_in(base: Path, engine: str, bits: int | None) -> np.ndarray:
    return load_model(engine, ModelSpec(base, None, quantization_bit=bits), None, ONE_PROCESS).logits(TOKENS)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_that_was_trained_in_4_bits_answers_in_4_bits(engine, base, tmp_path):
    run = run_of(base, tmp_path, engine, quantization_bit=4, save_strategy="steps", save_steps=1, learning_rate=1e-9)
    expected, dense = logits_in(base, engine, 4), logits_in(base, engine, None)
    assert np.abs(expected - dense).max() > 0.1, "4 bits show"
    for adapter in (run, run / "checkpoint-1"):
        chat = load_chat_model(str(base), str(adapter), ChatOptions(engine))
        # an adapter that has hardly been trained
        np.testing.assert_allclose(chat.model.logits(TOKENS), expected, atol=1e-4)
    asked = load_chat_model(str(base), str(run), ChatOptions(engine, quantization_bit=8))
    np.testing.assert_allclose(asked.model.logits(TOKENS), logits_in(base, engine, 8), atol=1e-4)


@pytest.mark.parametrize("config", [None, "quantization_bit: null\n", "quantization_bit: 5\n", "- a\n", "{", "\x00"])
def test_without_a_run_that_says_so_the_base_is_as_it_is(config, base, tmp_path):
    run = run_of(base, tmp_path, "torch", learning_rate=1e-9)
    (run / "config.yaml").unlink()
    if config is not None:
        (run / "config.yaml").write_text(config)
    chat = load_chat_model(str(base), str(run), ChatOptions("torch"))
    np.testing.assert_allclose(chat.model.logits(TOKENS), logits_in(base, "torch", None), atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_model_is_in_memory_at_a_time(engine, base, tmp_path, monkeypatch):
    run = run_of(base, tmp_path, engine, save_strategy="steps", save_steps=2)
    alive: list[weakref.ref] = []

    def load(*args):
        assert [model for model in alive if model() is not None] == []
        model = load_model(*args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", load)
    options = ChatOptions(engine)
    answers = compare_answers(str(base), [str(run), str(run / "checkpoint-2")], HELLO, options, max_new_tokens=2)
    assert len(alive) == len(answers) == 3
