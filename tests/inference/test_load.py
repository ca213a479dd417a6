"""A chat with an adapter that no engine can attach: it is merged for the session, and computes what PEFT does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.peft_shapes import HALF, MORE, SHAPES, save, write_bases
from support.tiny_models import VOCABULARY
from support.toy_backend import ENGINES

from macft.errors import ModelError
from macft.inference.load import ChatOptions, load_chat_model
from macft.objectives.batch import Batch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

CHATTED = (
    "grown, both saved",
    "grown, saved and tied",
    "grown, not trained",
    "grown, lora on the embedding",
    "grown, lora on both",
    "grown, new tokens",
    "copies",
    "tying, lora on the head",
    "tokens",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_bases(tmp_path_factory.mktemp("bases"))["tied"]


@pytest.mark.parametrize("name", CHATTED)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_chat_computes_what_peft_does_on_the_resized_base(engine, name, base, tmp_path, monkeypatch):
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    shape = {**SHAPES, **HALF}[name]
    logits = save(base, shape, tmp_path / "adapter")
    chat = load_chat_model(str(base), str(tmp_path / "adapter"), ChatOptions(engine, raw=True))
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 24).tolist()
    tokens = np.array([[*tokens, 3, 4, 5, *(range(VOCABULARY, VOCABULARY + shape.more))]], np.int32)
    table = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
    expected = table[np.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    batch = Batch(tokens, np.ones_like(tokens, dtype=bool), np.array([tokens.shape[1]], np.int32))
    found = chat.model.logps(batch, np.ones((1, tokens.shape[1] - 1), dtype=bool))[0]
    # log-probabilities near 10, where a float32 step is 1e-6
    assert np.abs(found - expected).max() < 1e-4
    assert chat.tokenizer.vocab_size == VOCABULARY + shape.more
    # what was merged for the session is gone
    assert list((tmp_path / "cache").glob("merged-*")) == []


def test_an_adapter_that_cannot_be_merged_leaves_nothing_behind(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    save(base, SHAPES["grown, not trained"], tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"{VOCABULARY + MORE} rows.*copy the tokenizer"):
        load_chat_model(str(base), str(tmp_path / "adapter"), ChatOptions("torch", raw=True))
    assert list((tmp_path / "cache").glob("merged-*")) == []
