"""A new adapter on top of an old one: what is written does both on the bare base, and training goes on from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.pair_oracle import scores
from support.toy_backend import ENGINES, toy_settings

from macft.backends.adapters import spec_of_adapter
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train
from macft.weights.adapters.peft import Adapter, AdapterConfig, read_adapter, write_adapter
from macft.weights.adapters.stack import stack_adapters, unstack_adapter
from macft.weights.folder import weights_hash

pytestmark = pytest.mark.usefixtures("small_threads", "cache")

PREFIX = "base_model.model."
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# (rank, alpha, modules, rsLoRA) of the old adapter, and of the new one
SHAPES = {
    "the same modules": ((4, 8.0, ATTENTION, False), (4, 8.0, ATTENTION, False)),
    "other ranks and scales": ((5, 3.0, ATTENTION, False), (2, 16.0, ATTENTION, False)),
    "modules of only one": ((4, 8.0, ("q_proj", "up_proj"), False), (3, 6.0, ("q_proj", "down_proj"), False)),
    "old rsLoRA": ((4, 3.0, ATTENTION, True), (2, 4.0, MLP, False)),
    "new rsLoRA": ((4, 8.0, ATTENTION + MLP, False), (3, 5.0, ATTENTION, True)),
    "one layer": ((4, 8.0, ATTENTION, False), (3, 5.0, ("layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"), False)),
}


@pytest.fixture(scope="module")
def data(pair_data) -> Path:
    return pair_data


def random_adapter(
    folder: Path, model: Path, shape: tuple[int, float, tuple[str, ...], bool], *, seed: int = 0
) -> Adapter:
    """An adapter on disk whose two matrices both are random, so that it changes what the model says."""
    rank, alpha, targets, use_rslora = shape
    rng = np.random.default_rng(seed)
    state = {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and module.endswith(targets):
            height, width = weight.shape
            state[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(0, 0.1, (rank, width)).astype(np.float32)
            state[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(0, 0.1, (height, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    write_adapter(folder, AdapterConfig(str(model), rank, alpha, 0.0, targets, use_rslora), state, weights_hash(model))
    return read_adapter(folder)


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    """module -> what the adapter adds to its weight, float64."""
    scale = spec_of_adapter(adapter).scale
    return {
        name.removesuffix(".lora_A.weight"): scale
        * adapter.state[name.replace("_A", "_B")].astype(np.float64)
        @ adapter.state[name].astype(np.float64)
        for name in adapter.state
        if name.endswith("lora_A.weight")
    }


def sum_of_deltas(one: Adapter, two: Adapter) -> dict[str, np.ndarray]:
    first, second = deltas(one), deltas(two)
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in first.keys() | second.keys()}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_stack_adds_what_both_add_and_gives_back_the_second_to_the_bit(kind, model, tmp_path):
    old, new = (random_adapter(tmp_path / str(i), model, shape, seed=i) for i, shape in enumerate(SHAPES[kind]))
    first, second = spec_of_adapter(old), spec_of_adapter(new)
    stacked = stack_adapters(old.state, first.rank, first.scale, new.state, second.scale)
    expected = sum_of_deltas(old, new)
    assert stacked.keys() == {f"{name}.lora_{side}.weight" for name in expected for side in "AB"}
    for name, delta in expected.items():
        a, b = stacked[f"{name}.lora_A.weight"], stacked[f"{name}.lora_B.weight"]
        assert (a.dtype, b.dtype) == (np.float32, np.float32) and a.shape[0] == first.rank + second.rank
        assert np.abs(second.scale * b.astype(np.float64) @ a - delta).max() < 1e-6 * np.abs(delta).max()
    back = unstack_adapter(stacked, first.rank, new.config.target_modules)
    assert back.keys() == new.state.keys()
    assert all(np.array_equal(back[name], new.state[name]) for name in back)


@pytest.mark.torch
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_written_does_both_on_the_bare_base(engine, kind, model, data, tmp_path):
    """PEFT gives, on the bare base, what the trained policy said in its last evaluation; the old part is unchanged."""
    old_shape, (rank, alpha, targets, use_rslora) = SHAPES[kind]
    old = random_adapter(tmp_path / "old", model, old_shape)
    keys = {
        **{"stage": "dpo", "adapter_name_or_path": str(old.folder), "create_new_adapter": True, "val_size": 4},
        **{"lora_rank": rank, "lora_alpha": alpha, "lora_target": ",".join(targets), "use_rslora": use_rslora},
        **{"max_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5},
    }
    settings = toy_settings(model, data, tmp_path / "out", engine, **keys)
    train(settings)
    rows = read_log(tmp_path / "out")
    valid = prepare(settings).valid
    start = scores(model, valid, old.folder)
    said = scores(model, valid, tmp_path / "out")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert [rows[-1]["eval_logps/chosen"], rows[-1]["eval_logps/rejected"]] == pytest.approx(
        list(said.mean(0)[:2]), rel=1e-5
    )
    margins = 0.1 * (said - start)[:, 0] - 0.1 * (said - start)[:, 1]
    assert rows[-1]["eval_rewards/margins"] == pytest.approx(margins.mean(), abs=2e-5)
    assert np.abs(said - start).max() > 0.01, "the new adapter has learned something"
    assert np.abs(start - scores(model, valid)).max() > 1, "the old adapter does something"

    written = read_adapter(tmp_path / "out")
    assert (written.config.rank, written.config.use_rslora) == (old.config.rank + rank, False)
    old_rank, ratio = old.config.rank, spec_of_adapter(old).scale / spec_of_adapter(written).scale
    for name, value in old.state.items():
        part = written.state[name][:old_rank] if "_A" in name else written.state[name][:, :old_rank] / ratio
        assert np.abs(part - value).max() <= 1e-6 * np.abs(value).max()
    checkpoint = read_adapter(tmp_path / "out" / "checkpoint-5")
    assert all(np.array_equal(checkpoint.state[name], value) for name, value in written.state.items())


@pytest.mark.torch
@pytest.mark.parametrize("kind", SHAPES)
def test_logits_of_a_stack_in_peft_are_those_of_merged_weights(kind, model, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    old, new = (random_adapter(tmp_path / str(i), model, shape, seed=i) for i, shape in enumerate(SHAPES[kind]))
    first, second = spec_of_adapter(old), spec_of_adapter(new)
    state = stack_adapters(old.state, first.rank, first.scale, new.state, second.scale)
    rank = first.rank + second.rank
    targets = tuple(sorted({*old.config.target_modules, *new.config.target_modules}))
    (tmp_path / "both").mkdir()
    config = AdapterConfig(str(model), rank, second.scale * rank, 0.0, targets)
    write_adapter(tmp_path / "both", config, state, weights_hash(model))

    tokens = torch.arange(3, 60)[None]
    load = AutoModelForCausalLM.from_pretrained
    merged = load(model, dtype=torch.float32)
    with torch.inference_mode():
        bare = merged(tokens).logits.clone()
        parameters = dict(merged.named_parameters())
        for name, delta in sum_of_deltas(old, new).items():
            parameters[f"{name.removeprefix(PREFIX)}.weight"] += torch.from_numpy(delta).float()
        expected = merged(tokens).logits
        found = PeftModel.from_pretrained(load(model, dtype=torch.float32), tmp_path / "both")(tokens).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((bare - expected).abs().max()) > 0.1 * float(expected.abs().max())
