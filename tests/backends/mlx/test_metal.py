"""What MLX does on a GPU, on its CPU build with a GPU's settings: attention of two kinds, memory, compiled steps."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft  # noqa: F401  it replaces the module transformers, which must not happen during a test
import pytest
from support.engines import load_model, train_step
from support.loud_models import write_loud_model
from support.step_numbers import LORA, assert_same, load, supervised_numbers
from support.tiny_models import random_examples, random_pairs, write_mlx_quantized, write_model

from macft.backends.base import ModelSpec, OptimizerSpec, Sampling
from macft.backends.mlx import device
from macft.backends.mlx import step as steps
from macft.backends.mlx.split import SplitModel
from macft.backends.probes import probe_packed
from macft.data.batches import collate
from macft.data.tokenization.table import Reference
from macft.errors import ModelError
from macft.objectives.losses import Sft
from macft.objectives.preference import Preference, answer_positions, reference_columns

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("small_threads")]

# Attention: what has a gradient is computed by other kernels, which round their scores


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return write_loud_model(tmp_path_factory.mktemp("loud"))


@pytest.fixture
def metals_attention(monkeypatch):
    """Attention in float32 inside, but for the trace of a gradient, as mlx/fast.cpp chooses on Metal."""
    attend, depth = mx.fast.scaled_dot_product_attention, [0]

    def attention(q, k, v, *, scale, mask=None, **options):
        if depth[0]:
            return attend(q, k, v, scale=scale, mask=mask, **options)
        found = attend(*(x.astype(mx.float32) for x in (q, k, v)), scale=scale, mask=mask, **options)
        return found.astype(q.dtype)

    def tracing(function):
        def traced(*arguments):
            depth[0] += 1
            try:
                return function(*arguments)
            finally:
                depth[0] -= 1

        return traced

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    for name in ("vjp", "value_and_grad"):
        transform = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda function, *rest, of=transform: of(tracing(function), *rest))


@pytest.fixture
def attention_by_shape(monkeypatch):
    """Masked attention that rounds its scores, and other attention that does not: kernels differ by shape and mask."""
    attend = mx.fast.scaled_dot_product_attention

    def attention(q, k, v, *, scale, mask=None, **options):
        if isinstance(mask, mx.array):
            return attend(q, k, v, scale=scale, mask=mask, **options)
        return attend(*(x.astype(mx.float32) for x in (q, k, v)), scale=scale, mask=mask, **options).astype(q.dtype)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


@pytest.mark.usefixtures("mac", "metals_attention")
def test_a_preference_run_starts_at_rewards_0_in_bfloat16(loud):
    spec = ModelSpec(loud, LORA, precision="bfloat16", max_length=48, rows_per_example=2)
    model = load_model("mlx", spec, OptimizerSpec())
    pairs = random_pairs(2, seed=3, answer=(12, 19))
    batch = collate([replace(pair, reference=Reference(0.0, 0.0, 1.0)) for pair in pairs])
    logps = model.logps(batch, answer_positions(batch, with_prompt=False))
    chosen, rejected, _ = reference_columns(logps, batch, 1.0)
    scored = [replace(p, reference=Reference(*of, 1.0)) for p, *of in zip(pairs, chosen, rejected, strict=True)]
    result = train_step(model, Preference(beta=0.1), [collate(scored)], lr=1e-3, step=0)
    rewards = [result.metrics[f"rewards/{side}"] for side in ("chosen", "rejected")]
    assert rewards == pytest.approx([0.0, 0.0], abs=1e-5)
    assert result.loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.usefixtures("mac", "attention_by_shape")
def test_a_loud_model_in_bfloat16_is_split_shares_prompts_and_packs(loud):
    model = load_model("mlx", ModelSpec(loud, LORA, packing=True))
    assert (model.info.device, model.info.precision, model.info.notes) == ("Apple M4 Pro", "bfloat16", ())
    split = model._split
    first, second = (split.logits(layout) for layout in probe_packed())
    assert 4 < second.std() < 12, "as far apart as a real model's logits"
    assert not np.allclose(first, second, rtol=2e-2, atol=2e-2), "rounding shows"
    assert split.backbone is not None and split.shares_prompts and split.packs


@pytest.mark.usefixtures("mac", "attention_by_shape")
def test_rows_whose_examples_see_each_other_are_refused_in_bfloat16(loud, monkeypatch):
    def ignore_positions(self, layout, before=SplitModel.hidden):
        return before(self, {name: value for name, value in layout.items() if name != "positions"})

    monkeypatch.setattr(SplitModel, "hidden", ignore_positions)
    model = load_model("mlx", ModelSpec(loud, LORA, packing=True))
    assert not model._split.packs
    assert model.info.notes[0].startswith("packing is off: ")


# Compiled steps


@pytest.mark.usefixtures("mac")
def test_every_shape_is_compiled_and_old_ones_are_dropped(tiny_model, monkeypatch):
    monkeypatch.setattr(steps.CompiledStep, "most_shapes", 2)
    batches = [
        collate(random_examples(1, seed=length, shortest=length, longest=length)) for length in (30, 60, 90, 120, 30)
    ]
    model = load("mlx", tiny_model("qwen2"))
    losses = [train_step(model, Sft(), [batch], lr=0.0, step=0).loss for batch in batches]
    assert len(model._steps[Sft()].shapes) == 1, "two, then two others, then the first again"
    for batch, loss in zip(batches, losses, strict=True):
        logps = model.logps(batch, batch.loss_mask[:, 1:])
        assert loss == pytest.approx(-logps.sum() / batch.loss_mask[:, 1:].sum(), rel=1e-5)


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_compiled_optimizer_is_the_plain_one_bit_for_bit(scale):
    rng = np.random.default_rng(2)
    shapes = {"a": (7, 33), "b": (5,), "c": (64, 3)}
    optimizer = steps.AdamW(OptimizerSpec(weight_decay=0.1, max_grad_norm=0.5))
    runs = []
    for compiles in (True, False):
        if not compiles:
            optimizer._update = optimizer._updated
        rng = np.random.default_rng(2)
        state = steps.AdamState()
        parameters = {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
        for step in range(5):
            drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            gradients = {name: mx.array(value * np.float32(scale)) for name, value in drawn.items()}
            state, parameters, norm = optimizer.update(state, parameters, gradients, 1e-2 / (step + 1), scale)
        runs.append([np.array(x) for x in (norm, *parameters.values(), *state.moments["exp_avg_sq"].values())])
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0] > 0.5, "clipping is tried"


# Quantized bases


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(mx.float16) is a base of 4 bits whose scales are of that type."""
    parent = tmp_path_factory.mktemp("quantized")

    def write(dtype: mx.Dtype) -> Path:
        folder = parent / str(dtype)
        if not folder.exists():
            source = write_model(parent / f"{dtype}-source", "qwen2", hidden_size=128)
            weights = mx.load(str(source / "model.safetensors"))
            cast = {name: value.astype(dtype) for name, value in weights.items()}
            mx.save_safetensors(str(source / "model.safetensors"), cast, metadata={"format": "pt"})
            write_mlx_quantized(source, folder, 4)
        return folder

    return write


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(
    ("scales", "asked", "expected", "notes"),
    [
        (mx.float16, "auto", "float16", 0),
        (mx.bfloat16, "auto", "bfloat16", 0),
        (mx.float32, "auto", "bfloat16", 0),
        (mx.float16, "bfloat16", "bfloat16", 1),
        (mx.float16, "float16", "float16", 0),
    ],
    ids=str,
)
def test_a_quantized_base_keeps_the_type_of_its_scales(quantized, scales, asked, expected, notes):
    model = load_model("mlx", ModelSpec(quantized(scales), LORA, precision=asked))
    kept = [module.scales.dtype for module in model._model.modules() if isinstance(module, nn.QuantizedLinear)]
    assert kept and set(kept) == {device.DTYPES[expected]}
    assert (model.info.precision, len(model.info.notes)) == (expected, notes)


