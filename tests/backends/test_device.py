"""Which device and compute type PyTorch gets on cards that are not here, told by what CUDA says of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from macft.backends.torch import device as devices
from macft.errors import ModelError

CUDA, CPU, MPS = torch.device("cuda"), torch.device("cpu"), torch.device("mps")
# what the wheels of torch 2.13 for CUDA 13 are built for
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@dataclass(frozen=True)
class Card:
    name: str
    major: int
    minor: int


P100, V100, T4 = Card("Tesla P100", 6, 0), Card("Tesla V100", 7, 0), Card("Tesla T4", 7, 5)
RTX_3060, H100, NEXT = Card("RTX 3060", 8, 6), Card("H100", 9, 0), Card("a card of 2028", 13, 0)


@pytest.fixture
def plug_in(monkeypatch):
    def plug(card: Card, built_for=BUILT_FOR) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (card.major, card.minor))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: card.name)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return plug


@pytest.mark.parametrize(
    ("card", "auto", "bf16"),
    [(T4, "float16", "float16"), (RTX_3060, "bfloat16", "bfloat16"), (H100, "bfloat16", "bfloat16")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_card_computes_in_what_its_tensor_cores_have(plug_in, card, auto, bf16):
    plug_in(card)
    notes: list[str] = []
    assert devices.pick_device() == CUDA
    assert devices.device_name(CUDA) == card.name
    assert str(devices.compute_dtype("auto", CUDA, notes)) == f"torch.{auto}"
    assert str(devices.compute_dtype("bfloat16", CUDA, notes)) == f"torch.{bf16}"
    assert str(devices.compute_dtype("float16", CUDA, notes)) == "torch.float16"
    assert str(devices.compute_dtype("float32", CUDA, notes)) == "torch.float32"
    expected = 2 * ["this GPU has no bfloat16: computing in float16, with a scaled loss"]
    assert notes == (expected if card is T4 else [])


@pytest.mark.parametrize("card", [P100, V100], ids=lambda card: card.name)
def test_a_card_that_this_torch_has_no_code_for_is_refused_before_its_first_kernel(plug_in, card):
    plug_in(card)
    with pytest.raises(ModelError) as refusal:
        devices.pick_device()
    assert str(refusal.value) == (
        f"{card.name} is an sm_{card.major}{card.minor} GPU, and torch {torch.__version__} is built for "
        f"{', '.join(BUILT_FOR)}: install a build for it (https://pytorch.org/get-started/previous-versions/), or hide "
        "the GPU with CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def test_code_for_a_virtual_architecture_serves_newer_cards(plug_in):
    plug_in(NEXT)
    assert devices.pick_device() == CUDA
    plug_in(NEXT, BUILT_FOR[:-1])
    with pytest.raises(ModelError, match=r"^a card of 2028 is an sm_130 GPU"):
        devices.pick_device()


def test_a_cpu_computes_in_float32_and_a_mac_in_bfloat16():
    notes: list[str] = []
    assert devices.compute_dtype("auto", CPU, notes) == torch.float32
    assert devices.compute_dtype("auto", MPS, notes) == torch.bfloat16
    assert devices.compute_dtype("float16", CPU, notes) == torch.float32
    assert notes == ["float16 is not trainable on the CPU: computing in float32"]
