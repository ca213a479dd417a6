"""Adapters on disk: what PEFT makes of ours, and what we make of PEFT's."""

from __future__ import annotations

import json
import logging
import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.engines import load_model
from support.toy_backend import ENGINES, curve, toy_settings, write_toy_model
from transformers import AutoModelForCausalLM

from macft.backends.adapters import spec_of_adapter
from macft.backends.base import LoraSpec, ModelSpec
from macft.data.batches import collate
from macft.data.tokenization.table import TokenizedExample
from macft.errors import ConfigError, ModelError
from macft.inference.load import ChatOptions, load_chat_model
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Sft
from macft.training.run import train
from macft.weights.adapters.peft import AdapterConfig, read_adapter, write_adapter
from macft.weights.folder import weights_hash

pytestmark = pytest.mark.usefixtures("small_threads")

SHAPES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alpha 5.5": {"lora_alpha": 5.5},
    "one module of one layer": {"lora_target": "layers.1.self_attn.v_proj,down_proj"},
}


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory) -> Path:
    """A run folder of rank 4, alpha 5.5 on all linear layers."""
    return train(toy_settings(model, data, tmp_path_factory.mktemp("run") / "out", "mlx", lora_alpha=5.5))


def batch() -> NumpyBatch:
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, 300, length).astype(np.int32) for length in (23, 17)]
    return collate([TokenizedExample(row, np.arange(len(row)) > 0) for row in rows])


def peft_logps(model: torch.nn.Module) -> np.ndarray:
    """[rows, T-1] of the batch by transformers and PEFT without macft; 0 at padding."""
    ours = batch()
    tokens = torch.from_numpy(ours.tokens).long()
    with torch.inference_mode():
        logits = model.eval()(input_ids=tokens).logits.float()
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0].numpy()
    return np.where(ours.loss_mask[:, 1:], logps, 0.0)


def our_logps(engine: str, base: Path, folder: Path) -> np.ndarray:
    adapter = read_adapter(folder)
    backend = load_model(engine, ModelSpec(folder=base, lora=spec_of_adapter(adapter), precision="float32"))
    backend.set_trained_state(adapter.state)
    return backend.logps(batch(), Sft().positions(batch()))


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_peft_loads_what_was_trained_without_a_warning(engine, shape, model, data, tmp_path):
    train(toy_settings(model, data, tmp_path / "out", engine, **SHAPES[shape]))
    base = AutoModelForCausalLM.from_pretrained(model)
    plain = peft_logps(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    theirs = peft_logps(loaded)
    assert np.abs(theirs - plain).max() > 0.1, "the adapter does nothing: the test would be blind"
    for reader in ("mlx", "torch"):
        # log-probabilities near 10, where a float32 step is 1e-6
        assert np.abs(our_logps(reader, model, tmp_path / "out") - theirs).max() < 2e-5


def test_the_base_is_named_as_typed_and_by_its_hash(model, trained):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 5.5, "LORA")
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    with safe_open(trained / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["base_weights"] == weights_hash(model)
        assert file.metadata()["format"] == "pt"
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype(np.float32)}  # noqa: SIM118
    assert read_adapter(trained).base_hash == weights_hash(model)


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_files_of_a_run_are_readable_as_the_umask_says(model, data, tmp_path):
    before = os.umask(0o022)
    try:
        train(toy_settings(model, data, tmp_path / "out", "mlx", save_strategy="epoch"))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert "adapter_model.safetensors" in modes and "optimizer.safetensors" in modes
    assert {mode for name, mode in modes.items() if not name.startswith("checkpoint")} == {0o644}
    assert {mode for name, mode in modes.items() if name.startswith("checkpoint-")} == {0o755}


FOREIGN = {
    "lora": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
    "rslora": LoraConfig(r=3, lora_alpha=7.5, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["self_attn.v_proj", "down_proj"]),
    "ranks and alphas of their own": LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 5, "layers.1.self_attn.q_proj": 1},
        alpha_pattern={"0.*.q_proj": 2.5},
    ),
    "dora, alphas of their own": LoraConfig(
        r=2, lora_alpha=7, use_dora=True, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 3}
    ),
    "listed layers": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], layers_to_transform=[1]),
    "layer 0 as a number": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], layers_to_transform=0),
    "a regular expression": LoraConfig(r=3, lora_alpha=7, target_modules=r".*\.1\..*(q|up)_proj"),
    "all but some": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]),
    "one layer": LoraConfig(r=3, lora_alpha=7, target_modules=["layers.1.self_attn.q_proj"]),
}


