"""Quantizing a list of tensors against mlx-lm's own quantize_model: the same modules, bytes and config."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.tiny_layouts import CASES, bytes_of, mlx_array, mlx_bytes, mlx_model, write_case

from macft.errors import ModelError
from macft.weights.layouts.mlx import mlx_config, to_mlx
from macft.weights.quantization.affine import BITS, dequantize_affine
from macft.weights.quantization.model import GROUP_SIZES, quantize
from macft.weights.source import Source, open_model
from macft.weights.tensors.lazy import LazyTensor, cast, from_array, read_rows

LLAMA = {"model_type": "llama"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """source(case) is the case as transformers saved it, built once."""
    built: dict[str, Source] = {}

    def get(case: str) -> Source:
        if case not in built:
            built[case] = open_model(write_case(tmp_path_factory.mktemp("case"), case))
        return built[case]

    return get


def expected(config: dict[str, Any], tensors: list[LazyTensor], bits: int, group_size: int):
    """(bytes, quantization settings) of the same model, quantized by mlx-lm."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    model = mlx_model(config)
    weights = {tensor.name: mlx_array(tensor.read()) for tensor in tensors}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)  # gemma3_text learns here that its head is tied
    model.load_weights(list(weights.items()), strict=True)
    model, after = quantize_model(model, dict(config), group_size, bits)
    return mlx_bytes(dict(tree_flatten(model.parameters()))), after["quantization"]


@pytest.mark.mlx
@pytest.mark.parametrize(("bits", "group_size", "dtype"), [(4, 64, "bfloat16"), (3, 32, "float32")])
@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_quantized_as_mlx_lm_does_it(case, bits, group_size, dtype, source):
    found = source(case)
    tensors = [cast(tensor, np.dtype(getattr(ml_dtypes, dtype, dtype))) for tensor in found.tensors]
    config, tensors = mlx_config(found.config, tensors), to_mlx(found.config, tensors)
    after, quantized = quantize(config, tensors, bits, group_size)
    theirs, settings = expected(config, tensors, bits, group_size)
    ours = bytes_of(quantized)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert after["quantization"] == settings and after["quantization_config"] == settings


@pytest.mark.mlx
@pytest.mark.parametrize("bits", [2, 5, 6, 8])
def test_all_other_bits_too(bits, source):
    found = source("qwen3_moe")
    config, tensors = mlx_config(found.config, found.tensors), to_mlx(found.config, found.tensors)
    after, quantized = quantize(config, tensors, bits, 64)
    theirs, settings = expected(config, tensors, bits, 64)
    assert bytes_of(quantized) == theirs and after["quantization"] == settings


def weight(shape: tuple[int, ...]) -> LazyTensor:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return from_array("model.layers.0.mlp.up_proj.weight", array)


def test_a_width_that_groups_do_not_divide_stays_as_it_is():
    tensors = [weight((8, 96))]
    config, after = quantize(LLAMA, tensors, 4, 64)
    assert after == tensors and config["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"}
    _, after = quantize(LLAMA, tensors, 4, 32)
    assert [tensor.name.rpartition(".")[2] for tensor in after] == ["weight", "scales", "biases"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_parts_in_any_order_and_twice_are_the_parts_of_the_whole(order):
    """Scales and biases come from the packed rows read so far, and from the others when they are needed."""
    _, expected = quantize(LLAMA, [weight((50, 128))], 4, 64)
    whole = [tensor.read() for tensor in expected]
    _, parts = quantize(LLAMA, [weight((50, 128))], 4, 64)
    assert np.array_equal(read_rows(parts[0], 7, 23), whole[0][7:23])
    for which in order * 2:
        assert np.array_equal(parts[which].read(), whole[which])
    restored = dequantize_affine(*whole, bits=4, group_size=64)
    # half a step by rounding; at the end of a group half a step more, as its scale is moved to meet the other end
    steps = np.repeat(np.abs(whole[1]), 64, axis=-1)
    assert (np.abs(restored - weight((50, 128)).read()) <= steps * 1.001).all()


def test_threads_that_read_all_parts_at_once_get_the_same():
    tensors = [weight((64, 256))]
    _, expected = quantize(LLAMA, tensors, 4, 64)
    whole = [tensor.read() for tensor in expected]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            _, parts = quantize(LLAMA, tensors, 4, 64)
            rows = [pool.submit(read_rows, parts[0], start, start + 8) for start in range(0, 64, 8)]
            small = [pool.submit(part.read) for part in parts[1:]]
            assert np.array_equal(np.concatenate([future.result() for future in rows]), whole[0])
            assert all(np.array_equal(found.result(), part) for found, part in zip(small, whole[1:], strict=True))


def test_nothing_is_quantized_before_it_is_asked_for():
    def unread(*_: int) -> Any:
        raise AssertionError("was read")

    closed = LazyTensor("model.norm2.weight", np.dtype(np.float32), (4, 64), unread, unread)
    _, parts = quantize(LLAMA, [closed], 4, 64)
    assert [tensor.shape for tensor in parts] == [(4, 8), (4, 1), (4, 1)]


@pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (1, 64), (4, 48), (4, 256)])
def test_bits_and_groups_that_mlx_does_not_have_are_refused(bits, group_size):
    with pytest.raises(
        ModelError, match=rf"{bits} bits in groups of {group_size}: accepted are 2, 3, 4, 5, 6, 8 bits in"
    ):
        quantize(LLAMA, [weight((8, 768))], bits, group_size)


@pytest.mark.mlx
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_has_all_bits_and_groups_that_are_accepted(bits, group_size):
    import mlx.core as mx

    tensor = weight((8, 768))
    with mx.stream(mx.cpu):
        parts = mx.quantize(mx.array(tensor.read()), group_size=group_size, bits=bits)
    _, ours = quantize(LLAMA, [tensor], bits, group_size)
    assert [part.read().tobytes() for part in ours] == [np.array(part).tobytes() for part in parts]


def test_a_router_that_mlx_lm_could_not_quantize_is_named():
    """mlx-lm quantizes it in groups of 64 whatever is asked, and fails if 64 does not divide its width."""
    router = from_array("model.layers.0.mlp.gate.weight", np.ones((4, 96), np.float32))
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.gate.weight is float32 \[4, 96\]"):
        quantize({"model_type": "qwen3_moe"}, [router], 4, 32)


def test_an_unknown_model_type_is_refused():
    with pytest.raises(ModelError, match="model_type rwkv9"):
        quantize({"model_type": "rwkv9"}, [weight((8, 64))], 4, 64)
