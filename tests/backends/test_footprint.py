"""What training takes by formula: the same bytes that PyTorch keeps, and the table of what fits where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.commands import CHECKOUT
from support.engines import load_model
from support.tiny_models import write_model

import macft.backends.torch.backend  # noqa: F401 (transformers replaces itself when it is first imported)
from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.backends.footprint import GIB, SHAPES, ModelShape, card, fits_text, largest, mac, training_memory
from macft.backends.torch import memory
from macft.docs import fits_table

pytestmark = pytest.mark.usefixtures("small_threads")

HALF = ModelShape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, 151_936, is_tied=True)
THREE = ModelShape("Qwen2.5-3B", 36, 2048, 11_008, 16, 2, 128, 151_936, is_tied=True)


@pytest.mark.parametrize(("shape", "kept"), [(HALF, 53_936), (THREE, 122_040)])
def test_a_layer_keeps_what_was_measured(shape, kept):
    # measured with PyTorch's saved-tensor hooks, rank 8 on every matrix, bfloat16, no dropout
    assert shape.kept_by_layer(8) == kept


@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 64), ("qwen2", 64), ("mistral", 64), ("qwen3", 128)])
def test_the_formula_is_what_pytorch_keeps_to_the_byte(architecture, head_dim, tmp_path):
    shape = ModelShape("", 2, 512, 1536, 8, 2, head_dim, 1, is_tied=True, normalizes_heads=architecture == "qwen3")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = {"head_dim": head_dim} if architecture == "qwen3" else {}
    kept = []
    for layers in (1, 2):
        folder = write_model(tmp_path / str(layers), architecture, **sizes, **more, num_hidden_layers=layers)
        loaded = load_model("torch", ModelSpec(folder, LoraSpec(4, 8), precision="bfloat16"), OptimizerSpec())
        with torch.autocast("cpu", torch.bfloat16):
            kept.append([memory.kept_bytes(loaded._split, 1, tokens) for tokens in (64, 128)])
    assert (kept[1][1] - kept[1][0] - kept[0][1] + kept[0][0]) / 64 == shape.kept_by_layer(4)


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-0.6B", 0.6), ("Qwen3-8B", 8.2), ("Llama-3.3-70B", 70.6)])
def test_shapes_have_the_parameters_that_their_model_cards_say(name, billions):
    [shape] = [shape for shape in SHAPES if shape.name == name]
    assert (shape.block_parameters + shape.embedding_parameters) / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_memory_of_a_step_is_the_sum_of_its_parts():
    device = card("", 24 * GIB)
    weights = 2 * 493_961_216
    # per layer 8 x (q, k, v, o: 1792 + 1024 + 1024 + 1792; gate, up, down: 5760 each), 18 bytes each
    adapter = 24 * 8 * (1792 + 1024 + 1024 + 1792 + 3 * 5760) * 18
    # a sixteenth of what the weights leave, at most 2^26 logits
    head = 16 * 2**26
    plain = training_memory(HALF, device, bits=16, checkpoints=False)
    assert plain == weights + adapter + head + 24 * 53_936 * 2048 / 0.85
    checkpointed = training_memory(HALF, device, bits=16, checkpoints=True)
    assert checkpointed == weights + adapter + head + (24 * 2 * 896 + 53_936) * 2048 / 0.85
    # 0.5 bytes and 4 for each 64; the embedding stays in 16 bits
    blocks = 24 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 4864 * 896)
    assert training_memory(HALF, device, bits=4, checkpoints=True) == checkpointed - blocks * (2 - 0.5625)


def test_on_a_mac_attention_keeps_the_probabilities_of_all_pairs_of_tokens():
    at = mac("", 64 * GIB)
    more = training_memory(HALF, at, bits=16, checkpoints=False) - training_memory(
        HALF, replace(at, keeps_scores=False), bits=16, checkpoints=False
    )
    assert more == pytest.approx(24 * 2 * 14 * 2048 * 2048 / 0.85)


@pytest.mark.parametrize(("gib", "working_set"), [(8, 5.21), (16, 10.67), (32, 21.33), (36, 27), (64, 48)])
def test_a_mac_gives_its_gpu_what_macos_recommends_but_not_the_last_3_gb(gib, working_set):
    assert mac("", gib * GIB).memory / GIB == pytest.approx(working_set, abs=0.01)
    assert mac("", gib * GIB, 5e9).memory == 5e9


def test_a_device_too_small_for_all_fits_none():
    assert largest(card("", GIB), bits=4, checkpoints=True) is None
    assert fits_text(card("", GIB)) == "LoRA, rows of 2048 tokens, computed: up to none in 16 bits, none in 4 bits"


def test_more_memory_never_fits_less():
    order = [None, *SHAPES]
    for bits in (16, 8, 4):
        for checkpoints in (False, True):
            fits = [largest(card("", size * GIB), bits=bits, checkpoints=checkpoints) for size in range(2, 160, 6)]
            places = [order.index(shape) for shape in fits]
            assert places == sorted(places) and places[-1] == len(SHAPES) - (0 if bits < 16 or checkpoints else 1)


@pytest.mark.parametrize(("page", "is_chinese"), [("README.md", False), ("README.zh-CN.md", True)])
def test_the_table_of_what_fits_is_the_formula_s(page, is_chinese):
    assert fits_table(is_chinese=is_chinese) in (CHECKOUT / page).read_text(encoding="utf-8")
