"""Affine quantization in numpy against mlx.core, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from macft.errors import ModelError
from macft.weights.quantization.affine import (
    BITS,
    Quantization,
    dequantize_affine,
    quantization_of,
    quantize_affine,
)
from macft.weights.source import open_model
from macft.weights.tensors.lazy import Array

FLOATS = ["float32", "float16", "bfloat16"]


def as_numpy(array: Any) -> np.ndarray[Any, Any]:
    """An MLX array in numpy, bfloat16 included."""
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def as_mlx(array: np.ndarray[Any, Any]) -> Any:
    import mlx.core as mx

    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def weights(dtype: str, shape: tuple[int, ...] = (24, 256)) -> np.ndarray[Any, Any]:
    """Random rows, and groups that are hard: all zero, constant, one sign, tiny, huge."""
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array[0], array[1], array[2] = 0.0, 0.75, -0.75
    array[3], array[4] = np.abs(array[3]), -np.abs(array[4])
    array[5] *= 1e-9
    array[6] *= 1000.0
    array[7, :-1] = 0.0
    return array.astype(np.dtype(getattr(ml_dtypes, dtype, None) or dtype))


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_quantize_equals_mlx_bit_for_bit(bits: int, group_size: int, dtype: str) -> None:
    import mlx.core as mx

    array = weights(dtype)
    with mx.stream(mx.cpu):
        expected = [as_numpy(part) for part in mx.quantize(as_mlx(array), group_size=group_size, bits=bits)]
    found = quantize_affine(array, bits=bits, group_size=group_size)
    for name, part, other in zip(("packed", "scales", "biases"), found, expected, strict=True):
        assert part.dtype == other.dtype and part.shape == other.shape, name
        assert part.tobytes() == other.tobytes(), (name, np.argwhere(part != other)[:5])


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_equals_mlx_bit_for_bit(bits: int, group_size: int, dtype: str) -> None:
    """In float32: with 16-bit scales mx.dequantize rounds product and sum to 16 bits, which loses digits."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        parts = mx.quantize(as_mlx(weights(dtype)), group_size=group_size, bits=bits)
        scales, biases = (part.astype(mx.float32) for part in parts[1:])
        expected = np.array(mx.dequantize(parts[0], scales, biases, group_size=group_size, bits=bits))
        own_type = as_numpy(mx.dequantize(*parts, group_size=group_size, bits=bits)).astype(np.float32)
    found = dequantize_affine(*(as_numpy(part) for part in parts), bits=bits, group_size=group_size)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    # MLX's own 16-bit result differs only by the rounding of that type: one of the product, one of the sum
    eps = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    largest = np.abs(found).reshape(24, -1, group_size).max(axis=-1, keepdims=True).repeat(group_size, -1)
    assert (np.abs(found - own_type) <= 2 * eps * largest.reshape(found.shape) + (eps > 0) * 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
def test_every_pattern_of_bits_unpacks_to_its_numbers(bits: int) -> None:
    """By hand: with scale 1 and bias 0 the fields come back, lowest bits first."""
    fields = np.random.default_rng(1).integers(0, 1 << bits, 64)
    stream = sum(int(field) << (bits * index) for index, field in enumerate(fields))
    packed = np.frombuffer(stream.to_bytes(64 * bits // 8, "little"), np.uint32).reshape(1, -1)
    ones, zeros = np.ones((1, 1), np.float16), np.zeros((1, 1), np.float16)
    found = dequantize_affine(packed, ones, zeros, bits=bits, group_size=64)
    assert found[0].tolist() == fields.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_weight_is_off_by_at_most_half_a_step(bits: int) -> None:
    array = np.random.default_rng(2).standard_normal((8, 128)).astype(np.float32)
    packed, scales, biases = quantize_affine(array, bits=bits, group_size=64)
    found = dequantize_affine(packed, scales, biases, bits=bits, group_size=64)
    # moving the scale to meet the far end exactly can cost the near end up to half a step more
    assert (np.abs(found - array) <= 1.0 * np.abs(scales).repeat(64, axis=-1)).all()
    middle = np.median(np.abs(found - array) / np.abs(scales).repeat(64, axis=-1))
    assert middle <= 0.5


def test_stacks_of_matrices_are_handled_row_by_row() -> None:
    array = np.random.default_rng(3).standard_normal((3, 8, 128)).astype(np.float32)
    packed, scales, biases = quantize_affine(array, bits=4, group_size=64)
    whole = dequantize_affine(packed, scales, biases, bits=4, group_size=64)
    for index in range(3):
        alone = quantize_affine(array[index], bits=4, group_size=64)
        assert np.array_equal(whole[index], dequantize_affine(*alone, bits=4, group_size=64))


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, scales, biases = quantize_affine(np.ones((2, 128), np.float32), bits=4, group_size=64)
    with pytest.raises(ModelError, match="do not fit 8 bits in groups of 64"):
        dequantize_affine(packed, scales, biases, bits=8, group_size=64)
    with pytest.raises(ModelError, match="100 columns do not divide"):
        quantize_affine(np.ones((2, 100), np.float32), bits=4, group_size=64)


# --- folders


def write_folder(folder: Path, quantization: Any, tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    config = {"model_type": "llama", "quantization": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    # weights and scales in different files, as large models have them
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    return folder


def dequantized(folder: Path) -> dict[str, Array]:
    return {tensor.name: tensor.read() for tensor in open_model(folder, exact=True).tensors}


def layer(name: str, bits: int, group_size: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    array = np.random.default_rng(seed).standard_normal((16, 128)).astype(np.float16)
    packed, scales, biases = quantize_affine(array, bits=bits, group_size=group_size)
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}


def test_a_folder_with_layers_of_their_own_bits_comes_back_in_float32(tmp_path: Path) -> None:
    norm = np.ones(128, np.float16)
    bias = np.full(16, 0.5, np.float16)
    tensors = {
        **layer("model.layers.0.mlp.up_proj", 4, 64, 0),
        **layer("model.embed_tokens", 6, 32, 1),
        "model.norm.weight": norm,
        "model.layers.0.mlp.up_proj.bias": bias,
        "lm_head.weight": norm.reshape(1, -1),
    }
    settings = {"bits": 4, "group_size": 64, "model.embed_tokens": {"bits": 6, "group_size": 32}, "lm_head": False}
    found = dequantized(write_folder(tmp_path, settings, tensors))
    assert set(found) == {name for name in tensors if not name.endswith((".scales", ".biases"))}
    for name, bits, group_size in (("model.layers.0.mlp.up_proj", 4, 64), ("model.embed_tokens", 6, 32)):
        parts = [tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        assert np.array_equal(found[f"{name}.weight"], dequantize_affine(*parts, bits=bits, group_size=group_size))
        assert found[f"{name}.weight"].shape == (16, 128)
    assert found["model.norm.weight"].dtype == np.float16
    assert np.array_equal(found["model.layers.0.mlp.up_proj.bias"], bias)


def test_folders_that_are_damaged_are_refused(tmp_path: Path) -> None:
    good = layer("model.layers.0.mlp.up_proj", 4, 64, 0)
    affine = {"bits": 4, "group_size": 64}
    without_biases = {name: array for name, array in good.items() if not name.endswith("biases")}
    cases = [
        ({**affine, "mode": "nvfp4"}, good, "nvfp4"),
        (affine, without_biases, r"up_proj\.weight: .* no biases"),
        ({"bits": 8, "group_size": 64}, good, r"up_proj\.weight: uint32 .* is not 8 bits in groups of 64"),
    ]
    for index, (settings, tensors, message) in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        write_folder(folder, settings, tensors)
        with pytest.raises(ModelError, match=message):
            dequantized(folder)


def test_quantization_is_read_from_the_config() -> None:
    assert quantization_of({}) is None
    found = quantization_of({"quantization": {"bits": 4, "group_size": 64, "a.b": {"bits": 8, "group_size": 32}}})
    assert found == Quantization(4, 64, "affine", {"a.b": (8, 32)})
    assert (found.of("a.b"), found.of("a.c")) == ((8, 32), (4, 64))
    with pytest.raises(ModelError, match="bits 7 and group_size 64"):
        quantization_of({"quantization": {"bits": 7, "group_size": 64}})
    with pytest.raises(ModelError, match="an object with bits"):
        quantization_of({"quantization": 4})


@pytest.mark.mlx
def test_a_folder_that_mlx_lm_quantized_gives_mlx_lms_logits(tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.llama import Model, ModelArgs

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    args = ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=100, rope_theta=123456.0, **sizes)
    tokens = mx.array([[5, 17, 99, 3, 42]])
    with mx.stream(mx.cpu):
        mx.random.seed(0)
        model = Model(args)
        nn.quantize(model, bits=4, group_size=64)
        expected = np.array(model(tokens))
        tensors = dict(nn.utils.tree_flatten(model.parameters()))
        mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
        settings = {"model_type": "llama", "quantization": {"bits": 4, "group_size": 64}}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        plain = Model(args)
        plain.load_weights([(name, mx.array(array)) for name, array in dequantized(tmp_path).items()])
        found = np.array(plain(tokens))
    assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
