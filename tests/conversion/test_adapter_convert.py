"""Adapters converted between PEFT and mlx-lm compute the same in the other library, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file
from support.peft_shapes import SHAPES, write_bases
from support.peft_shapes import save as save_shape
from support.tiny_adapters import mlx_adapter_logits, peft_logits, save_mlx, save_peft
from support.tiny_layouts import PROMPT, mlx_logits, torch_logits, write_case
from transformers import AutoModelForCausalLM

from macft.conversion.adapter import convert_adapter
from macft.conversion.merged import export_merged
from macft.errors import ModelError, UsageError
from macft.weights.adapters.formats import read_any_adapter
from macft.weights.folder import ModelFolder
from macft.weights.model_config import read_config

pytestmark = [pytest.mark.mlx, pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

BASES = {
    "dense": "llama",
    "tied": "llama tied",
    "experts": "qwen3_moe",
    "mixtral": "mixtral",
    "shared": "qwen2_moe",
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: write_case(tmp_path_factory.mktemp("base") / name, case) for name, case in BASES.items()}


def folder_of(base: Path) -> ModelFolder:
    return ModelFolder(base.name, base)


def torch_prompt(model: torch.nn.Module) -> np.ndarray:
    """[tokens, vocabulary] of the prompt."""
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0].numpy()


def check_same(found: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    """Equal but for float32's rounding of numbers this large, and unlike the base alone."""
    largest = np.abs(expected).max()
    assert np.abs(expected - plain).max() > 0.01 * largest, "the adapter does nothing: the test would be blind"
    assert np.abs(found - expected).max() < 1e-5 * largest


TO_MLX = {
    "lora": ("dense", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])),
    "rslora": ("dense", LoraConfig(r=3, lora_alpha=7.5, use_rslora=True, target_modules=["q_proj"])),
    "dora": ("dense", LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["v_proj", "down_proj"])),
    "one layer": ("dense", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], layers_to_transform=[0])),
    "patterns": (
        "dense",
        LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 5},
            alpha_pattern={"1.self_attn.q_proj": 2},
        ),
    ),
    "embedding and head": ("dense", LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "lm_head"])),
    "experts": ("experts", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts, ranks of their own": (
        "experts",
        LoraConfig(
            r=2,
            lora_alpha=7,
            target_modules=["q_proj"],
            target_parameters=[*EXPERTS, "mlp.gate.weight"],
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"gate_up_proj": 3},
        ),
    ),
}


@pytest.mark.parametrize("case", TO_MLX)
def test_an_adapter_of_peft_computes_the_same_in_mlx_lm(case, bases, tmp_path):
    base, config = bases[TO_MLX[case][0]], TO_MLX[case][1]
    expected = save_peft(base, config, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(base))
    check_same(mlx_adapter_logits(base, tmp_path / "mlx"), expected, torch_logits(base))
    # and back again
    convert_adapter(tmp_path / "mlx", tmp_path / "again", "peft", folder_of(base))
    check_same(peft_logits(base, tmp_path / "again"), expected, torch_logits(base))


@pytest.mark.parametrize("name", ["copies", "tying, nothing to tie", "tying, lora on the embedding", "eva", "mica"])
def test_what_peft_saves_beside_lora_is_left_out_where_mlx_lm_computes_the_same(name, tmp_path):
    base = write_bases(tmp_path)["tied"]
    save_shape(base, SHAPES[name], tmp_path / "peft")
    expected = torch_prompt(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft"))
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(base))
    check_same(mlx_adapter_logits(base, tmp_path / "mlx"), expected, torch_logits(base))


