"""Verification lets pass what rounding explains, and nothing else: a wrong name, order, scale or setting fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.tiny_adapters import write_peft
from support.tiny_models import write_mlx_quantized, write_model
from support.toy_backend import write_toy_model

from macft.conversion.merged import export_merged
from macft.errors import ModelError
from macft.verify.logits import (
    EXACT,
    Subject,
    Tolerance,
    VerifyError,
    compare_logits,
    tolerance_of,
    verify,
)
from macft.weights.adapters.peft import read_adapter
from macft.weights.folder import ModelFolder
from macft.weights.source import open_model
from macft.weights.tensors.lazy import Array, LazyTensor, cast, from_array
from macft.weights.writer import write_model as write_tensors

ENGINES = ("mlx", "torch")


def changed(source: Path, folder: Path, change: Callable[[str, Array], Array]) -> Path:
    """A copy of a model with `change` of every tensor."""
    opened = open_model(source)
    tensors: list[LazyTensor] = [from_array(t.name, change(t.name, np.array(t.read()))) for t in opened.tensors]
    write_tensors(folder, opened.config, tensors, source_folder=source, layout="hf")
    return folder


def test_agreement_by_hand():
    first = np.array([[1.0, 2.0, 6.0], [4.0, 0.0, 2.0]], np.float32)
    second = np.array([[1.0, 2.0, 9.0], [4.0, 6.0, 2.0]], np.float32)
    found = compare_logits(first, second)
    assert (found.positions, found.largest, found.top1) == (2, 6.0, 0.5)
    assert found.largest_share == 1.0
    # about their means: differences (-1 -1 2) and (-2 4 -2), logits (-2 -1 3) and (2 -2 0)
    assert found.rms_share == pytest.approx((30 / 22) ** 0.5)


def test_a_constant_of_a_position_is_seen_by_the_exact_tolerance_alone():
    first = np.array([[1.0, 2.0, 6.0]], np.float32)
    found = compare_logits(first, first + 3)
    assert (found.largest, found.rms_share, found.top1) == (3.0, 0.0, 1.0)


def test_equal_logits_are_no_distance_apart_even_if_all_zero():
    zeros = np.zeros((2, 4), np.float32)
    assert compare_logits(zeros, zeros) == compare_logits(zeros, zeros.copy())
    assert compare_logits(zeros, zeros).largest_share == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_passes_on_each_engine(engine, model, tmp_path):
    copy = changed(model, tmp_path / "copy", lambda _, array: array)
    said = verify(Subject(model), Subject(copy), EXACT, prefers=engine)
    assert said.startswith(f"verified with {engine}: the largest difference of ")
    assert "is 0 (0 of the largest logit)" in said and "top-1 agrees at 100.0%" in said


def _halves_swapped(name: str, array: Array) -> Array:
    return np.roll(array, 8, axis=0) if name == "model.layers.1.self_attn.q_proj.weight" else array


def _norm_shifted(name: str, array: Array) -> Array:
    return array + np.float32(1e-2) if name == "model.norm.weight" else array


def _gate_is_up(name: str, array: Array) -> Array:
    return array[::-1].copy() if name == "model.layers.0.mlp.gate_proj.weight" else array


@pytest.mark.parametrize("change", [_halves_swapped, _norm_shifted, _gate_is_up], ids=lambda c: c.__name__)
def test_one_wrong_tensor_fails(change, model, tmp_path):
    wrong = changed(model, tmp_path / "wrong", change)
    with pytest.raises(VerifyError) as caught:
        verify(Subject(model), Subject(wrong), EXACT)
    assert str(caught.value).startswith(f"{wrong}: verification with ") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_wrong_rope_base_fails(model, tmp_path):
    wrong = changed(model, tmp_path / "wrong", lambda _, array: array)
    config = json.loads((wrong / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="failed"):
        verify(Subject(model), Subject(wrong), EXACT)


def test_another_vocabulary_fails_by_shape(tmp_path):
    with pytest.raises(VerifyError, match=r"logits \[64, 199\], of the source"):
        verify(Subject(write_toy_model(tmp_path / "a")), Subject(write_model(tmp_path / "b", "llama")), EXACT)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_a_merge_rounded_to_16_bits_passes_and_one_of_twice_the_scale_fails(dtype, limit, model, tmp_path):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    opened = open_model(model)
    base = tmp_path / "base"
    tensors = [cast(tensor, kind) for tensor in opened.tensors]
    write_tensors(
        base, {**opened.config, "dtype": dtype, "torch_dtype": dtype}, tensors, source_folder=model, layout="hf"
    )
    adapter = read_adapter(write_peft(tmp_path / "adapter", base))
    twice = read_adapter(write_peft(tmp_path / "twice", base, alpha=16.0))
    export_merged(ModelFolder("base", base), [adapter], tmp_path / "merged")
    tolerance = tolerance_of(tmp_path / "merged", is_rounded=True)
    assert tolerance == Tolerance(f"rounded to {dtype}", limit, is_exact=False)
    assert "top-1 agrees" in verify(Subject(base, (adapter,)), Subject(tmp_path / "merged"), tolerance)
    for wrong in ((twice,), ()):
        with pytest.raises(VerifyError):
            verify(Subject(base, wrong), Subject(tmp_path / "merged"), tolerance)


@pytest.mark.mlx
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.0625), (4, 1.0), (3, 1.2)])
def test_quantizing_has_a_tolerance_of_its_own_and_another_model_fails(bits, limit, model, tmp_path):
    quantized = write_mlx_quantized(model, tmp_path / "quantized", bits)
    tolerance = tolerance_of(quantized, is_rounded=False)
    assert tolerance == Tolerance(f"quantized to {bits} bits", limit, is_exact=False)
    verify(Subject(model), Subject(quantized), tolerance)
    other = write_toy_model(tmp_path / "other", seed=1)
    with pytest.raises(VerifyError):
        verify(Subject(other), Subject(quantized), tolerance)


def test_float32_has_the_exact_tolerance_even_if_merged(model):
    assert tolerance_of(model, is_rounded=True) == EXACT


def test_a_model_no_engine_loads_is_named(model, tmp_path):
    strange = changed(model, tmp_path / "strange", lambda _, array: array)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="cannot be verified, as no installed engine loads it"):
        verify(Subject(model), Subject(strange), EXACT)


@pytest.mark.mlx
@pytest.mark.torch
def test_an_adapter_of_peft_is_read_by_peft_whatever_engine_is_preferred(model, tmp_path):
    adapter = read_adapter(write_peft(tmp_path / "adapter", model))
    export_merged(ModelFolder("model", model), [adapter], tmp_path / "merged")
    said = verify(Subject(model, (adapter,)), Subject(tmp_path / "merged"), EXACT, prefers="mlx")
    assert said.startswith("verified with torch and mlx: ")
