"""Whole folders from HF to MLX and back: the same bits, and the same logits in transformers and in mlx-lm."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.tiny_layouts import CASES, PROMPT, bytes_of, mlx_logits, torch_logits, write_case
from support.tiny_models import write_mlx_quantized

from macft.conversion.model import NORMS, convert_model
from macft.errors import ModelError, UsageError
from macft.weights.model_config import read_config
from macft.weights.source import open_model
from macft.weights.tensors.lazy import cast, from_array
from macft.weights.writer import SUMS, write_model

pytestmark = pytest.mark.mlx

# of the largest logit: float32 sums in another order (measured: 8e-6 of hybrids, 3.3e-6 of all others)
TOLERANCE = 1e-5
# mlx-lm computes these differently from transformers, from the same file: with the exact gelu, up to 3.2e-4 apart
OTHER_GELU = ("gemma", "starcoder2")
# mlx-lm cannot load these as transformers saves them
ONLY_CONVERTED = ("gpt_oss", "qwen3_5_text", "qwen3_5_text tied", "qwen3_5_moe_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """folder(case) is the case as transformers saved it, built once."""
    built: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in built:
            built[case] = write_case(tmp_path_factory.mktemp("case"), case)
        return built[case]

    return get


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def contents(folder: Path):
    return bytes_of(open_model(folder).tensors)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_folder_computes_what_its_source_does_in_both_libraries(case, folder, tmp_path):
    source = folder(case)
    report = convert_model(source, tmp_path / "mlx", to="mlx")
    assert (report.came_as, report.lost) == ("hf", ())
    expected = torch_logits(source)
    found = mlx_logits(tmp_path / "mlx")
    if case not in OTHER_GELU:
        assert distance(found, expected) < TOLERANCE
    if case not in ONLY_CONVERTED:
        # through mlx-lm's own conversion, on the same numbers
        assert np.array_equal(found, mlx_logits(source))

    report = convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert (report.came_as, report.lost) == ("mlx", ())
    assert contents(tmp_path / "hf") == contents(source)
    assert np.array_equal(torch_logits(tmp_path / "hf"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5_text tied", "mixtral", "gemma3_text"])
def test_there_and_back_in_16_bits_is_the_same_to_the_bit(case, dtype, folder, tmp_path):
    """Norms too, though 1 + norm has but 8 or 11 digits: those it lost are kept beside it."""
    source = open_model(folder(case))
    tensors = [cast(tensor, np.dtype(getattr(ml_dtypes, dtype, dtype))) for tensor in source.tensors]
    write_model(tmp_path / "source", source.config, tensors, source_folder=source.folder, layout="hf")
    convert_model(tmp_path / "source", tmp_path / "mlx", to="mlx")
    assert (tmp_path / "mlx" / NORMS).exists() == case.startswith("qwen")
    convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert contents(tmp_path / "hf") == contents(tmp_path / "source")
    assert not (tmp_path / "hf" / NORMS).exists()


def test_every_file_of_an_mlx_folder_has_its_checksum(folder, tmp_path):
    convert_model(folder("qwen3_next"), tmp_path / "mlx", to="mlx")
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "mlx" / SUMS).read_text().splitlines())
    assert list(lines) == sorted(lines)
    assert set(lines) == {path.name for path in (tmp_path / "mlx").iterdir()} - {SUMS} and NORMS in lines
    for name, digest in lines.items():
        assert hashlib.sha256((tmp_path / "mlx" / name).read_bytes()).hexdigest() == digest


def test_norms_that_were_trained_since_are_not_put_back(folder, tmp_path):
    convert_model(folder("qwen3_next"), tmp_path / "mlx", to="mlx")
    trained = open_model(tmp_path / "mlx")
    name = "model.layers.0.input_layernorm.weight"
    values = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    tensors = [from_array(name, values) if tensor.name == name else tensor for tensor in trained.tensors]
    write_model(tmp_path / "trained", trained.config, tensors, source_folder=trained.folder, layout="mlx")
    (tmp_path / "mlx" / NORMS).rename(tmp_path / "trained" / NORMS)
    convert_model(tmp_path / "trained", tmp_path / "hf", to="hf")
    before, after = contents(folder("qwen3_next")), contents(tmp_path / "hf")
    assert [key for key in before if before[key] != after[key]] == [name]
    assert after[name][2] == (values - np.float32(1)).tobytes()


@pytest.mark.parametrize(("case", "bits"), [("llama tied", 4), ("qwen3_moe", 8), ("qwen3_next", 4), ("granite", 3)])
def test_quantizing_gives_the_logits_of_mlx_lms_own_conversion(case, bits, folder, tmp_path):
    convert_model(folder(case), tmp_path / "ours", to="mlx", bits=bits)
    write_mlx_quantized(folder(case), tmp_path / "theirs", bits)
    assert np.array_equal(mlx_logits(tmp_path / "ours"), mlx_logits(tmp_path / "theirs"))
    ours, theirs = read_config(tmp_path / "ours"), read_config(tmp_path / "theirs")
    assert ours["quantization"] == theirs["quantization"] == ours["quantization_config"]


@pytest.mark.parametrize("case", ["llama", "qwen2 tied", "gemma3_text", "phi3", "qwen3_moe", "mixtral", "qwen3_next"])
def test_a_folder_quantized_by_mlx_lm_comes_back_as_hf_with_its_logits(case, folder, tmp_path):
    write_mlx_quantized(folder(case), tmp_path / "mlx", 8)
    report = convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert report.came_as == "mlx"
    config = read_config(tmp_path / "hf")
    assert "quantization" not in config and "quantization_config" not in config
    assert contents(tmp_path / "hf").keys() == contents(folder(case)).keys()
    # MLX multiplies packed numbers, here they are unpacked before: the same float32 products
    assert distance(torch_logits(tmp_path / "hf"), mlx_logits(tmp_path / "mlx")) < TOLERANCE


def test_a_quantized_folder_can_be_quantized_again(folder, tmp_path):
    write_mlx_quantized(folder("llama"), tmp_path / "eight", 8)
    convert_model(tmp_path / "eight", tmp_path / "four", to="mlx", bits=4, group_size=32)
    assert read_config(tmp_path / "four")["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    convert_model(tmp_path / "eight", tmp_path / "plain", to="mlx")
    convert_model(tmp_path / "plain", tmp_path / "direct", to="mlx", bits=4, group_size=32)
    assert np.array_equal(mlx_logits(tmp_path / "four"), mlx_logits(tmp_path / "direct"))


def test_what_the_mlx_layout_has_no_place_for_is_named(folder, tmp_path):
    source = open_model(folder("qwen3_next"))
    extra = from_array("mtp.norm.weight", np.full(64, 0.1, np.float32))
    write_model(tmp_path / "source", source.config, [*source.tensors, extra], source_folder=source.folder, layout="hf")
    assert convert_model(tmp_path / "source", tmp_path / "mlx", to="mlx").lost == ("mtp.norm.weight",)
    convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert contents(tmp_path / "hf") == contents(folder("qwen3_next"))


def test_a_published_qwen3_5_with_its_vision_tower_becomes_the_text_model(tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    inner = read_config(write_case(tmp_path / "text", "qwen3_5_text"))
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    tokens = {"image_token_id": 1, "video_token_id": 1, "vision_start_token_id": 1, "vision_end_token_id": 1}
    config = AutoConfig.for_model(
        "qwen3_5", text_config=inner, vision_config=vision, tie_word_embeddings=False, **tokens
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    report = convert_model(tmp_path / "source", tmp_path / "mlx", to="mlx")
    names = {name for name in contents(tmp_path / "source") if name.startswith("model.visual.")}
    assert names and set(report.lost) == names
    assert np.array_equal(mlx_logits(tmp_path / "mlx"), mlx_logits(tmp_path / "source"))
    assert distance(mlx_logits(tmp_path / "mlx"), expected) < TOLERANCE
    convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert read_config(tmp_path / "hf")["model_type"] == "qwen3_5_text"
    assert distance(torch_logits(tmp_path / "hf"), expected) < TOLERANCE


def test_experts_fused_in_one_tensor_are_loaded_by_transformers_as_those_apart(folder, tmp_path):
    """What `save_pretrained(save_original_format=False)` writes, and some published models are."""
    import torch
    from transformers import AutoModelForCausalLM

    source = folder("qwen3_moe")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(
        tmp_path / "fused", save_original_format=False
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in contents(tmp_path / "fused")
    convert_model(tmp_path / "fused", tmp_path / "mlx", to="mlx")
    convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert contents(tmp_path / "hf") == contents(source)
    assert np.array_equal(torch_logits(tmp_path / "fused"), torch_logits(tmp_path / "hf"))


def test_an_unknown_model_type_is_refused_and_nothing_written(folder, tmp_path):
    source = open_model(folder("llama"))
    config = {**source.config, "model_type": "rwkv9"}
    write_model(tmp_path / "source", config, source.tensors, source_folder=source.folder, layout="hf")
    with pytest.raises(ModelError, match="model_type rwkv9"):
        convert_model(tmp_path / "source", tmp_path / "mlx", to="mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    # the layout stays: nothing need be known of it
    convert_model(tmp_path / "source", tmp_path / "hf", to="hf")
    assert contents(tmp_path / "hf") == contents(folder("llama"))


def test_a_destination_that_exists_is_left_alone(folder, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        convert_model(folder("qwen3_next"), tmp_path / "mlx", to="mlx")
    assert [path.name for path in (tmp_path / "mlx").iterdir()] == ["mine"]


def test_bits_that_cannot_be_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="add --to mlx, or leave --bits out"):
        convert_model(tmp_path / "none", tmp_path / "hf", to="hf", bits=4)
    with pytest.raises(ModelError, match="7 bits in groups of 64"):
        convert_model(tmp_path / "none", tmp_path / "mlx", to="mlx", bits=7)


def test_a_damaged_file_of_norms_is_named(folder, tmp_path):
    convert_model(folder("qwen3_next"), tmp_path / "mlx", to="mlx")
    path = tmp_path / "mlx" / NORMS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=NORMS.replace(".", r"\.")):
        convert_model(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_a_config_as_published_without_a_word_on_its_head_computes_the_same(folder, tmp_path):
    """mlx-lm takes a llama that says nothing for tied, and drops its head; the config written says it."""
    source = folder("llama")
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    opened = open_model(source)
    write_model(tmp_path / "silent", config, opened.tensors, source_folder=source, layout="hf")
    convert_model(tmp_path / "silent", tmp_path / "mlx", to="mlx")
    assert distance(mlx_logits(tmp_path / "mlx"), torch_logits(source)) < TOLERANCE
    assert read_config(tmp_path / "mlx")["tie_word_embeddings"] is False
