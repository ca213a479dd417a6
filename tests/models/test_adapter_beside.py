"""An adapter in the model's own folder is no part of the model: neither engine applies it unless it is named."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import macft
from support.engines import load_model
from support.toy_backend import ENGINES, curve, toy_settings

from macft.api import conversions
from macft.backends import load_logits_module
from macft.backends.base import ModelSpec
from macft.errors import ModelError
from macft.models.locate import resolve_model
from macft.training.run import train
from macft.weights.folder import weights_hash

pytestmark = pytest.mark.usefixtures("small_threads")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def both(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as hubs often hold it: the model, and an adapter that was trained on it."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("both") / "model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_the_logits_are_those_of_the_model_alone_and_with_the_named_adapter_those_of_both(engine, model, adapter, both):
    alone, beside = (
        load_model(engine, ModelSpec(folder, None, precision="float32")).logits(PROMPT) for folder in (model, both)
    )
    np.testing.assert_array_equal(beside, alone)
    module = load_logits_module(engine)
    np.testing.assert_array_equal(module.logits(both, [], PROMPT), module.logits(model, [], PROMPT))
    if engine == "torch":  # PEFT reads a folder as an adapter, mlx-lm does not
        named, expected = (module.logits(base, [folder], PROMPT) for base, folder in ((both, both), (model, adapter)))
        np.testing.assert_array_equal(named, expected)
        assert np.abs(named - alone).max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_starts_from_the_model_alone(kind, engine, model, both, data, tmp_path):
    curves = []
    for name, base in (("alone", model), ("beside", both)):
        train(toy_settings(base, data, tmp_path / name, engine, finetuning_type=kind, max_steps=2))
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1]


def test_every_command_says_that_the_adapter_is_not_applied(both, data, tmp_path):
    said = f"{both} holds an adapter beside the model, which is applied only where it is named as the adapter: "
    run = ("train", f"model_name_or_path={both}", f"dataset={data}", f"output_dir={tmp_path / 'run'}", "max_steps=1")
    for command in (
        ("chat", both, "--prompt", "hello", "--max-new-tokens", "1"),
        run,
        ("export", "merged", both, "--adapter", both, "--output", tmp_path / "merged"),
        ("export", "gguf", both, "--output", tmp_path / "m.gguf", "--quant", "f32", "--no-verify"),
        ("convert", "model", both, tmp_path / "mlx", "--to", "mlx"),
    ):
        result = macft(*command)
        assert result.code == 0, result.err
        assert result.err.count(said) == 1, result.err
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_the_folder_is_a_model_wherever_it_may_be_either(model, both, tmp_path, monkeypatch):
    conversions.convert(both, tmp_path / "mlx", to="mlx")
    conversions.convert(model, tmp_path / "alone", to="mlx")
    assert weights_hash(tmp_path / "mlx") == weights_hash(tmp_path / "alone")
    monkeypatch.setattr(logging.getLogger("macft"), "propagate", True)
    # an adapter with the config.json of its base, as some trainers leave it, is no model
    bare = shutil.copytree(both, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="an adapter, not a model; name its base as the model"):
        resolve_model(str(bare))
