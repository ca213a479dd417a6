"""What nvidia-smi and torch/version.py say of a machine, which engine `auto` takes there, and what is told of it."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.fake_gpus import H100, P100, RTX_3060, T4, install_torch, plug_in, questions

import macft.backends.torch.backend  # noqa: F401 (transformers replaces itself when it is first imported)
from macft.backends import load_model, unused_gpu
from macft.backends.base import ModelSpec
from macft.backends.nvidia import (
    Card,
    TorchBuild,
    build_for,
    driver_fails,
    torch_build,
    visible_cards,
    why_torch_sees_none,
)
from macft.backends.torch.device import idle_gpus_note
from macft.engines import BACKENDS
from macft.process_group import ONE_PROCESS
from macft.training.checks.machine import check_machine
from macft.weights.folder import ModelFolder

NEWEST = "pip install --force-reinstall torch"
OLDER = "pip install --force-reinstall 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
T4_CARD = Card("Tesla T4", "580.65.06", 15_360 << 20, (7, 5))

ASK = """
import json, sys
import macft.backends as backends
from macft.backends.nvidia import torch_build
backends._ask = lambda check: check.endswith("is_fast")  # MLX is fast on this CPU
build = torch_build()
print(json.dumps([backends.choose_backend("auto"), build and [build.version, build.cuda], "torch" in sys.modules]))
"""


def ask() -> list[object]:
    """[what auto chooses beside a fast MLX, version and CUDA of torch's build, whether torch was imported]."""
    ran = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    return list(json.loads(ran.stdout))


def test_the_driver_names_its_gpus(tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4, H100)
    assert visible_cards() == (T4_CARD, Card("NVIDIA H100 80GB HBM3", "580.65.06", 81_559 << 20, (9, 0)))


def test_an_older_driver_does_not_tell_the_capability(tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, replace(T4, driver="450.80.02"), is_old=True)
    assert visible_cards() == (Card("Tesla T4", "450.80.02", 15_360 << 20, None),)


def test_an_nvidia_smi_that_fails_is_no_gpu(tmp_path, monkeypatch):
    plug_in(tmp_path / "broken", monkeypatch, T4, fails=True)
    assert visible_cards() == () and driver_fails()
    plug_in(tmp_path / "empty", monkeypatch)  # "No devices were found"
    assert visible_cards() == () and driver_fails()


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_on_purpose_is_not_there(value, tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_cards() == () and not driver_fails()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_cards() == (T4_CARD,)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("1", ["NVIDIA H100 80GB HBM3"]),
        ("1, 0", ["NVIDIA H100 80GB HBM3", "Tesla T4"]),
        ("GPU-0", ["Tesla T4", "NVIDIA H100 80GB HBM3"]),
        # what CUDA then does not see is told of all the same
        ("7", ["Tesla T4", "NVIDIA H100 80GB HBM3"]),
    ],
)
def test_the_gpu_that_is_told_of_is_the_one_that_was_chosen(value, names, tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4, H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert [card.name for card in visible_cards()] == names


def test_auto_takes_pytorch_beside_a_gpu_and_imports_nothing_to_know_it(tmp_path, monkeypatch):
    plug_in(tmp_path / "bin", monkeypatch, T4)
    install_torch(tmp_path / "site", monkeypatch, T4)
    assert ask() == ["torch", ["2.13.0", "13.0"], False]


def test_auto_does_not_take_a_pytorch_without_cuda_for_its_gpu(tmp_path, monkeypatch):
    plug_in(tmp_path / "bin", monkeypatch, T4)
    install_torch(tmp_path / "site", monkeypatch, cuda=None)
    assert ask() == ["mlx", ["2.13.0+cpu", None], False]


def test_auto_does_not_take_pytorch_for_an_nvidia_smi_that_fails(tmp_path, monkeypatch):
    plug_in(tmp_path / "bin", monkeypatch, T4, fails=True)
    install_torch(tmp_path / "site", monkeypatch, T4)
    assert ask() == ["mlx", ["2.13.0", "13.0"], False]


def test_the_build_of_the_installed_pytorch_is_read_as_it_says_itself():
    assert torch_build() == TorchBuild(torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(
    ("card", "build", "said"),
    [
        (
            T4_CARD,
            TorchBuild("2.13.0+cpu", None),
            f"Tesla T4 (driver 580.65.06) is here, but torch 2.13.0+cpu is a build without CUDA: {NEWEST}",
        ),
        (
            replace(T4_CARD, driver="535.183.01"),
            TorchBuild("2.13.0+cpu", None),
            f"Tesla T4 (driver 535.183.01) is here, but torch 2.13.0+cpu is a build without CUDA: {OLDER}",
        ),
        (
            replace(T4_CARD, driver="570.86.10"),
            TorchBuild("2.13.0", "13.0"),
            "Tesla T4 (driver 570.86.10) is here, but torch 2.13.0 is built for CUDA 13.0, which needs driver 580 or "
            f"newer: update the driver, or {OLDER}",
        ),
        (
            replace(T4_CARD, driver="470.82.01"),
            TorchBuild("2.13.0+cu126", "12.6"),
            "Tesla T4 (driver 470.82.01) is here, but torch 2.13.0+cu126 is built for CUDA 12.6, which needs driver "
            "525 or newer: update the driver",
        ),
        (
            T4_CARD,
            TorchBuild("2.13.0", "13.0"),
            "Tesla T4 (driver 580.65.06) is here, but torch 2.13.0 (CUDA 13.0) sees no GPU: "
            "python -c 'import torch; torch.cuda.init()' says why",
        ),
        (T4_CARD, None, "Tesla T4 (driver 580.65.06) is here, and PyTorch is not: pip install 'macft[torch]'"),
    ],
)
def test_why_pytorch_sees_no_gpu_comes_with_the_driver_and_the_remedy(card, build, said, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert why_torch_sees_none(card, build) == said


def test_a_number_that_names_no_gpu_is_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = why_torch_sees_none(T4_CARD, TorchBuild("2.13.0", "13.0"))
    assert "sees no GPU; CUDA_VISIBLE_DEVICES is '7': " in said


@pytest.mark.parametrize(("gpu", "command"), [(P100, OLDER), (T4, NEWEST), (RTX_3060, NEWEST), (H100, NEWEST)])
def test_the_build_for_a_gpu_has_code_for_it(gpu, command):
    assert build_for(Card(gpu.name, gpu.driver, 0, (gpu.major, gpu.minor))) == command


@pytest.fixture
def without_cuda(monkeypatch):
    """This PyTorch sees no GPU, whatever machine the tests run on, and MLX has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("without_cuda")
def test_a_gpu_that_is_not_used_is_told_once(tmp_path, monkeypatch, tiny_model, caplog):
    plug_in(tmp_path, monkeypatch, T4)
    monkeypatch.setattr(logging.getLogger("macft"), "propagate", True)
    for _ in range(2):
        load_model("torch", ModelSpec(tiny_model("llama"), None), None, ONE_PROCESS)
    assert [record.getMessage() for record in caplog.records] == [
        f"computing on the CPU: {why_torch_sees_none(T4_CARD, torch_build())}"
    ]


@pytest.mark.usefixtures("without_cuda")
def test_a_process_asks_nvidia_smi_once(tmp_path, monkeypatch, tiny_model):
    plug_in(tmp_path, monkeypatch, T4)
    check_machine("torch", [ModelFolder("llama", tiny_model("llama"))], None)
    load_model("auto", ModelSpec(tiny_model("llama"), None), None, ONE_PROCESS)
    assert questions(tmp_path) == ["--query-gpu=compute_cap,memory.total,driver_version,name"]


@pytest.mark.usefixtures("without_cuda")
def test_where_no_gpu_is_or_where_it_is_hidden_nothing_is_told(tmp_path, monkeypatch):
    plug_in(tmp_path / "broken", monkeypatch, T4, fails=True)
    assert unused_gpu("torch") is None
    plug_in(tmp_path / "bin", monkeypatch, T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpu("mlx") is None


@pytest.mark.parametrize("engine", BACKENDS.values(), ids=lambda engine: engine.name)
def test_what_an_engine_is_asked_of_the_machine_is_a_function_of_it(engine):
    for check in filter(None, (engine.gpu_check, engine.cpu_check)):
        module, _, function = check.partition(":")
        assert isinstance(getattr(importlib.import_module(module), function)(), bool)


@pytest.mark.parametrize(("count", "said"), [(1, []), (4, ["4 GPUs visible, 1 used: "])])
def test_gpus_that_stay_idle_are_told(count, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    notes = idle_gpus_note(torch.device("cuda"))
    assert [note[: len("4 GPUs visible, 1 used: ")] for note in notes] == said
    assert idle_gpus_note(torch.device("cpu")) == []
