"""What PyTorch is told on CUDA, where no device is needed to see that it is told."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from support.engines import load_model
from support.tiny_models import write_model

from macft import backends
from macft.backends.base import ModelSpec
from macft.backends.torch import device, lora, memory, model, split
from macft.engines import BACKENDS
from macft.errors import ModelError

CUDA = torch.device("cuda")
GIB = 1 << 30


@dataclass(frozen=True)
class FromPretrained(Exception):
    """What transformers would have been asked for."""

    options: dict[str, object]


@pytest.mark.parametrize(
    ("free", "vocabulary", "rows"),
    [
        # 2^26 logits, in steps of 128 rows
        (60 * GIB, 151_936, 384),
        (60 * GIB, 32_000, 2048),
        # a sixteenth of 8 GiB, 16 bytes a logit: 2^25 logits
        (8 * GIB, 32_000, 1024),
        (GIB, 151_936, 128),
    ],
)
def test_the_head_is_computed_in_chunks_of_the_free_memory(free, vocabulary, rows, monkeypatch):
    monkeypatch.setattr(split, "free_memory", lambda _: free)
    assert split._head_rows(vocabulary, CUDA) == rows


def test_attention_that_plans_for_every_shape_is_off(monkeypatch):
    told: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
    assert device.pick_device() == CUDA
    assert told == [False]


def test_bitsandbytes_logs_errors_only(monkeypatch):
    package = ModuleType("bitsandbytes")
    package.__spec__ = ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    logger = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    model._bitsandbytes(8, torch.bfloat16)
    assert logger.level == logging.ERROR


def test_weights_are_loaded_straight_to_the_device(tmp_path, monkeypatch):
    def ask(_folder, **options):
        raise FromPretrained(options)

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", ask)
    spec = ModelSpec(write_model(tmp_path / "model", "llama"), None)
    for where, expected in ((CUDA, {"": CUDA}), (torch.device("cpu"), None)):
        with pytest.raises(FromPretrained) as asked:
            model._pretrained(spec, torch.bfloat16, where)
        assert asked.value.options["device_map"] == expected


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        # under the older name, which the newer one would override
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
    ],
    ids=["nothing", "new", "old", "empty"],
)
def test_memory_is_reserved_in_segments_that_grow(own, told, tiny_model, monkeypatch):
    seen = []

    def settings() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}

    def used(real):
        def function(*arguments, **options):
            seen.append(settings())
            return real(*arguments, **options)

        return function

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    # where a process first uses CUDA: in the question whether it is there, or as a model is loaded
    monkeypatch.setattr(device, "on_gpu", used(device.on_gpu))
    monkeypatch.setattr(model, "pick_device", used(model.pick_device))
    backends._ask(BACKENDS["torch"].gpu_check)
    load_model("torch", ModelSpec(tiny_model("llama"), None))
    assert seen == [told, told]
    # a caller from Python finds its environment as it was, whatever goes wrong
    assert settings() == own
    with pytest.raises(ModelError):
        load_model("torch", ModelSpec(tiny_model("llama") / "not here", None))
    assert settings() == own


def test_what_does_not_fit_twice_in_float32_is_verified_on_the_cpu(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    size = sum(np.prod(tensor.shape) for tensor in memory.open_model(folder).tensors) * 4
    monkeypatch.setattr(memory, "pick_device", lambda: CUDA)
    for free, expected in ((2 * size, "cuda"), (2 * size - 1, "cpu")):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.device_for_float32(folder).type == expected


def test_a_saved_parameter_is_one_copy():
    parameter = torch.nn.Parameter(torch.ones(4))
    saved = lora.to_numpy(parameter)
    with torch.no_grad():
        parameter.fill_(2.0)
    assert saved.tolist() == [1.0] * 4 and saved.flags.writeable
    # from another type the conversion is the copy, and there is no second one
    halves = torch.ones(1 << 20, dtype=torch.bfloat16)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        lora.to_numpy(halves)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0) == (
        4 << 20
    )
