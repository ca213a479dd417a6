"""Model folders as they are opened: every kind of base, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from support.tiny_models import write_mlx_quantized, write_model

from macft.errors import ModelError
from macft.weights.folder import INDEX
from macft.weights.quantization.affine import dequantize_mxfp4
from macft.weights.source import open_model
from macft.weights.tensors.safetensors import DTYPES, open_safetensors

CONFIG = {"model_type": "llama"}
PAIR = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(3, np.float16)}


def write_folder(folder: Path, files: dict[str, dict[str, Any]], config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


# --- what is read


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_reads_as_the_safetensors_library_reads_it(code, tmp_path):
    values = np.arange(24).reshape(2, 3, 4).astype(DTYPES[code])
    # an odd number of bytes first: the numbers stand at an odd offset
    path = tmp_path / "x.safetensors"
    item = values.dtype.itemsize
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": code, "shape": [2, 3, 4], "data_offsets": [3, 3 + 24 * item]},
        "none": {"dtype": code, "shape": [0, 4], "data_offsets": [3 + 24 * item] * 2},
        "one": {"dtype": code, "shape": [], "data_offsets": [3 + 24 * item, 3 + 25 * item]},
    }
    raw_file(path, header, b"abc" + values.tobytes() + values[0, 0, 1:2].tobytes())
    with safe_open(path, "np") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {tensor.name: tensor for tensor in open_safetensors(path).tensors}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert np.array_equal(tensor.read(), expected[name])
    assert found["x"].rows is not None and np.array_equal(found["x"].rows(1, 2), expected["x"][1:2])


def test_opening_reads_no_numbers(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    path = raw_file(tmp_path / "model.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))  # a terabyte with a hole for content
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tensor,) = open_model(tmp_path).tensors
    assert tensor.rows is not None and tensor.rows(1 << 37, (1 << 37) + 2).tolist() == [0, 0]


@pytest.mark.torch
def test_shards_give_the_tensors_of_the_one_file(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    whole = write_model(tmp_path / "whole", "qwen2")
    AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).save_pretrained(
        tmp_path / "shards", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    one, many = (
        {tensor.name: tensor.read() for tensor in open_model(tmp_path / name).tensors} for name in ("whole", "shards")
    )
    assert set(one) == set(many) and all(np.array_equal(one[name], many[name]) for name in one)


def test_files_beside_the_model_are_not_the_model(tmp_path):
    other = {"x.weight": np.zeros(1, np.float32)}
    names = ("consolidated.safetensors", "adapter_model.safetensors", "adapters.safetensors")
    folder = write_folder(tmp_path / "m", {"model.safetensors": PAIR, **dict.fromkeys(names, other)})
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert {tensor.name for tensor in open_model(folder).tensors} == set(PAIR)


def test_the_layout_is_mlx_by_the_files_own_word_or_by_quantization(tmp_path):
    folder = write_folder(tmp_path / "m", {"model.safetensors": PAIR})
    assert open_model(folder).layout == "hf"
    safetensors.numpy.save_file(PAIR, folder / "model.safetensors", {"format": "mlx"})
    assert open_model(folder).layout == "mlx"


def test_the_config_holds_both_spellings(tmp_path):
    config = {**CONFIG, "torch_dtype": "float16", "rope_theta": 5.0}
    found = open_model(write_folder(tmp_path / "m", {"model.safetensors": PAIR}, config)).config
    assert found["dtype"] == "float16" and found["rope_parameters"]["rope_theta"] == 5.0


# --- quantized


@pytest.mark.mlx
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_modules_are_what_mlx_dequantizes(bits, tmp_path):
    import mlx.core as mx

    folder = write_mlx_quantized(write_model(tmp_path / "base", "llama"), tmp_path / "q", bits)
    source = open_model(folder)
    raw: Any = mx.load(str(folder / "model.safetensors"))
    assert source.layout == "mlx" and "quantization" not in source.config
    names = {name for name in raw if not name.endswith((".scales", ".biases"))}
    assert {tensor.name for tensor in source.tensors} == names
    for tensor in source.tensors:
        module = tensor.name.removesuffix(".weight")
        expected = raw[tensor.name]
        assert (module in source.quantized) == (f"{module}.scales" in raw)
        if module in source.quantized:
            parts = (expected, raw[f"{module}.scales"], raw[f"{module}.biases"])
            expected = mx.dequantize(*parts, group_size=64, bits=bits)
        assert np.array_equal(tensor.read(), np.array(expected)), tensor.name
        assert tensor.rows is not None and np.array_equal(tensor.rows(1, 3), np.array(expected)[1:3])


@pytest.mark.mlx
def test_mxfp4_is_what_mlx_dequantizes_and_mixes_with_affine(tmp_path):
    import mlx.core as mx

    rng = np.random.default_rng(0)
    # every power of two that a scale can have, but for those that overflow, and every code
    values = (rng.normal(size=(248, 64)) * np.exp2(np.arange(-124.0, 124.0))[:, None]).astype(np.float32)
    packed, scales = mx.quantize(mx.array(values), mode="mxfp4")
    parts = mx.quantize(mx.array(values[100:132]), bits=8, group_size=64)
    folder = tmp_path / "m"
    config = {
        **CONFIG,
        "quantization": {
            "bits": 4,
            "group_size": 32,
            "mode": "mxfp4",
            "y": {"bits": 8, "group_size": 64, "mode": "affine"},
        },
    }
    named = dict(zip(("y.weight", "y.scales", "y.biases"), map(np.array, parts), strict=True))
    write_folder(
        folder, {"model.safetensors": {"x.weight": np.array(packed), "x.scales": np.array(scales), **named}}, config
    )
    by_name = {tensor.name: tensor for tensor in open_model(folder).tensors}
    expected = np.array(mx.dequantize(packed, scales, mode="mxfp4", dtype=mx.float32))
    assert len(np.unique(expected[100] / 2.0 ** (int(np.array(scales)[100, 0]) - 127))) > 6
    assert by_name["x.weight"].dtype == ml_dtypes.bfloat16 and set(by_name) == {"x.weight", "y.weight"}
    assert np.array_equal(by_name["x.weight"].read().astype(np.float32), expected)
    assert np.array_equal(by_name["y.weight"].read(), np.array(mx.dequantize(*parts, bits=8, group_size=64)))


def test_an_mxfp4_group_by_hand():
    # codes 0 to 7 in the first word, then their negatives; scale 2^(128 - 127) = 2
    words = np.array([[0x76543210, 0xFEDCBA98, 0, 0]], np.uint32)
    found = dequantize_mxfp4(words, np.array([[128]], np.uint8))[0]
    assert found[:8].tolist() == [0, 1, 2, 3, 4, 6, 8, 12]
    assert found[8:16].tolist() == [0, -1, -2, -3, -4, -6, -8, -12] and not found[16:].any()


def test_exact_asks_for_dequantized_numbers_that_are_not_rounded(tmp_path):
    weight = {
        "x.weight": np.array([[0x76543210] * 8], np.uint32),
        "x.scales": np.array([[0.1]], ml_dtypes.bfloat16),
        "x.biases": np.array([[1.0]], ml_dtypes.bfloat16),
    }
    config = {**CONFIG, "quantization": {"bits": 4, "group_size": 64}}
    folder = write_folder(tmp_path / "m", {"model.safetensors": weight}, config)
    (exact,), (rounded,) = open_model(folder, exact=True).tensors, open_model(folder).tensors
    scale = float(weight["x.scales"][0, 0])
    assert exact.read()[0, :8] == pytest.approx([scale * i + 1 for i in range(8)], rel=1e-7)
    assert rounded.dtype == ml_dtypes.bfloat16
    assert np.array_equal(rounded.read(), exact.read().astype(ml_dtypes.bfloat16))
    assert not np.array_equal(rounded.read().astype(np.float32), exact.read())


# --- damage

X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", None, "not a safetensors file, or cut short"),
    "no JSON": (b"{nonsense", bytes(8), "its header is not JSON"),
    "nested beyond reason": (b"[" * 100_000, bytes(8), "its header is not JSON"),
    "a list": ([1], bytes(8), "not an object of tensors"),
    "a name twice": (b'{"x":%s,"x":%s}' % ((json.dumps(X).encode(),) * 2), bytes(8), "twice"),
    "cut short": ({"x": X}, bytes(7), "ends at byte 8, the file has 7: it was cut short"),
    "too long": ({"x": X}, bytes(9), "9 bytes of data, the header describes 8"),
    "bytes shared": ({"x": X, "y": X}, bytes(8), "y: begins at byte 0, expected 8"),
    "a hole": ({"x": {**X, "data_offsets": [4, 12]}}, bytes(12), "x: begins at byte 4, expected 0"),
    "wrong size": ({"x": {**X, "shape": [3]}}, bytes(8), r"x: 8 bytes for F32 \[3\]"),
    "unknown type": ({"x": {**X, "dtype": "F4"}}, bytes(8), "x: dtype 'F4' cannot be read"),
    "negative shape": ({"x": {**X, "shape": [-2]}}, bytes(8), r"x: shape \[-2\]"),
    "offsets of text": ({"x": {**X, "data_offsets": ["0", "8"]}}, bytes(8), "x: data_offsets"),
    "not described": ({"x": 7}, bytes(8), "x: described by 7"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(kind, tmp_path):
    header, data, words = DAMAGED[kind]
    path = tmp_path / "model.safetensors"
    if data is None:
        path.write_bytes(header)
    else:
        raw_file(path, header, data)
    with pytest.raises(ModelError, match=words) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(ModelError, match=r"cut short \(108 bytes\)"):
        open_safetensors(path)


def test_all_problems_of_one_file_come_at_once(tmp_path):
    header = {"x": {**X, "shape": [3]}, "y": {**X, "dtype": "F4"}, "z": 1}
    with pytest.raises(ModelError, match=r"(?s)x: 8 bytes.*y: dtype 'F4'.*z: described by 1"):
        open_safetensors(raw_file(tmp_path / "m.safetensors", header, bytes(8)))


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    path = raw_file(tmp_path / "m.safetensors", {"x": X}, bytes(8))
    (tensor,) = open_safetensors(path).tensors
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="changed or vanished"):
        tensor.read()


# --- folders

SHARDS = {"model-1.safetensors": {"a": np.ones(1)}, "model-2.safetensors": {"b": np.ones(1)}}
GOOD_MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


@pytest.mark.parametrize(
    "name",
    [
        "../model-2.safetensors",
        "/etc/model-2.safetensors",
        "x/../../m.safetensors",
        "..\\m.safetensors",
        "C:m.safetensors",
        "",
    ],
)
def test_an_index_that_points_outside_the_folder_is_refused(name, tmp_path):
    folder = write_folder(tmp_path / "m", SHARDS)
    safetensors.numpy.save_file({"b": np.ones(1)}, tmp_path / "model-2.safetensors")
    write_index(folder, {**GOOD_MAP, "b": name})
    with pytest.raises(ModelError, match="is not a file name inside the folder"):
        open_model(folder)


def test_links_to_another_folder_are_followed_as_the_hub_cache_has_them(tmp_path):
    folder = write_folder(tmp_path / "m", SHARDS)
    write_index(folder, GOOD_MAP)
    (folder / "model-2.safetensors").rename(tmp_path / "blob")
    (folder / "model-2.safetensors").symlink_to(tmp_path / "blob")
    assert [tensor.name for tensor in open_model(folder).tensors] == ["a", "b"]


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "m", SHARDS)
    write_index(folder, GOOD_MAP)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)1 of 2 weight files are missing.*model-2\.safetensors"):
        open_model(folder)


def test_a_tensor_in_two_shards_and_one_in_none_are_named(tmp_path):
    folder = write_folder(tmp_path / "m", {**SHARDS, "model-2.safetensors": {"a": np.ones(1), "b": np.ones(1)}})
    write_index(folder, {**GOOD_MAP, "c": "model-1.safetensors"})
    with pytest.raises(ModelError, match=r"(?s)a is in model-1.safetensors and in model-2.*c is missing from model-1"):
        open_model(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [1], {"a": 7}])
def test_an_index_without_a_map_is_refused(weight_map, tmp_path):
    folder = write_folder(tmp_path / "m", SHARDS)
    write_index(folder, weight_map)
    with pytest.raises(ModelError, match='no "weight_map"'):
        open_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.ckpt"])
def test_pickled_weights_are_refused_by_name(name, tmp_path):
    folder = write_folder(tmp_path / "m", {})
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=rf"its weights are pickled \({name}\)"):
        open_model(folder)
    write_index(folder, {"a": name})
    with pytest.raises(ModelError, match=f"names {name}, which is not a .safetensors file"):
        open_model(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        open_model(write_folder(tmp_path / "m", {}))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_other_quantizations_are_refused_by_name(method, tmp_path):
    config = {**CONFIG, "quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(ModelError, match=f"quantized by {method}, which is not read"):
        open_model(write_folder(tmp_path / "m", {"model.safetensors": PAIR}, config))


def test_every_quantized_module_that_is_damaged_is_named(tmp_path):
    good = np.zeros((2, 8), np.uint32)
    scales = np.zeros((2, 1), np.float32)
    tensors = {
        "a.weight": good, "a.scales": scales, "a.biases": np.zeros((2, 2), np.float32),
        "b.weight": np.zeros((3, 8), np.uint32), "b.scales": scales, "b.biases": scales,
        "c.weight": good, "c.scales": scales,
        "d.scales": scales,
        "e.weight": good,
        "f.weight": good, "f.scales": np.float32(1), "f.biases": np.float32(1),
    }  # fmt: skip
    config = {**CONFIG, "quantization": {"bits": 4, "group_size": 64}}
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    with pytest.raises(ModelError) as caught:
        open_model(write_folder(tmp_path / "m", {"model.safetensors": tensors}, config))
    for words in (
        "a.weight: uint32 [2, 8] with scales [2, 1] and biases [2, 2] is not 4 bits in groups of 64",
        "b.weight: uint32 [3, 8] with scales [2, 1]",
        "c.weight: uint32 [2, 8] with scales float32 [2, 1] and no biases is not mxfp4",
        "d.scales has no matching d.weight",
        "e.weight is packed, but has no matching e.scales",
        "f.weight: uint32 [2, 8] with scales []",
    ):
        assert words in str(caught.value)


def test_a_quantization_mode_that_is_not_read_is_named(tmp_path):
    config = {**CONFIG, "quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}
    with pytest.raises(ModelError, match=r"mode nvfp4 is not read \(accepted: affine, mxfp4\)"):
        open_model(write_folder(tmp_path / "m", {"model.safetensors": PAIR}, config))
