"""Model folders that other programs write, held against transformers: fp8, two sets of files, things left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.commands import macft
from support.tiny_models import write_model

from macft.backends import load_logits_module
from macft.errors import ModelError
from macft.models.locate import resolve_model
from macft.weights.folder import INDEX, weights_hash
from macft.weights.model_config import ASSUMED, normalize_config
from macft.weights.source import open_model

TOKENS = list(range(3, 43))
ENGINES = [pytest.param("mlx", marks=pytest.mark.mlx), pytest.param("torch", marks=pytest.mark.torch)]


def change(folder: Path, **entries: Any) -> None:
    """Set entries of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: tensor.read() for tensor in open_model(folder).tensors}


def logits(engine: str, folder: Path) -> np.ndarray[Any, Any]:
    return load_logits_module(engine).logits(folder, [], TOKENS)


def reference(folder: Path) -> np.ndarray[Any, Any]:
    """By transformers alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].float())


def assert_near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """The same float32 numbers, summed in another order, are up to 1e-5 of the largest logit apart."""
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# --- two sets of files


def two_sets(folder: Path) -> Path:
    """A whole file, and an index of shards that hold other numbers."""
    write_model(folder, "llama")
    other = write_model(folder.with_name("other"), "llama", seed=1)
    names = sorted(tensors_of(other))
    shutil.copyfile(other / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_file_counts_before_an_index_as_in_transformers(engine: str, tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "m")
    alone = write_model(tmp_path / "alone", "llama")
    expected = reference(folder)
    assert np.array_equal(expected, reference(alone))
    assert_near(logits(engine, folder), expected)
    found, whole = tensors_of(folder), tensors_of(alone)
    assert found.keys() == whole.keys() and all(np.array_equal(found[name], whole[name]) for name in found)
    assert weights_hash(folder) == weights_hash(alone)


def test_two_sets_of_files_are_told_and_an_index_that_leads_nowhere_does_not_hinder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = two_sets(tmp_path / "m")
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert resolve_model(str(folder)).path == folder
    assert caplog.messages == [
        f"{folder}: model.safetensors is read, as transformers does; the other files that {INDEX} names are not"
    ]


@pytest.mark.mlx
def test_merged_and_converted_models_hold_the_whole_file(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "m")
    said = macft("convert", "model", folder, tmp_path / "mlx", "--to", "mlx", "--verify")
    assert said.code == 0, said.err
    found, whole = tensors_of(tmp_path / "mlx"), tensors_of(write_model(tmp_path / "alone", "llama"))
    assert all(np.array_equal(found[name], whole[name]) for name in found)


# --- fp8


def write_fp8(folder: Path, source: Path, block: tuple[int, int], scale_type: Any = np.float32) -> Path:
    """The matrices of the layers in fp8 with one scale for each block of rows and columns, as DeepSeek and Qwen do."""
    shutil.copytree(source, folder)
    stored: dict[str, np.ndarray[Any, Any]] = {}
    for name, array in tensors_of(source).items():
        if array.ndim != 2 or ".layers." not in name:
            stored[name] = array
            continue
        scales = np.empty([-(-size // step) for size, step in zip(array.shape, block, strict=True)], np.float32)
        matrix = np.empty(array.shape, ml_dtypes.float8_e4m3fn)
        for i, j in np.ndindex(*scales.shape):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.float32(np.exp2(np.ceil(np.log2(np.abs(array[part]).max() / 448.0)))).astype(scale_type)
            matrix[part] = (array[part] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = matrix, scales.astype(scale_type)
    write_raw(folder / "model.safetensors", stored)
    change(
        folder,
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*block]},
    )
    return folder


def write_raw(path: Path, stored: dict[str, np.ndarray[Any, Any]]) -> None:
    """A safetensors file with types that the library does not write from numpy."""
    codes = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
    codes |= {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    header, data = {}, b""
    for name, array in stored.items():
        place = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": place}
        data += array.tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale_type", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_fp8_in_blocks_gives_the_logits_of_transformers(engine: str, scale_type: Any, tmp_path: Path) -> None:
    source = write_model(tmp_path / "base", "qwen3")
    folder = write_fp8(tmp_path / "fp8", source, (16, 32), scale_type)
    expected = reference(folder)
    assert np.abs(expected - reference(source)).max() > 1e-3 * np.abs(expected).max()
    assert_near(logits(engine, folder), expected)


def test_the_last_block_of_a_matrix_may_be_cut_short(tmp_path: Path) -> None:
    """The numbers are those of numpy's own product, block by block."""
    weight = np.arange(-15, 15, dtype=np.float32).reshape(5, 6).astype(ml_dtypes.float8_e4m3fn)
    scale = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    folder = tmp_path / "m"
    folder.mkdir()
    write_raw(folder / "model.safetensors", {"a.weight": weight, "a.weight_scale_inv": scale})
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}}
    (folder / "config.json").write_text(json.dumps(config))
    (found,) = open_model(folder, exact=True).tensors
    for row, column in np.ndindex(5, 6):
        assert found.read()[row, column] == np.float32(weight[row, column]) * scale[row // 2, column // 4]
    assert found.rows is not None and np.array_equal(found.rows(1, 4), found.read()[1:4])
    (rounded,) = open_model(folder).tensors
    assert rounded.dtype.name == "bfloat16" and np.array_equal(rounded.read(), found.read().astype(ml_dtypes.bfloat16))


@pytest.mark.torch
def test_a_model_in_fp8_is_converted_and_verified(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path / "fp8", write_model(tmp_path / "base", "qwen3"), (16, 32))
    change(folder, dtype="bfloat16")
    said = macft("convert", "model", folder, tmp_path / "hf", "--to", "hf", "--verify")
    assert said.code == 0, said.err
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    found = tensors_of(tmp_path / "hf")
    for tensor in open_model(folder, exact=True).tensors:
        is_fp8 = ".layers." in tensor.name and len(tensor.shape) == 2
        expected = tensor.read().astype(ml_dtypes.bfloat16) if is_fp8 else tensor.read()
        assert np.array_equal(found[tensor.name], expected), tensor.name


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FORMS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "one scale for the matrix": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", ()),
    "one scale, in a list": ({"quant_method": "fp8", "weight_block_size": None}, "weight_scale_inv", (1,)),
    "compressed, by row": (COMPRESSED, "weight_scale", (4, 1)),
    "compressed, for the matrix": (COMPRESSED, "weight_scale", (1,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_scales_for_rows_or_the_whole_matrix_are_applied_and_those_of_activations_left(
    form: str, tmp_path: Path
) -> None:
    quantization, kind, shape = FORMS[form]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    if quantization is COMPRESSED:
        quantization = {**COMPRESSED, "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    weight = np.arange(-6, 6, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.float8_e4m3fn)
    scale = np.linspace(0.5, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    stored = {"a.weight": weight, f"a.{kind}": scale, "a.input_scale": np.float32(9), "b.k_scale": np.float32(9)}
    folder = tmp_path / "m"
    folder.mkdir()
    write_raw(folder / "model.safetensors", {name: np.asarray(array) for name, array in stored.items()})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    source = open_model(folder, exact=True)
    (found,) = source.tensors
    assert found.name == "a.weight" and "quantization_config" not in source.config
    assert np.array_equal(found.read(), weight.astype(np.float32) * (scale if scale.ndim == 2 else scale.reshape(())))


def test_fp8_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    weight = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    folder = tmp_path / "m"
    folder.mkdir()
    stored = {"a.weight": weight, "b.weight": weight, "b.weight_scale_inv": np.ones((3, 3), np.float32)}
    write_raw(folder / "model.safetensors", stored)
    config: dict[str, Any] = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        open_model(folder)
    assert str(refused.value).split("\n") == [
        f"{folder}: its fp8 weights and scales do not fit",
        "  a.weight is float8_e4m3fn [4, 4] with no weight_scale_inv or weight_scale",
        "  b.weight is float8_e4m3fn [4, 4] with a scale of shape [3, 3]",
    ]
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"fp8 weights, of which config\.json says nothing"):
        open_model(folder)


# --- names and entries that are missing


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_saved_without_its_head_is_read_like_the_whole_one(engine: str, tmp_path: Path) -> None:
    """As embedding models are published: transformers adds the prefix to the names."""
    from transformers import AutoModel

    whole = write_model(tmp_path / "whole", "qwen3", tie_word_embeddings=True)
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "backbone")
    assert "layers.0.mlp.up_proj.weight" in safetensors.numpy.load_file(tmp_path / "backbone" / "model.safetensors")
    assert tensors_of(tmp_path / "backbone").keys() == tensors_of(whole).keys()
    assert_near(logits(engine, tmp_path / "backbone"), reference(whole))


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(engine: str, architecture: str, tmp_path: Path) -> None:
    """The head of a llama is not tied, a mistral has a window, Gemma 2 scales its questions by 256."""
    folder = write_model(tmp_path / "m", architecture, tie_word_embeddings=architecture == "gemma2")
    left_out = ("rms_norm_eps", "max_position_embeddings", "query_pre_attn_scalar", "tie_word_embeddings")
    change(folder, **dict.fromkeys(left_out))
    assert_near(logits(engine, folder), reference(folder))


@pytest.mark.torch
def test_the_assumed_numbers_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for model_type, (_, _, is_tied) in ASSUMED.items():
        published = AutoConfig.for_model(model_type)
        assert published.tie_word_embeddings == is_tied, model_type
        assumed = normalize_config({"model_type": model_type})
        for key in assumed.keys() - {"model_type", "rope_theta", "rope_parameters", "rope_local_base_freq"}:
            assert assumed[key] == getattr(published, key), (model_type, key)


@pytest.mark.torch
def test_an_export_takes_what_the_config_leaves_out(tmp_path: Path) -> None:
    from macft.gguf.exporter.tensors import to_gguf

    folder = write_model(tmp_path / "m", "llama")
    change(folder, rms_norm_eps=None, max_position_embeddings=None)
    source = open_model(folder)
    rows = next(tensor.shape[0] for tensor in source.tensors if "embed_tokens" in tensor.name)
    fields = to_gguf(source.config, source.tensors, vocab_rows=rows).fields
    assert fields["llama.attention.layer_norm_rms_epsilon"] == 1e-6 and fields["llama.context_length"] == 2048
