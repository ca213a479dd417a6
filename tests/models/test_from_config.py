"""Models without weights: a checked shape, one start on both engines, one curve, and a whole model at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import load_model
from support.rows import write_texts
from support.tiny_models import write_model
from support.tiny_tokenizer import write_tiny_model
from support.toy_backend import ENGINES, curve, toy_settings, write_rows

from macft.backends.base import ModelSpec, OptimizerSpec
from macft.backends.shared import initial_value
from macft.config.settings import Settings
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ConfigError, MacftError, ModelError
from macft.models.from_config import new_model, shape_problems
from macft.training.model import resolve_start
from macft.training.run import train
from macft.weights.folder import ModelFolder
from macft.weights.model_config import read_config

pytestmark = pytest.mark.usefixtures("small_threads")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SCRATCH: dict[str, Any] = {"train_from_scratch": True, "finetuning_type": "full", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """shapes("llama") is a folder with a config.json and a tokenizer, and no weights."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_shape(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


def write_shape(folder: Path, architecture: str) -> Path:
    write_tiny_model(folder)
    size = load_tokenizer(folder).vocab_size
    # an odd width of the random numbers, to see that it is kept
    write_model(folder, architecture, vocab_size=size, initializer_range=0.05)
    (folder / "model.safetensors").unlink()
    return folder


def pt(shape: Path, data: Path, output: Path, engine: str, **keys: Any) -> Settings:
    return toy_settings(shape, data, output, engine, **{"stage": "pt", "cutoff_len": 40, **SCRATCH, **keys})


