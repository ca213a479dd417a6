"""litgpt checkpoints become the same model in HF layout; a .pth file that holds more than tensors runs nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.litgpt_folders import BASE, LLAMA, lit_state, write_lit
from support.tiny_layouts import PROMPT, torch_logits
from support.tiny_models import write_model

from macft.conversion.model import convert_model
from macft.errors import ModelError
from macft.weights.layouts.litgpt import is_litgpt
from macft.weights.layouts.litgpt_config import CLASSES
from macft.weights.model_config import read_config
from macft.weights.source import open_model
from macft.weights.tensors.torch_pickle import open_torch_file

pytestmark = pytest.mark.torch

# of the largest logit: the same float32 numbers, summed by another program
TOLERANCE = 1e-5

_PHI = {
    **BASE, "name": "phi-2", "n_query_groups": 4, "rotary_percentage": 0.5, "shared_attention_norm": True,
    "parallel_residual": True, "bias": True, "lm_head_bias": True, "gelu_approximate": "tanh",
    "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
}  # fmt: skip
_LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 64}
# case: (model type it becomes, litgpt's settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama biased": ("llama", {**LLAMA, "bias": True}),
    "llama wide heads": ("llama", {**LLAMA, "head_size": 32}),
    "llama 3.1 rope": ("llama", {**LLAMA, "rope_adjustments": _LLAMA3_ROPE}),
    "llama condensed rope": ("llama", {**LLAMA, "rope_condense_ratio": 4}),
    "mistral": ("mistral", {**LLAMA, "sliding_window_size": 8}),
    "qwen2": ("qwen2", {**LLAMA, "attn_bias": True}),
    "qwen3": ("qwen3", {**LLAMA, "norm_qk": True, "head_size": 32}),
    "phi": ("phi", _PHI),
    "phi exact gelu": ("phi", {**_PHI, "gelu_approximate": "none"}),
    "phi3": ("phi3", {**LLAMA, "name": "Phi-3-mini-4k-instruct", "sliding_window_size": 8}),
    "phi3 partly rotated": ("phi3", {**LLAMA, "name": "Phi-4-mini-instruct", "rotary_percentage": 0.75}),
}


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_litgpt_itself_computes_the_same_after_import(case, tmp_path):
    """The oracle is litgpt's own model: its class, its state dictionary, its saver, its logits."""
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed; the layout tests below do without")
    from litgpt.utils import save_config

    model_type, settings = CASES[case]
    config = litgpt.Config(**settings)
    torch.manual_seed(0)
    model = litgpt.GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if parameter.ndim == 1 else 0))
        expected = model(torch.tensor([PROMPT]))[0].numpy()
    folder = tmp_path / "lit"
    folder.mkdir()
    save_config(config, folder)
    torch.save({"model": model.state_dict()}, folder / "lit_model.pth")

    report = convert_model(folder, tmp_path / "hf", to="hf")
    assert report.model_type == model_type
    assert distance(torch_logits(tmp_path / "hf"), expected) < TOLERANCE


def test_every_model_type_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(CLASSES)


