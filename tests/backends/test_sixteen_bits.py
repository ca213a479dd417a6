"""In 16 bits, where every kernel rounds differently: what a model can do is found out as in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.loud_models import write_loud_model
from support.tiny_models import random_examples

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.backends.probes import probe_packed
from macft.backends.torch import backend as torch_backend
from macft.backends.torch.split import SplitModel
from macft.data.batches import collate
from macft.objectives.losses import Sft

pytestmark = pytest.mark.usefixtures("small_threads")


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return write_loud_model(tmp_path_factory.mktemp("loud"))


@pytest.fixture
def other_kernels(monkeypatch):
    """Masked attention that rounds its scores to 16 bits, as one kernel of a GPU does where another does not."""
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, scale=None, **options):
        if attn_mask is None:
            return real(query, key, value, scale=scale, **options)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.transpose(-1, -2)) * scale
        return scores.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1).to(value.dtype) @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


def load_bfloat16(folder, **options) -> torch_backend.TorchModel:
    spec = ModelSpec(folder, LoraSpec(4, 8), precision="bfloat16", packing=True, **options)
    return load_model("torch", spec, OptimizerSpec())


@pytest.mark.usefixtures("other_kernels")
def test_a_model_in_bfloat16_is_split_shares_prompts_and_packs(loud):
    model = load_bfloat16(loud)
    assert model.info.precision == "bfloat16" and model.info.notes == ()
    split = model._split
    packed, plain = probe_packed()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = split.logits(packed), split.logits(plain)
    assert 4 < second.std() < 12, "as far apart as a real model's logits"
    assert not np.allclose(first, second, rtol=2e-2, atol=2e-2), "rounding shows"
    assert (split.splits, split.shares_prompts, split.packs) == (True, True, True)


def test_rows_whose_examples_see_each_other_are_refused_in_bfloat16(loud, monkeypatch):
    def ignore_positions(self, layout, before=SplitModel.hidden):
        return before(self, {name: value for name, value in layout.items() if name != "positions"})

    monkeypatch.setattr(SplitModel, "hidden", ignore_positions)
    model = load_bfloat16(loud)
    assert not model._split.packs
    assert model.info.notes[0].startswith("packing is off: ")


def test_an_adapter_computes_the_same_bits_with_and_without_casts_of_its_own(loud):
    batch = collate(random_examples(2, seed=3))
    results = []
    for casts in (False, True):
        model = load_bfloat16(loud)
        for module in model._model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                assert module.cast_input_dtype_enabled is False
                module.cast_input_dtype_enabled = casts
        state = {name: value + np.float32(0.01) for name, value in model.trained_state().items()}
        model.set_trained_state(state)
        train_step(model, Sft(), [batch], lr=1e-3, step=0)
        results.append(model.optimizer_state())
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_an_adapter_that_is_only_asked_gives_the_logits_of_training(loud):
    tokens = random_examples(1, seed=5)[0].tokens.tolist()
    logits = []
    for optimizer in (OptimizerSpec(), None):
        model = load_model("torch", ModelSpec(loud, LoraSpec(4, 8), precision="bfloat16"), optimizer)
        model.set_trained_state({name: value + np.float32(0.01) for name, value in model.trained_state().items()})
        logits.append(model.logits(tokens))
    difference = np.sqrt(np.mean(np.square(logits[0] - logits[1])))
    assert difference < 0.02 * logits[0].std()


def test_dora_starts_at_the_base_in_bfloat16(loud):
    tokens = random_examples(1, seed=5)[0].tokens.tolist()
    base = load_model("torch", ModelSpec(loud, None, precision="bfloat16")).logits(tokens)
    spec = ModelSpec(loud, LoraSpec(4, 8, use_dora=True), precision="bfloat16")
    model = load_model("torch", spec, OptimizerSpec())
    weights = {name: p for name, p in model._model.named_parameters() if "base_layer.weight" in name}
    for name, magnitude in model.trained_state().items():
        if name.endswith("lora_magnitude_vector"):
            [weight] = [
                w for full, w in weights.items() if full.startswith(f"{name.removesuffix('.lora_magnitude_vector')}.")
            ]
            np.testing.assert_array_equal(magnitude, torch.linalg.norm(weight.float(), dim=1).numpy())
    difference = np.sqrt(np.mean(np.square(model.logits(tokens) - base)))
    assert difference < 0.05 * base.std()
