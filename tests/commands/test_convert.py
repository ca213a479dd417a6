"""`macft convert` and `macft export`: what they write, say and refuse, with and without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.commands import CHECKOUT, macft, macft_process
from support.litgpt_folders import LLAMA, lit_state, write_lit
from support.tiny_adapters import write_peft
from support.tiny_gguf import TinyGguf, byte_level, hf_weights, write_gguf
from support.tiny_models import write_mlx_quantized, write_model
from support.toy_backend import write_toy_model

from macft.docs import conversion_table, layout_table
from macft.weights.model_config import read_config

NO_ENGINE = ("torch", "mlx", "mlx_lm", "transformers", "peft", "huggingface_hub")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_toy_model(folder / "model")
    write_peft(folder / "adapter", folder / "model")
    write_mlx_quantized(folder / "model", folder / "quantized", 8)
    write_lit(folder / "lit", LLAMA, lit_state(write_model(folder / "hf", "llama", tie_word_embeddings=False)))
    tiny = byte_level(TinyGguf())
    write_gguf(folder / "tiny.gguf", tiny, hf_weights(tiny))
    return folder


def test_an_adapter_goes_to_mlx_and_back_verified(folder, tmp_path):
    there = macft(
        "convert", "adapter", folder / "adapter", tmp_path / "mlx", "--to", "mlx",
        "--base", folder / "model", "--verify",
    )  # fmt: skip
    assert there.code == 0, there.err
    assert "verified with torch and mlx: the largest difference of " in there.err
    assert "top-1 agrees at 100.0%" in there.err
    assert there.out.startswith(f"{tmp_path / 'mlx'}: an mlx-lm adapter, ")
    back = macft(
        "convert", "adapter", tmp_path / "mlx", tmp_path / "peft", "--to", "peft",
        "--base", folder / "model", "--verify",
    )  # fmt: skip
    assert back.code == 0, back.err
    assert "verified with mlx and torch: " in back.err or "verified with torch and mlx: " in back.err
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapter", tmp_path / "peft"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_model_goes_to_mlx_and_back_verified(folder, tmp_path):
    there = macft("convert", "model", folder / "model", tmp_path / "mlx", "--to", "mlx", "--verify")
    assert there.code == 0, there.err
    assert "the same numbers: up to 0.0001 of the largest logit" in there.err
    assert there.out.endswith(f"talk to it: macft chat {tmp_path / 'mlx'}\n") and "MLX layout" in there.out
    back = macft("convert", "model", tmp_path / "mlx", tmp_path / "hf", "--to", "hf")
    assert (back.code, back.err) == (0, "")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "hf"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_bits_quantize_and_the_tolerance_follows_them(folder, tmp_path):
    command = ("convert", "model", folder / "model", tmp_path / "q", "--to", "mlx", "--bits", "8", "--verify")
    done = macft(*command, "--group-size", "32")
    assert done.code == 0, done.err
    assert "quantized to 8 bits: up to 0.0625 of the spread" in done.err
    setting = read_config(tmp_path / "q")["quantization"]
    assert (setting["bits"], setting["group_size"]) == (8, 32)


def test_a_quantized_model_is_dequantized_to_hf(folder, tmp_path):
    done = macft("convert", "model", folder / "quantized", tmp_path / "hf", "--to", "hf", "--verify")
    assert done.code == 0, done.err
    assert "quantization" not in read_config(tmp_path / "hf")


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_a_litgpt_checkpoint_is_converted(to, folder, tmp_path):
    done = macft("convert", "model", folder / "lit", tmp_path / "out", "--to", to)
    assert done.code == 0, done.err
    assert "now model type llama" in done.err
    before, after = (load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "out"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing of the way there is left"


def test_a_litgpt_checkpoint_is_verified_against_litgpt_itself(folder, tmp_path):
    pytest.importorskip("litgpt", reason="litgpt, the oracle, is not installed")
    done = macft("convert", "model", folder / "lit", tmp_path / "out", "--to", "hf", "--verify")
    # litgpt's rope base is not the model's that the tensors come from, but its own setting's
    assert done.code == 0, done.err
    assert "verified with litgpt and " in done.err


def test_a_merged_model_computes_what_base_and_adapters_do(folder, tmp_path):
    second = write_peft(tmp_path / "second", folder / "model", rank=2, seed=1)
    done = macft(
        "export", "merged", folder / "model", "--adapter", folder / "adapter", "--adapter", second,
        "--output", tmp_path / "merged", "--verify",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "merged 4 modules" in done.err and "verified with " in done.err and "top-1 agrees at 100.0%" in done.err
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "merged"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}


def test_a_quantized_base_is_requantized_with_a_warning(folder, tmp_path):
    done = macft(
        "export", "merged", folder / "quantized", "--adapter", folder / "adapter", "--output", tmp_path / "merged",
        "--to", "mlx", "--requantize", "--verify",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "warning: quantizing erased " in done.err and "quantized to 8 bits" in done.err


CONVERSIONS = {
    "adapter": ("convert", "adapter", "adapter", "OUT", "--to", "mlx", "--base", "model"),
    "hf to mlx": ("convert", "model", "model", "OUT", "--to", "mlx", "--bits", "4"),
    "mlx to hf": ("convert", "model", "quantized", "OUT", "--to", "hf"),
    "gguf": ("convert", "model", "tiny.gguf", "OUT", "--to", "hf"),
    "litgpt": ("convert", "model", "lit", "OUT", "--to", "mlx"),
    "merged": (
        "export",
        "merged",
        "quantized",
        "--adapter",
        "adapter",
        "--output",
        "OUT",
        "--to",
        "mlx",
        "--bits",
        "4",
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_needs_no_engine(name, folder, tmp_path):
    command = [str(tmp_path / "out") if word == "OUT" else word for word in CONVERSIONS[name]]
    done = macft_process(*command, cwd=folder, without=NO_ENGINE, MACFT_CACHE=str(tmp_path / "cache"))
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'out'}: ") and len(done.out.splitlines()) == 1
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_help_of_the_commands_imports_nothing_heavy():
    heavy = (*NO_ENGINE, "numpy", "yaml", "rich")
    listing = f"print([name for name in {heavy!r} if name in sys.modules])"
    for command in (("convert", "model", "--help"), ("export", "merged", "--help")):
        shown = macft_process(*command, then=listing)
        assert shown.code == 0 and shown.out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (("convert", "model", "model", "model", "--to", "mlx"), 2, "model: exists already"),
        (("convert", "model", "model", "OUT", "--to", "hf", "--bits", "4"), 2, "bits quantizes to MLX's own format"),
        (("convert", "model", "lit", "OUT", "--to", "hf", "--bits", "4"), 2, "bits quantizes to MLX's own format"),
        (("convert", "model", "model", "OUT", "--to", "mlx", "--group-size", "32"), 2, "--group-size does nothing"),
        (("convert", "model", "model", "OUT", "--to", "mlx", "--bits", "7"), 1, "7 bits in groups of 64"),
        (("convert", "model", "nowhere", "OUT", "--to", "hf"), 1, "nowhere"),
        (("convert", "model", "model", "OUT"), 2, "Missing option '--to'"),
        (("convert", "adapter", "adapter", "OUT", "--to", "mlx", "--verify"), 2, "name it with --base"),
        (("convert", "adapter", "adapter", "OUT", "--to", "peft"), 2, "is already an adapter of PEFT"),
        (("convert", "adapter", "model", "OUT", "--to", "mlx"), 1, "no adapter_config.json"),
        (("export", "merged", "model", "--output", "OUT"), 2, "Missing option '--adapter'"),
        (("export", "merged", "model", "--adapter", "adapter", "--output", "adapter"), 2, "exists already"),
        (("export", "merged", "model", "--adapter", "adapter", "--output", "OUT", "--bits", "4"), 2, "own format"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(command, code, says, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    done = macft(*[str(tmp_path / "out") if word == "OUT" else word for word in command])
    assert (done.code, done.out) == (code, "")
    assert says in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == [] and sorted(folder.iterdir()) == before


def test_verification_without_an_engine_says_so_before_any_work(folder, tmp_path):
    command = ("convert", "model", "model", str(tmp_path / "out"), "--to", "mlx", "--verify")
    done = macft_process(*command, cwd=folder, without=NO_ENGINE)
    assert done.code == 1 and "no training engine is installed: pip install" in done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_refused_with_its_shapes(folder, tmp_path):
    wide = write_model(tmp_path / "wide", "llama", intermediate_size=192)
    done = macft("export", "merged", wide, "--adapter", folder / "adapter", "--output", tmp_path / "out")
    assert done.code == 1 and "down_proj: [64, 192] in the model" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", [conversion_table, layout_table])
def test_a_table_in_the_docs_is_the_code_s(table):
    assert table() in (CHECKOUT / "docs" / "weights.md").read_text(encoding="utf-8")


def test_a_merged_model_loads_without_the_adapter_in_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    macft("export", "merged", folder / "model", "--adapter", folder / "adapter", "--output", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"