@pytest.mark.parametrize("interleaved", [False, True], ids=["today", "before"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tensors_in_the_documented_layout_come_out_as_they_went_in(tied, interleaved, tmp_path):
    source = write_model(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    folder = write_lit(tmp_path / "lit", LLAMA, lit_state(source, interleaved=interleaved))
    assert is_litgpt(folder) and not is_litgpt(source)
    convert_model(folder, tmp_path / "back", to="hf")
    before = {t.name: t.read().tobytes() for t in open_model(source).tensors}
    assert {t.name: t.read().tobytes() for t in open_model(tmp_path / "back").tensors} == before
    assert read_config(tmp_path / "back")["tie_word_embeddings"] is tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_parameters_are_read_to_the_bit(dtype, tmp_path):
    expected = torch.randn(5, 3).to(getattr(torch, dtype))
    torch.save({"model": {"w": torch.nn.Parameter(expected)}, "step": 3}, tmp_path / "w.pth")
    (tensor,) = open_torch_file(tmp_path / "w.pth")
    assert (tensor.name, tensor.dtype.name, tensor.shape) == ("w", dtype, (5, 3))
    assert tensor.read().tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert tensor.rows is not None
    assert tensor.rows(1, 3).tobytes() == expected[1:3].contiguous().view(torch.uint8).numpy().tobytes()


def test_views_of_one_storage_are_read_at_their_offsets(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    torch.save({"tail": whole[2:], "scalar": whole[1, 1], "empty": whole[:0]}, tmp_path / "w.pth")
    tail, scalar, empty = (tensor.read() for tensor in open_torch_file(tmp_path / "w.pth"))
    assert tail.tolist() == [[6, 7, 8], [9, 10, 11]] and scalar == 4.0 and empty.shape == (0, 3)


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    folder = write_lit(tmp_path / "lit", LLAMA, {"x": Evil(tmp_path / "ran")})
    with pytest.raises(ModelError, match=r"refused, as its pickle holds the name (posix|nt)\.mkdir"):
        convert_model(folder, tmp_path / "hf", to="hf")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "hf").exists()


def _repacked(path: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            inner = name.partition("/")[2]
            key = inner.replace(".", "_").replace("/", "_")
            new.writestr(name, changed.get(key, old.read(name)))
    return target


@pytest.mark.parametrize("kind", ["text", "cut", "compressed", "pickle", "short", "big", "strided", "number", "old"])
def test_a_broken_weights_file_is_named_with_its_problem(kind, tmp_path):
    good, path = tmp_path / "good.pth", tmp_path / "w.pth"
    torch.save({"w": torch.ones(8, 8)}, good)
    match kind:
        case "text":
            path.write_text("not a checkpoint")
        case "cut":
            path.write_bytes(good.read_bytes()[:-40])
        case "compressed":
            _repacked(good, path, zipfile.ZIP_DEFLATED)
        case "pickle":
            _repacked(good, path, data_pkl=pickle.dumps([1, 2], protocol=2)[:-1])
        case "short":
            _repacked(good, path, data_0=b"\0" * 100)
        case "big":
            _repacked(good, path, byteorder=b"big")
        case "strided":
            torch.save({"w": torch.ones(8, 4).T}, path)
        case "number":
            torch.save({"w": 3}, path)
        case "old":
            torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    says = {
        "text": "cut short", "cut": "cut short", "old": "cut short", "compressed": "compressed",
        "pickle": "damaged", "short": "no 256 bytes", "big": "big-endian", "strided": "strided view",
        "number": "w is a int",
    }  # fmt: skip
    with pytest.raises(ModelError, match=says[kind]) as caught:
        open_torch_file(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp_class_name": "GemmaMLP"}, "GemmaMLP, RMSNorm, parallel_residual False is neither"),
        ({"scale_embeddings": True}, "scale_embeddings is True"),
        ({"norm_class_name": "LayerNorm"}, "neither llama-like nor phi-like"),
        ({"rotary_percentage": 0.5}, "llama rotates whole heads"),
        ({"n_expert": 8}, "n_expert is 8"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, "rope_adjustments is"),
        ({"brand_new": 1}, "brand_new is 1, an unknown setting"),
        ({"n_layer": None}, "n_layer is missing"),
        ({"n_layer": "two"}, "n_layer is 'two', expected a whole number"),
        ({"attn_bias": True, "sliding_window_size": 8}, "qwen2 has no window"),
        ({"sliding_window_size": 8, "sliding_window_indices": [1, 0]}, "leaves out layers"),
        ({"name": "Phi-3-x", "bias": True}, "phi3 has none"),
        ({"n_query_groups": 3}, "not a multiple of n_query_groups"),
    ],
)
def test_a_model_that_no_layout_fits_is_refused_by_its_setting(change, says, tmp_path):
    folder = write_lit(tmp_path / "lit", {**LLAMA, **change}, {"w": torch.ones(1)})
    with pytest.raises(ModelError) as caught:
        convert_model(folder, tmp_path / "hf", to="hf")
    assert says in str(caught.value) and "model_config.yaml" in str(caught.value)


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path):
    state = lit_state(write_model(tmp_path / "hf", "llama"))
    state["transformer.ln_f.weight"] = torch.ones(3)
    state["more"] = torch.ones(1)
    del state["transformer.h.1.norm_2.weight"]
    with pytest.raises(ModelError) as caught:
        convert_model(write_lit(tmp_path / "lit", LLAMA, state), tmp_path / "out", to="hf")
    assert all(
        problem in str(caught.value)
        for problem in (
            "more is not a tensor of this model",
            "transformer.h.1.norm_2.weight is missing",
            "transformer.ln_f.weight has shape [3], expected [64]",
        )
    )
    assert not (tmp_path / "out").exists()


def test_unmerged_lora_and_missing_files_are_refused_with_the_way_out(tmp_path):
    lora = write_lit(tmp_path / "lora", LLAMA, {"transformer.h.0.attn.qkv.lora_A": torch.ones(2, 2)})
    with pytest.raises(ModelError, match="litgpt merge_lora"):
        convert_model(lora, tmp_path / "out", to="hf")
    (lora / "model_config.yaml").unlink()
    assert is_litgpt(lora)
    with pytest.raises(ModelError, match=r"no model_config\.yaml"):
        convert_model(lora, tmp_path / "out", to="hf")


def test_special_tokens_and_tokenizer_files_travel(tmp_path):
    folder = write_lit(tmp_path / "lit", LLAMA, lit_state(write_model(tmp_path / "hf", "llama")))
    (folder / "config.json").write_text('{"model_type": "llama", "bos_token_id": 7, "eos_token_id": [8, 9]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "prompt_style.json").write_text("{}")
    report = convert_model(folder, tmp_path / "out", to="hf")
    config = read_config(tmp_path / "out")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (7, [8, 9], None)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert len(report.notes) == 1 and "--template" in report.notes[0]