TO_PEFT = {
    "all linear layers": ("dense", {"keys": None}),
    "the last layer": ("dense", {"keys": ["self_attn.q_proj", "mlp.up_proj"], "num_layers": 1}),
    "dora": ("dense", {"keys": ["self_attn.q_proj"], "dora": True}),
    "embedding": ("dense", {"keys": ["model.embed_tokens", "lm_head"]}),
    "tied embedding": ("tied", {"keys": ["model.embed_tokens", "self_attn.k_proj"]}),
    "experts and routers": ("experts", {"keys": None}),
    "experts and routers of mixtral": ("mixtral", {"keys": None}),
    "one projection of experts": ("experts", {"keys": ["mlp.switch_mlp.up_proj"]}),
    "shared experts": ("shared", {"keys": None}),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_an_adapter_of_mlx_lm_computes_the_same_in_peft(case, bases, tmp_path):
    base, settings = bases[TO_PEFT[case][0]], TO_PEFT[case][1]
    save_mlx(base, tmp_path / "mlx", **settings)
    expected = mlx_adapter_logits(base, tmp_path / "mlx")
    convert_adapter(tmp_path / "mlx", tmp_path / "peft", "peft", folder_of(base))
    check_same(peft_logits(base, tmp_path / "peft"), expected, mlx_logits(base))
    convert_adapter(tmp_path / "peft", tmp_path / "again", "mlx", folder_of(base))
    check_same(mlx_adapter_logits(base, tmp_path / "again"), expected, mlx_logits(base))


@pytest.mark.parametrize("case", ["tied embedding", "experts and routers", "experts and routers of mixtral"])
def test_merging_an_adapter_of_mlx_lm_gives_what_the_adapter_computes(case, bases, tmp_path):
    base, settings = bases[TO_PEFT[case][0]], TO_PEFT[case][1]
    save_mlx(base, tmp_path / "mlx", **settings)
    adapter = read_any_adapter(tmp_path / "mlx", read_config(base))
    export_merged(folder_of(base), [adapter], tmp_path / "merged")
    check_same(torch_logits(tmp_path / "merged"), mlx_adapter_logits(base, tmp_path / "mlx"), mlx_logits(base))


def test_every_target_is_named_in_full_and_both_scales_are_written(bases, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], layers_to_transform=[1])
    save_peft(bases["dense"], config, tmp_path / "peft")
    (tmp_path / "peft" / "chat_template.jinja").write_text("own")
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(bases["dense"]))
    content = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert content["lora_parameters"] == {
        "rank": 4,
        "scale": 3.0,
        "alpha": 12.0,
        "dropout": 0.0,
        "keys": ["model.layers.1.self_attn.q_proj"],
    }
    assert (tmp_path / "mlx" / "chat_template.jinja").read_text() == "own"
    notes = convert_adapter(tmp_path / "mlx", tmp_path / "again", "peft")
    assert "not checked" in notes[0]
    content = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert content["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (4, 12, False)


NOT_IN_MLX = {
    "DoRA on an embedding": ("dense", LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens"])),
    "ties its head to its embedding": ("tied", LoraConfig(r=2, target_modules=["embed_tokens"])),
    "head and embedding are one": (None, LoraConfig(r=2, target_modules=["lm_head"])),
    "name the base model": (None, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)),
    "lm_head.weight is of the model itself": (
        "dense",
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "init_lora_weights is 'pissa'.*base's own weights": (
        "dense",
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    ),
    "lora_bias is True": ("dense", LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)),
    "embed_tokens.weight is of the model itself": (
        "dense",
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]),
    ),
}


@pytest.mark.parametrize("said", NOT_IN_MLX)
def test_what_mlx_lm_cannot_hold_is_refused_with_the_way_out(said, bases, tmp_path):
    name, config = NOT_IN_MLX[said]
    model = bases[name or ("experts" if config.target_parameters else "dense")]
    save_peft(model, config, tmp_path / "peft")
    with pytest.raises(ModelError, match=said) as error:
        convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(model) if name else None)
    assert "merge" in str(error.value) or "name the base" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"]


@pytest.mark.parametrize("value", [True, False])
def test_fan_in_fan_out_counts_only_where_layers_may_not_be_linear(value, bases, tmp_path):
    save_peft(bases["dense"], LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": value}))
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(bases["dense"]))
    if value:
        with pytest.raises(ModelError, match="fan_in_fan_out"):
            read_any_adapter(tmp_path / "peft", {"model_type": "gpt2"})
        with pytest.raises(ModelError, match="fan_in_fan_out"):
            convert_adapter(tmp_path / "peft", tmp_path / "two", "mlx")


def test_another_base_is_refused_with_all_shapes(bases, tmp_path):
    wide = write_case(tmp_path / "wide", "llama", intermediate_size=192)
    save_peft(wide, LoraConfig(r=2, target_modules=["up_proj", "q_proj"]), tmp_path / "peft")
    with pytest.raises(ModelError) as error:
        convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", folder_of(bases["dense"]))
    lines = str(error.value).splitlines()
    assert str(tmp_path / "peft") in lines[0] and "dense" in lines[0] and len(lines) == 3
    assert all("[128, 64] in the model" in line and "are for [192, 64]" in line for line in lines[1:])


@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_a_destination_that_exists_and_a_format_that_is_there_already_are_refused(to, bases, tmp_path):
    save_mlx(bases["dense"], tmp_path / "mlx", keys=["self_attn.q_proj"])
    save_peft(bases["dense"], LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "peft")
    with pytest.raises(UsageError, match="already"):
        convert_adapter(tmp_path / to, tmp_path / "new", to)
    other = "peft" if to == "mlx" else "mlx"
    before = load_file(next((tmp_path / other).glob("*.safetensors"))).keys()
    with pytest.raises(UsageError, match="exists already"):
        convert_adapter(tmp_path / other, tmp_path / to, to)
    assert load_file(next((tmp_path / other).glob("*.safetensors"))).keys() == before


def test_unknown_tensors_of_peft_are_all_listed(bases, tmp_path):
    save_peft(bases["dense"], LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    extra = {f"base_model.model.model.norm{i}.weight": np.ones(3, np.float32) for i in range(3)}
    save_file({**load_file(path), **extra}, path)
    for base in (None, folder_of(bases["dense"])):
        with pytest.raises(ModelError) as error:
            convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", base)
        assert all(name.removeprefix("base_model.model.") in str(error.value) for name in extra)
    assert not (tmp_path / "mlx").exists()