def save_foreign(model: Path, config: LoraConfig, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(1)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), replace(config, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype).float())
    theirs.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return theirs


@pytest.mark.torch
@pytest.mark.parametrize("shape", FOREIGN)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_peft_computes_the_same_here(engine, shape, model, tmp_path):
    theirs = save_foreign(model, FOREIGN[shape], tmp_path)
    assert np.abs(our_logps(engine, model, tmp_path) - peft_logps(theirs)).max() < 2e-5


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_16_bits_is_read_exactly(dtype, model, tmp_path):
    theirs = save_foreign(model, FOREIGN["lora"], tmp_path, dtype)
    assert {value.dtype for value in read_adapter(tmp_path).state.values()} == {np.dtype(np.float32)}
    assert np.abs(our_logps("torch", model, tmp_path) - peft_logps(theirs)).max() < 2e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", "lm_head"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("trainable_token_indices", [3]),
        ("trainable_token_indices", {"embed_tokens": 3}),
        ("target_parameters", ["experts.weight"]),
        ("init_lora_weights", "pissa"),
        ("use_qalora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("peft_type", "LOHA"),
        ("target_modules", []),
    ],
)
def test_settings_that_compute_differently_are_refused_by_name(key, value, trained, tmp_path):
    config = json.loads((trained / "adapter_config.json").read_text()) | {key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((trained / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=key):
        read_adapter(tmp_path)


def test_a_rank_that_the_tensors_do_not_have_is_refused_for_every_module(trained, tmp_path):
    config = json.loads((trained / "adapter_config.json").read_text()) | {"rank_pattern": {"q_proj": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((trained / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError) as error:
        read_adapter(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert all("are of rank 4, the configuration says 2" in line for line in lines)


def test_all_problems_of_an_adapter_come_in_one_error(trained, tmp_path):
    wrong = {"arrow_config": {}, "r": 0, "lora_bias": True, "lora_alpha": "x", "modules_to_save": "lm_head"}
    config = json.loads((trained / "adapter_config.json").read_text()) | wrong
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        read_adapter(tmp_path)
    assert all(f"  {key} is " in str(error.value) for key in wrong)
    assert len(str(error.value).splitlines()) == 1 + len(wrong)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "not a readable safetensors file"),
        (lambda folder: cut_short(folder / "adapter_model.safetensors"), "not a readable safetensors file"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no peft_type"),
    ],
)
def test_a_damaged_adapter_is_one_line(spoil, said, tmp_path):
    shape = AdapterConfig("base", rank=2, alpha=4.0, dropout=0.0, target_modules=("q_proj",))
    write_adapter(tmp_path, shape, {"a": np.zeros((2, 3), np.float32)}, "hash")
    spoil(tmp_path)
    with pytest.raises(ModelError, match=said) as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_numbers_that_are_not_finite_are_all_named(tmp_path):
    shape = AdapterConfig("base", rank=2, alpha=4.0, dropout=0.0, target_modules=("q_proj",))
    broken = {"a": np.float32([np.nan]), "b": np.float32([1]), "c": np.float32([np.inf])}
    write_adapter(tmp_path, shape, broken, None)
    with pytest.raises(ModelError) as error:
        read_adapter(tmp_path)
    assert "  a holds NaN" in str(error.value) and "  c holds NaN" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head", "model.layers.0.mlp.experts.3.up_proj"])
def test_what_no_engine_can_attach_to_is_sent_to_merging(module, model, data, tmp_path):
    shape = AdapterConfig("other", rank=2, alpha=4.0, dropout=0.0, target_modules=(module,))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", shape, {"a": np.zeros((2, 3), np.float32)}, "hash")
    keys = {"adapter_name_or_path": str(tmp_path / "adapter")}
    with pytest.raises(ModelError, match="macft export merged") as error:
        train(toy_settings(model, data, tmp_path / "out", "mlx", **keys))
    assert str(tmp_path) in str(error.value) and module in str(error.value)


def test_what_is_written_is_what_is_read(tmp_path):
    shape = AdapterConfig("base", 2, 4.25, 0.1, ("q_proj", "v_proj"), use_rslora=True, use_dora=True)
    state = {"b": np.arange(6, dtype=np.float32).reshape(3, 2).T, "a": np.float32([np.pi])}
    write_adapter(tmp_path, shape, state, "hash")
    found = read_adapter(tmp_path)
    assert (found.config, found.base_hash) == (shape, "hash")
    assert found.state.keys() == state.keys()
    assert all(np.array_equal(found.state[name], state[name]) for name in state)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def load_for_chat(base: Path, adapter: Path, engine: str):
    return load_chat_model(str(base), str(adapter), ChatOptions(engine))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_another_base_warns_or_does_not_fit(engine, model, trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("macft"), "propagate", True)
    load_for_chat(model, trained, engine)
    assert not caplog.records
    other = write_toy_model(tmp_path / "other", "qwen2", seed=9)
    load_for_chat(other, trained, engine)
    assert len(caplog.records) == 1 and f"was trained on {model}" in caplog.text and str(other) in caplog.text
    wide = write_toy_model(tmp_path / "wide", "qwen2", intermediate_size=192)
    with pytest.raises(ModelError) as error:
        load_for_chat(wide, trained, engine)
    assert str(trained) in str(error.value) and "\n" not in str(error.value)
    assert "shape [4, 128], the model expects [4, 192]" in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_on_modules_the_model_lacks_does_not_fit(engine, model, tmp_path):
    shape = AdapterConfig("other", rank=2, alpha=4.0, dropout=0.0, target_modules=("c_attn",))
    write_adapter(tmp_path, shape, {"a": np.zeros((2, 3), np.float32)}, "hash")
    with pytest.raises(ModelError, match="c_attn") as error:
        load_for_chat(model, tmp_path, engine)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_from_an_adapter_with_its_shape(engine, model, data, trained, tmp_path):
    keys = {"adapter_name_or_path": str(trained), "learning_rate": 1e-9, "num_train_epochs": 1}
    settings = toy_settings(model, data, tmp_path / "out", engine, **keys)
    settings = settings.model_copy(update={"lora_rank": 8})
    settings.model_fields_set.discard("lora_rank")
    train(settings)
    before, after = read_adapter(trained), read_adapter(tmp_path / "out")
    assert after.config == before.config
    assert max(float(np.abs(before.state[name] - after.state[name]).max()) for name in before.state) < 1e-7
    # the last loss of the first run, rows and all, is where the second starts
    assert curve(tmp_path / "out")[0][1] < 0.9 * curve(trained)[0][1]


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_from_an_adapter_with_copies_of_the_base(engine, model, data, trained, tmp_path):
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), trained)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    name = "base_model.model.model.embed_tokens.weight"
    assert name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    keys = {"learning_rate": 1e-9, "num_train_epochs": 1, "lora_alpha": 5.5}
    for adapter, out in ((trained, "plain"), (tmp_path / "adapter", "copies")):
        train(toy_settings(model, data, tmp_path / out, engine, adapter_name_or_path=str(adapter), **keys))
    assert curve(tmp_path / "copies") == curve(tmp_path / "plain")
    # a copy that differs was trained
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state[name][0, 0] += 1
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight of the model itself.*macft export merged"):
        train(
            toy_settings(model, data, tmp_path / "new", engine, adapter_name_or_path=str(tmp_path / "adapter"), **keys)
        )


def test_a_key_that_contradicts_the_adapter_is_an_error(model, data, trained, tmp_path):
    keys = {"adapter_name_or_path": str(trained), "lora_rank": 16, "lora_alpha": 8.0, "use_dora": True}
    with pytest.raises(ConfigError) as error:
        train(toy_settings(model, data, tmp_path / "out", "mlx", lora_target="q_proj", **keys))
    for text in ("lora_rank is 16, the adapter has 4", "lora_alpha is 8.0, the adapter has 5.5", "use_dora is True"):
        assert text in str(error.value)
    assert "lora_target is q_proj, the adapter has" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_template_of_the_adapter_is_the_one_trained_with(model, data, trained, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((trained / name).read_bytes())
    own = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    (adapter / "chat_template.jinja").write_text(own)
    train(toy_settings(model, data, tmp_path / "out", "mlx", adapter_name_or_path=str(adapter), max_steps=1))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_adapter_changes_nothing(engine, model):
    backend = load_model(engine, ModelSpec(folder=model, lora=None, precision="float32"))
    plain = backend.logps(batch(), Sft().positions(batch()))
    backend = load_model(engine, ModelSpec(folder=model, lora=LoraSpec(rank=4, alpha=8), precision="float32"))
    assert np.array_equal(backend.logps(batch(), Sft().positions(batch())), plain)
