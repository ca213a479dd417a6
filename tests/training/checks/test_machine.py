"""What a machine cannot train is refused before a row of data is read."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from support.fake_gpus import T4, plug_in
from support.toy_backend import toy_settings

from macft.backends import nvidia
from macft.errors import MacftError, MissingPackageError, ModelError, UsageError
from macft.training.checks import machine
from macft.training.run import train

NO_DATA = Path("no-such-file.jsonl")
# quantization_config as each program writes it, or the file beside config.json -> who is named
QUANTIZED = {
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    "modelopt": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    "hqq": {"quantization_config": {"quant_method": "hqq"}},
    "bitnet": {"quantization_config": {"quant_method": "bitnet"}},
}
UNNAMED = {"quantization_config": {"load_in_8bit": True}}  # bitsandbytes before it wrote its name
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def copy_of(model: Path, folder: Path, config: dict[str, object]) -> Path:
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def refusal(folder: Path, engine: str, tmp_path: Path, **settings: object) -> str:
    """The error of a run whose data file does not even exist."""
    with pytest.raises(MacftError) as caught:
        train(toy_settings(folder, NO_DATA, tmp_path / "run", engine, **settings))
    assert not (tmp_path / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize("engine", ["torch", "mlx"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_weights_that_another_program_quantized_are_refused_by_its_name(method, engine, model, tmp_path):
    folder = copy_of(model, tmp_path / "model", QUANTIZED[method])
    assert refusal(folder, engine, tmp_path).startswith(
        f"{folder}: its weights are quantized by {method}, which is not read; take the unquantized model"
    )


def test_bitsandbytes_is_known_by_its_bits(model, tmp_path):
    folder = copy_of(model, tmp_path / "model", UNNAMED)
    assert "quantized by bitsandbytes, which is not read" in refusal(folder, "torch", tmp_path)


@pytest.mark.parametrize("name", BESIDE)
def test_a_description_beside_the_config_counts(name, model, tmp_path):
    folder = copy_of(model, tmp_path / "model", {})
    (folder / name).write_text("{}")
    assert f"quantized by {BESIDE[name]}, which is not read" in refusal(folder, "torch", tmp_path)


def test_a_reference_is_checked_as_the_model_is(model, pair_data, tmp_path):
    folder = copy_of(model, tmp_path / "model", QUANTIZED["awq"])
    settings = toy_settings(model, pair_data, tmp_path / "run", "torch", stage="dpo", ref_model=str(folder))
    with pytest.raises(ModelError, match="quantized by awq"):
        train(settings)


@pytest.fixture
def no_cuda(tmp_path, monkeypatch):
    """A GPU that the driver names, beside a PyTorch that sees none."""
    plug_in(tmp_path / "bin", monkeypatch, T4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def widen(folder: Path, parameters: int) -> None:
    """Let a model's file have one more matrix, of zeros that take no room on disk."""
    size = 2 * parameters
    header = {"extra.weight": {"dtype": "F16", "shape": [parameters], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (folder / "model-extra.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    (folder / "model.safetensors").rename(folder / "model-first.safetensors")


@pytest.mark.usefixtures("no_cuda")
def test_a_large_base_is_not_trained_on_the_cpu_beside_a_gpu(model, tmp_path, monkeypatch):
    folder = copy_of(model, tmp_path / "model", {})
    widen(folder, 1_000_000_000)
    reason = nvidia.why_torch_sees_none(nvidia.visible_cards()[0], nvidia.torch_build())
    assert refusal(folder, "torch", tmp_path) == (
        f"{folder}: 1.0 billion parameters would be trained on the CPU: {reason}; to train there all the same, "
        "hide the GPU: CUDA_VISIBLE_DEVICES= macft train ..."
    )
    # hidden on purpose: the next thing that is wrong is the data
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no-such-file.jsonl" in refusal(folder, "torch", tmp_path)


@pytest.mark.usefixtures("no_cuda")
def test_a_small_base_is_trained_on_the_cpu_with_a_warning(model, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("macft"), "propagate", True)
    train(toy_settings(model, data, tmp_path / "run", "torch", max_steps=1))
    told = [record.getMessage() for record in caplog.records if "computing on the CPU" in record.getMessage()]
    assert len(told) == 1 and "Tesla T4 (driver 580.65.06) is here, but torch " in told[0]


def test_bitsandbytes_that_is_missing_is_told_before_the_data_is_read(model, tmp_path, monkeypatch):
    plug_in(tmp_path / "bin", monkeypatch, T4)
    monkeypatch.setattr(machine, "unused_gpu", lambda _: None)  # PyTorch sees the GPU
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError) as caught:
        train(toy_settings(model, NO_DATA, tmp_path / "run", "torch", quantization_bit=4))
    assert str(caught.value) == "quantization_bit on CUDA needs bitsandbytes: pip install bitsandbytes"
    assert not isinstance(caught.value, UsageError)
