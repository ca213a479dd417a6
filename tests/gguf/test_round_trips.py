"""Every architecture there and back: a transformers model, llama.cpp's converter, our import, the same logits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.gguf_converter import Job, convert
from support.tiny_gguf import llama_cpp, write_spm_model
from support.tiny_tokenizer import write_tiny_model

from macft.gguf.architectures import IMPORTED
from macft.gguf.importer.model import import_gguf

WINDOW = 12
LOCAL = {"rope_theta": 5678.0, "rope_type": "default"}
ROPE = {"rope_theta": 123456.0, "rope_type": "default"}
LLAMA3 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONGROPE = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 3.3],
            "long_factor": [1.5, 2.0, 3.0, 4.5, 6.25, 8.0, 9.5, 11.3]}  # fmt: skip
LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
MOE = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
GEMMA = {"rope_parameters": {**ROPE, "rope_theta": 10000.0},  # the converter writes no base for gemma2
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
         "sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A transformers model type with settings under which every entry of the config shows in the logits."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    spm: bool = False
    runs_in_mlx: bool = True
    tokens: int = 60


CASES = {
    "llama": Case("llama", {"head_dim": 32}),
    "llama_biased": Case("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3_rope": Case("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "qwen2": Case("qwen2"),
    "qwen2_tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3_tied": Case("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 32}, spm=True),
    "gemma3": Case("gemma3_text", {"num_hidden_layers": 8, "sliding_window": WINDOW, "head_dim": 32,
                                   "query_pre_attn_scalar": 32,
                                   "rope_parameters": {"full_attention": ROPE, "sliding_attention": LOCAL}}, spm=True),
    "gemma3_scaled": Case("gemma3_text", {"num_hidden_layers": 6, "sliding_window": WINDOW, "head_dim": 32,
                          "query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0, "rope_parameters": {
                              "full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0},
                              "sliding_attention": LOCAL}}, spm=True, runs_in_mlx=False),
    "gemma2": Case("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}, spm=True,
                   tokens=WINDOW),
    "gemma2_window": Case("gemma2", GEMMA, spm=True, runs_in_mlx=False),
    "phi3": Case("phi3", {"sliding_window": 2047}, spm=True),
    "phi3_longrope": Case("phi3", LONG, spm=True, runs_in_mlx=False),
    "phi3_long_text": Case("phi3", LONG, spm=True, runs_in_mlx=False, tokens=100),
    "phi3_partial": Case("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.75},
                                  "num_key_value_heads": 4, "tie_word_embeddings": True}, spm=True),
    "smollm3": Case("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3_untied": Case("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "head_dim": 32}),
    "qwen3_moe_tied": Case("qwen3_moe", {**MOE, "head_dim": 16, "tie_word_embeddings": True}),
}  # fmt: skip


def write_original(folder: Path, case: Case) -> Path:
    """A random model in float32, saved by transformers, with a small tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = write_spm_model(folder) if case.spm else vocabulary_size(write_tiny_model(folder))
    sizes = {
        "vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": ROPE, "tie_word_embeddings": False,
    }  # fmt: skip
    if case.model_type.startswith("gemma"):
        del sizes["tie_word_embeddings"]
    config = AutoConfig.for_model(case.model_type, **{**sizes, **case.settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def vocabulary_size(folder: Path) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each case original/, model.gguf and imported/; one run of the converter makes all files."""
    root = tmp_path_factory.mktemp("architectures")
    jobs = []
    for name, case in CASES.items():
        original = write_original(root / name / "original", case)
        jobs.append(Job(str(original), str(root / name / "model.gguf"), pre="" if case.spm else "gpt-2"))
    convert(jobs)
    for name in CASES:
        import_gguf(root / name / "model.gguf", root / name / "imported")
    return {name: root / name for name in CASES}


def tokens_of(folder: Path, case: Case) -> list[int]:
    size = json.loads((folder / "original" / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(3)
    return [int(token) for token in rng.integers(3, size, case.tokens)]


def torch_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """[tokens, vocabulary]"""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def test_every_architecture_of_the_table_has_a_case() -> None:
    types = {CASES[name].model_type for name in CASES}
    assert set(IMPORTED.values()) <= types


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_every_weight_comes_back(folders: dict[str, Path], name: str) -> None:
    """To the last bit; where GGUF holds 1 + weight, to the rounding of that sum."""
    before = load_file(folders[name] / "original" / "model.safetensors")
    after = load_file(folders[name] / "imported" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, array in before.items():
        assert after[key].dtype == np.float32, key
        if "gemma" in name and array.ndim == 1:
            np.testing.assert_allclose(after[key], array, rtol=0, atol=1.2e-7)
        else:
            np.testing.assert_array_equal(after[key], array, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original_models(folders: dict[str, Path], name: str) -> None:
    tokens = tokens_of(folders[name], CASES[name])
    before = torch_logits(folders[name] / "original", tokens)
    after = torch_logits(folders[name] / "imported", tokens)
    assert np.abs(before).max() > 0.5
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.mlx
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.runs_in_mlx])
def test_mlx_lm_reads_the_imported_model_alike(folders: dict[str, Path], name: str) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    tokens = tokens_of(folders[name], CASES[name])
    expected = torch_logits(folders[name] / "original", tokens)
    model, _ = load_model(folders[name] / "imported")
    found = np.array(model(mx.array([tokens])))[0]
    # two engines that sum in different orders, logits up to about 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name in CASES if name != "phi3_longrope"])
def test_llama_cpp_computes_what_the_imported_model_does(folders: dict[str, Path], name: str) -> None:
    """phi3_longrope is left out: llama.cpp picks the table by its context size, not by the length of the text."""
    tokens = tokens_of(folders[name], CASES[name])
    vocabulary = json.loads((folders[name] / "imported" / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = {index: piece for piece, index in vocabulary.items()}
    logits = torch_logits(folders[name] / "imported", tokens).astype(np.float64)
    logps = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    # llama.cpp gives no numbers where the likeliest token ends the text, or a character in its middle
    is_plain = [t.isascii() and (len(t) == 1 or t.isalpha()) for t in map(pieces.get, logps.argmax(-1))]
    length = max(index for index, plain in enumerate(is_plain) if plain) + 1
    assert length > 0.6 * len(tokens)
    with llama_cpp(folders[name] / "model.gguf") as oracle:
        expected = oracle.top_logprobs(tokens[:length], 20)
    assert len(expected) == 20
    # llama.cpp looks up the GELU of gemma in a table of half floats
    tolerance = 2e-3 if "gemma" in name else 1e-4
    for token, logprob in expected.items():
        assert logps[length - 1, token] == pytest.approx(logprob, abs=tolerance), (name, token)