def test_quantized_products_have_the_numbers_and_gradients_of_dense_ones(quantized, request):
    """On a CPU the base is dequantized; on a GPU it is multiplied as it is, forward and backward."""
    batch, results = collate(random_examples(3, seed=6)), []
    for _ in range(2):
        model = load("mlx", quantized(mx.float32))
        results.append(supervised_numbers(model, batch))
        request.getfixturevalue("mac")
    assert any(isinstance(module, nn.QuantizedLinear) for module in model._model.modules())
    assert_same(*results)


def test_products_in_float32_are_not_rounded_to_tf32():
    assert os.environ["MLX_ENABLE_TF32"] == "0"


# float16


def gradients(folder: Path, precision: str, weight: float, *, scales: bool = True) -> np.ndarray:
    """The gradient of one step, as one vector."""
    optimizer = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)
    model = load_model("mlx", ModelSpec(folder, LORA, precision=precision), optimizer)
    if not scales:
        model._loss_scale.value = 1.0
    result = model.train_step(Sft(), [collate(random_examples(2, seed=3))], weight=weight, lr=0.0, step=0)
    assert not result.is_skipped
    state = model.optimizer_state()
    return np.concatenate([state[name].ravel() for name in sorted(state) if name.endswith(".exp_avg")])


@pytest.fixture(scope="module")
def loud_but_short(tmp_path_factory):
    return write_loud_model(tmp_path_factory.mktemp("loud-4"), num_hidden_layers=4)


@pytest.mark.usefixtures("mac")
def test_scaled_float16_gradients_are_those_of_float32_where_unscaled_ones_vanish(loud_but_short):
    weight = 2e6
    expected = gradients(loud_but_short, "float32", weight)
    for scales, low, high in ((True, 0.0, 0.02), (False, 0.2, 1.1)):
        found = gradients(loud_but_short, "float16", weight, scales=scales)
        assert low <= np.linalg.norm(found - expected) / np.linalg.norm(expected) < high