# The start


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_start_from_the_same_numbers(architecture, shapes):
    states = {}
    for engine in ("mlx", "torch"):
        spec = ModelSpec(shapes(architecture), None, full=True, precision="float32", from_scratch=True, seed=7)
        states[engine] = load_model(engine, spec, OptimizerSpec()).trained_state()
    assert states["mlx"].keys() == states["torch"].keys()
    for name, value in states["mlx"].items():
        np.testing.assert_array_equal(value, states["torch"][name], err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_are_normal_norms_one_and_biases_zero(architecture, shapes):
    backend = load_model("torch", ModelSpec(shapes(architecture), None, full=True, from_scratch=True), OptimizerSpec())
    norm = 0.0 if architecture == "gemma3_text" else 1.0  # Gemma's multiply by 1 + weight
    kinds = set()
    for name, value in backend.trained_state().items():
        if value.ndim == 2:
            kinds.add("matrix")
            assert abs(value.std() / 0.05 - 1) < 0.1 and abs(value.mean()) < 0.005, name
        else:
            kinds.add("bias" if name.endswith("bias") else "norm")
            assert np.unique(value).tolist() == [0.0 if name.endswith("bias") else norm], name
    assert {"matrix", "norm"} <= kinds
    assert ("bias" in kinds) == (architecture == "qwen2")


def test_a_seed_and_a_name_decide_the_numbers():
    config = {"model_type": "llama"}
    one = initial_value(config, 1, "a.weight", (50, 40))
    assert one.dtype == np.float32 and abs(one.std() / 0.02 - 1) < 0.1
    np.testing.assert_array_equal(one, initial_value(config, 1, "a.weight", (50, 40)))
    for seed, name in ((2, "a.weight"), (1, "b.weight")):
        assert np.abs(one - initial_value(config, seed, name, (50, 40))).max() > 0.01
    with pytest.raises(ModelError, match=r"no first value is known for x.experts.gate_up_proj \[4, 8, 8\] of a llama"):
        initial_value(config, 1, "x.experts.gate_up_proj", (4, 8, 8))
    with pytest.raises(ModelError, match=r"x.A_log \[8\]"):
        initial_value(config, 1, "x.A_log", (8,))


# The run


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_both_engines_give_one_curve_over_twenty_steps(architecture, shapes, tmp_path):
    data = write_texts(tmp_path / "t.jsonl", 24)
    # MLX wants each sixth of Gemma's layers to be one without a window
    sizes = SIZES | ({"num_hidden_layers": 6} if architecture == "gemma3_text" else {})
    curves = []
    for engine in ("mlx", "torch"):
        train(pt(shapes(architecture), data, tmp_path / engine, engine, max_steps=20, model_overrides=sizes))
        curves.append(np.array(curve(tmp_path / engine)))
    assert len(curves[0]) == 20
    np.testing.assert_allclose(curves[0][:, 1], curves[1][:, 1], rtol=1e-5)
    vocabulary = read_config(tmp_path / "mlx")["vocab_size"]
    # it knows nothing at first, and then something
    assert abs(curves[0][0, 1] - np.log(vocabulary)) < 0.5
    assert curves[0][-1, 1] < curves[0][0, 1] - 0.3


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_left_is_a_whole_model_of_the_new_shape(engine, shapes, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_texts(tmp_path / "t.jsonl")
    train(pt(shapes("llama"), data, tmp_path / "run", engine, model_overrides=SIZES, save_strategy="epoch"))
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for folder in (tmp_path / "run", *checkpoints):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 32)
        assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    # the next stage begins with it
    rows = write_rows(tmp_path / "rows.jsonl")
    train(toy_settings(tmp_path / "run", rows, tmp_path / "sft", engine, finetuning_type="full", max_steps=2))
    assert read_config(tmp_path / "sft")["num_hidden_layers"] == 3


def test_a_run_goes_on_to_the_bit(shapes, tmp_path):
    data = write_texts(tmp_path / "t.jsonl")
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(pt(shapes("llama"), data, tmp_path / "whole", "torch", **keys))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    train(pt(shapes("llama"), data, tmp_path / "resumed", "torch", **keys, resume_from_checkpoint=True))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"finetuning_type": "full"}, "; download them, or set train_from_scratch: true for random ones"),
        ({"finetuning_type": "lora"}, ", and an adapter needs those of a trained model: download them"),
        (
            {"finetuning_type": "full", "stage": "dpo"},
            ", and stage dpo needs a trained model: download them",
        ),
    ],
)
def test_random_weights_are_taken_only_where_they_are_asked_for(keys, advice, engine, shapes, tmp_path):
    data, folder = write_texts(tmp_path / "t.jsonl"), shapes("llama")
    with pytest.raises(ConfigError) as caught:
        train(toy_settings(folder, data, tmp_path / "run", engine, **{"stage": "pt", **keys}))
    assert str(caught.value) == f"{folder}: no weights found{advice}"
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_whole_are_no_shape_to_start_from(shapes, model, tmp_path):
    """Files of weights, or an index of them, say that there was a trained model."""
    whole = (model / "model.safetensors").read_bytes()
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    cases = [
        ("model.safetensors", b"", "model.safetensors: not a safetensors file, or cut short (0 bytes)"),
        ("model.safetensors", whole[:-8], "model.safetensors: cut short: the last 8 bytes are missing"),
        ("model.safetensors", pointer, "model.safetensors: only a pointer of git-lfs, not the weights"),
        ("model.safetensors.index.json", index, "1 of 1 weight files are missing, model-00001-of-00001.safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', 'model.safetensors.index.json holds no "weight_map"'),
        ("pytorch_model.bin.index.json", index, "no *.safetensors weights; found config.json"),
        ("pytorch_model.bin", b"", "its weights are pickled (pytorch_model.bin)"),
        ("adapter_model.safetensors", whole, "no *.safetensors weights; found adapter_model.safetensors, config.json"),
    ]
    data = write_texts(tmp_path / "t.jsonl")
    for number, (name, content, problem) in enumerate(cases):
        folder = shutil.copytree(shapes("llama"), tmp_path / str(number))
        (folder / name).write_bytes(content)
        for kind in ("full", "lora"):
            with pytest.raises(MacftError) as caught:
                train(toy_settings(folder, data, tmp_path / "run", "torch", stage="pt", finetuning_type=kind))
            assert str(caught.value).startswith(f"{folder}: {problem}"), name
        # asked for, random weights are taken whatever lies there
        assert resolve_start(pt(folder, data, tmp_path / "run", "torch")).from_scratch
    assert not (tmp_path / "run").exists()


def test_weights_that_are_there_are_not_read(model, tmp_path):
    settings = pt(model, write_texts(tmp_path / "t.jsonl"), tmp_path / "run", "torch", max_steps=1)
    start = resolve_start(settings)
    assert start.from_scratch and not list(start.base.path.glob("*.safetensors"))
    train(settings)
    first = curve(tmp_path / "run")[0][1]
    assert abs(first - np.log(read_config(model)["vocab_size"])) < 1.0


# The shape


def test_all_problems_of_a_shape_come_together(shapes):
    shape = ModelFolder("mine", shapes("llama"))
    overrides = {"hidden_size": 65, "num_attention_heads": 6, "num_key_value_heads": 4, "num_hidden_layer": 3}
    with pytest.raises(ConfigError) as caught:
        new_model(shape, {**overrides, "vocab_size": 100, "head_dim": None}, {}, 300)
    assert str(caught.value).splitlines() == [
        "mine: 4 problems in its shape",
        "  model_overrides: num_hidden_layer is not an entry of config.json that can be replaced; did you mean "
        "num_hidden_layers?",
        "  num_attention_heads 6 does not divide hidden_size 65",
        "  num_key_value_heads 4 does not divide num_attention_heads 6",
        "  vocab_size 100: the tokenizer has 300 tokens; set it to that or more",
    ]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: expected a whole number above 0"),
        ({"hidden_size": "64"}, "hidden_size '64': expected a whole number above 0"),
        ({"hidden_size": True}, "hidden_size True: expected a whole number above 0"),
        ({"intermediate_size": 2.5}, "intermediate_size 2.5: expected a whole number above 0"),
        ({"hidden_size": 12}, "hidden_size 12 gives 4 heads of 3: expected an even width of a head"),
        ({"head_dim": 15}, "head_dim 15: expected an even number"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers; give one per layer"),
        ({"initializer_range": -1}, "initializer_range -1: expected a number above 0"),
    ],
)
def test_a_problem_of_a_shape_is_named(entries, problem):
    sound = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    assert shape_problems(sound) == []
    assert shape_problems({**sound, **entries}) == [problem]
    # a head of its own width need not come from the model's
    assert shape_problems({**sound, "hidden_size": 66, "head_dim": 16}) == []


