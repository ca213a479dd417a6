"""What a merged model says is what its base says with the adapter, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.engines import load_model
from support.tiny_models import write_model
from support.toy_backend import ENGINES, toy_settings, write_rows, write_toy_model
from transformers import AutoModelForCausalLM

from macft.backends.adapters import spec_of_adapter
from macft.backends.base import LoraSpec, MergedAdapter, ModelSpec, Sampling
from macft.conversion.merged import export_merged
from macft.objectives.batch import Batch
from macft.training.run import train
from macft.weights.adapters.peft import read_adapter
from macft.weights.folder import ModelFolder

pytestmark = pytest.mark.usefixtures("small_threads")

PROMPTS = [[5, 9, 3, 7], [11, 2, 8, 6, 4, 10], [20, 21]]


def answers(engine: str, folder: Path, lora: LoraSpec | None = None, state=None) -> list[list[int]]:
    """Greedy continuations of the prompts, 24 tokens each."""
    backend = load_model(engine, ModelSpec(folder=folder, lora=lora, precision="float32"))
    if state is not None:
        backend.set_trained_state(state)
    return [
        list(backend.generate(prompt, max_new_tokens=24, stop_ids=frozenset(), sampling=Sampling()))
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_merged_model_answers_token_by_token_as_base_and_adapter(engine, options, tmp_path):
    base = write_toy_model(tmp_path / "base", "qwen3")
    rows = write_rows(tmp_path / "rows.jsonl")
    train(toy_settings(base, rows, tmp_path / "run", engine, **options))
    adapter = read_adapter(tmp_path / "run")
    export_merged(ModelFolder(str(base), base), [adapter], tmp_path / "merged")
    with_adapter = answers(engine, base, spec_of_adapter(adapter), adapter.state)
    assert answers(engine, tmp_path / "merged") == with_adapter
    assert answers(engine, base) != with_adapter, "the adapter changes nothing: the test would be blind"


@pytest.mark.mlx
@pytest.mark.torch
def test_an_adapter_trained_by_peft_gives_its_logits_on_the_mlx_backend(tmp_path):
    base = write_model(tmp_path / "base", "qwen2")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 190, (4, 20))
    for _ in range(5):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=tokens).logits[:, :-1], dim=-1)
    expected = table.gather(2, tokens[:, 1:, None])[..., 0].numpy()
    adapter = read_adapter(tmp_path / "adapter")
    backend = load_model("mlx", ModelSpec(folder=base, lora=spec_of_adapter(adapter), precision="float32"))
    backend.set_trained_state(adapter.state)
    rows = tokens.numpy().astype(np.int32)
    batch = Batch(rows, np.ones_like(rows, dtype=bool), np.full(4, 20, dtype=np.int32))
    found = backend.logps(batch, np.ones((4, 19), dtype=bool))
    # log-probabilities near 10: a float32 step there is 1e-6
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_takes_a_dora_adapter_into_its_base_computes_what_the_adapter_does(engine, tmp_path):
    base = write_toy_model(tmp_path / "base", "qwen3")
    rows = write_rows(tmp_path / "rows.jsonl")
    train(toy_settings(base, rows, tmp_path / "run", engine, use_dora=True))
    adapter = read_adapter(tmp_path / "run")
    batch = Batch(np.array([PROMPTS[1]], np.int32), np.ones((1, 6), dtype=bool), np.array([6], np.int32))
    everywhere = np.ones((1, 5), dtype=bool)
    found = []
    for spec in (
        ModelSpec(folder=base, lora=spec_of_adapter(adapter), precision="float32"),
        ModelSpec(
            folder=base,
            lora=None,
            merged_adapter=MergedAdapter(spec_of_adapter(adapter), adapter.state),
            precision="float32",
        ),
    ):
        backend = load_model(engine, spec)
        if spec.lora is not None:
            backend.set_trained_state(adapter.state)
        found.append(backend.logps(batch, everywhere))
    assert np.abs(found[0] - found[1]).max() < 2e-5
