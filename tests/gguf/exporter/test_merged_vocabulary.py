"""Adapters that grew the vocabulary, as GGUF files: llama.cpp computes what PEFT does on the resized base."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import write_model
from support.tiny_tokenizer import CHATML, write_tiny_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import macft

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

NEW = ["<|one|>", "<|two|>", "<|three|>"]
SETTINGS = {
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "new tokens": {"trainable_token_indices": None},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


def write_adapter(base: Path, folder: Path, **settings) -> int:
    """An adapter of PEFT on a tied base, which learned three tokens; how many the base has."""
    write_tiny_model(folder, CHATML)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    count = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(NEW)
    tokenizer.save(str(folder / "tokenizer.json"))
    if "trainable_token_indices" in settings:
        settings["trainable_token_indices"] = list(range(count, count + len(NEW)))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(count + len(NEW), mean_resizing=False)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return count


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("base"), CHATML)
    count = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return write_model(folder, "llama", vocab_size=count)


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_computes_what_peft_does_and_knows_the_new_tokens(name, base, tmp_path):
    count = write_adapter(base, tmp_path / "adapter", **SETTINGS[name])
    # verifying compares token ids of all special tokens, and next tokens with those of PEFT on the resized base
    report = macft.export_gguf(
        base, tmp_path / "model.gguf", adapters=[tmp_path / "adapter"], quants="f32", verify=True
    )
    assert any(f"{count + len(NEW)} rows" in note for note in report.notes)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents()[count:] == NEW
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == [64, count + len(NEW)]
    assert ("output.weight" in shapes) == (name in ("both saved", "lora on the embedding"))


def test_the_folder_for_ollama_has_them_too(base, tmp_path):
    count = write_adapter(base, tmp_path / "adapter", **SETTINGS["new tokens"])
    report = macft.export_ollama(base, tmp_path / "out", adapters=[tmp_path / "adapter"], quant="f32", verify=True)
    reader = gguf.GGUFReader(report.gguf.path)
    assert reader.fields["tokenizer.ggml.tokens"].contents()[count:] == NEW
    assert report.verification["kl"] < 1e-5