@pytest.mark.usefixtures("mac")
def test_float16_skips_what_overflows_and_goes_on_where_it_stopped(loud_but_short):
    def fresh():
        return load_model("mlx", ModelSpec(loud_but_short, LORA, precision="float16"), OptimizerSpec())

    model, batch = fresh(), collate(random_examples(2, seed=3))
    model._loss_scale.value = 2.0**40
    before = model.trained_state()
    first = train_step(model, Sft(), [batch], lr=1e-3, step=0)
    assert first.is_skipped and np.isfinite(first.loss) and not np.isfinite(first.grad_norm)
    assert model.optimizer_state().keys() == {"loss_scale"}
    assert all(np.array_equal(value, before[name]) for name, value in model.trained_state().items())
    model._loss_scale.value = 1024.0
    second = train_step(model, Sft(), [batch], lr=1e-3, step=1)
    assert not second.is_skipped and second.loss == pytest.approx(first.loss, rel=1e-6)
    # the first step that AdamW takes moves by the rate itself, whatever the gradient
    moved = max(float(np.abs(model.trained_state()[name] - before[name]).max()) for name in before)
    assert moved == pytest.approx(1e-3, rel=1e-2)
    resumed = fresh()
    resumed.set_trained_state(model.trained_state())
    resumed.set_optimizer_state(model.optimizer_state(), 2)
    assert resumed._state.steps == 1, "of two steps one was skipped"
    third, again = (train_step(each, Sft(), [batch], lr=1e-3, step=2) for each in (model, resumed))
    assert third == again


@pytest.mark.usefixtures("mac")
def test_a_float16_checkpoint_before_the_first_step_taken_is_resumed(loud_but_short):
    spec, batch = ModelSpec(loud_but_short, LORA, precision="float16"), collate(random_examples(2, seed=3))
    model, resumed = (load_model("mlx", spec, OptimizerSpec()) for _ in range(2))
    model._loss_scale.value = 2.0**40
    assert train_step(model, Sft(), [batch], lr=1e-3, step=0).is_skipped
    resumed.set_optimizer_state(model.optimizer_state(), 1)
    assert resumed._loss_scale.value == 2.0**39
    for each in (model, resumed):
        each._loss_scale.value = 1024.0
    second, again = (train_step(each, Sft(), [batch], lr=1e-3, step=1) for each in (model, resumed))
    assert second == again and not second.is_skipped
    assert model.trained_state().keys() == resumed.trained_state().keys()
    assert all(np.array_equal(value, resumed.trained_state()[name]) for name, value in model.trained_state().items())


@pytest.fixture(scope="module")
def overflowing(loud_but_short, tmp_path_factory):
    """overflowing(factor) has a first layer whose values are multiplied: 1e6 overflows float16, 1e80 float32 too."""

    def write(factor: float) -> Path:
        folder = tmp_path_factory.mktemp("overflowing") / "model"
        shutil.copytree(loud_but_short, folder)
        weights = mx.load(str(folder / "model.safetensors"))
        for name in ("up_proj", "down_proj"):
            weights[f"model.layers.0.mlp.{name}.weight"] *= factor**0.5
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        return folder

    return write


@pytest.mark.usefixtures("mac")
def test_a_model_whose_activations_overflow_float16_is_computed_in_float32(overflowing):
    spec = ModelSpec(overflowing(1e6), LORA, precision="float16", packing=True)
    model = load_model("mlx", spec, OptimizerSpec())
    assert model.info.notes == ("float16 overflows in this model: computing in float32",)
    assert model.info.precision == "float32" and model._loss_scale is None
    assert model._split.backbone is not None and model._split.packs
    assert np.isfinite(model.logits([1, 2, 3])).all()


@pytest.mark.usefixtures("mac")
def test_float16_skips_no_step_whose_loss_is_not_finite(loud_but_short):
    model = load_model("mlx", ModelSpec(loud_but_short, LORA, precision="float16"), OptimizerSpec())
    state = model.trained_state()
    model.set_trained_state({name: np.full_like(value, 6e4) for name, value in state.items()})
    result = train_step(model, Sft(), [collate(random_examples(2, seed=3))], lr=1e-3, step=0)
    assert not np.isfinite(result.loss) and not result.is_skipped
    assert model._loss_scale.value == 65536.0


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=5)], ids=["greedy", "drawn"]
)
def test_scores_that_are_not_finite_are_an_error_not_an_answer(tiny_model, sampling):
    model = load_model("mlx", ModelSpec(tiny_model("llama"), None))
    norm = model._model.model.norm
    norm.weight = norm.weight * float("inf")
    with pytest.raises(
        ModelError, match=r"^the scores of the next token are not finite: .* float32 \(bf16=false\), or"
    ):
        list(model.generate([1, 2, 3], max_new_tokens=4, stop_ids=frozenset(), sampling=sampling))