def test_more_layers_go_on_with_the_pattern_of_their_kinds(shapes):
    config = read_config(new_model(ModelFolder("g", shapes("gemma3_text")), {"num_hidden_layers": 13}, {}, 1).path)
    kinds = config["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11]
    assert config["num_hidden_layers"] == len(kinds) == 13
    qwen = read_config(new_model(ModelFolder("q", shapes("qwen2")), {"num_hidden_layers": 5}, {}, 1).path)
    assert qwen.get("layer_types") in (None, ["full_attention"] * 5)


def test_a_rotary_base_is_replaced_wherever_it_stands(shapes):
    config = read_config(new_model(ModelFolder("q", shapes("qwen3")), {"rope_theta": 5e5}, {}, 1).path)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5


# The tokenizer


def test_another_tokenizer_brings_its_special_tokens(shapes, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shapes("llama") / "config.json", bare)
    data = write_texts(tmp_path / "t.jsonl")
    settings = pt(bare, data, tmp_path / "run", "torch", max_steps=1, tokenizer_name_or_path=str(shapes("llama")))
    train(settings)
    tokenizer = load_tokenizer(tmp_path / "run")
    config = read_config(tmp_path / "run")
    assert tokenizer.decode([config["eos_token_id"]], skip_special=False) == "<|im_end|>"
    assert tokenizer.decode([config["bos_token_id"]], skip_special=False) == "<s>"
    assert tokenizer.eos_ids == {config["eos_token_id"]}
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (shapes("llama") / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_the_model_has_no_room_for_is_an_error(shapes, tiny_model, tmp_path):
    data = write_texts(tmp_path / "t.jsonl")
    settings = toy_settings(
        tiny_model("llama"), data, tmp_path / "run", "torch", stage="pt", tokenizer_name_or_path=str(shapes("llama"))
    )
    with pytest.raises(ConfigError, match=r"tokens, the model .* knows 199; take the model's own tokenizer"):
        train(settings)
