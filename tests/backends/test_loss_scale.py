"""float16 with a scaled loss: the gradients of float32, and GradScaler's way with those that overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.loud_models import write_loud_model
from support.tiny_models import random_examples

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.backends.loss_scale import LossScale
from macft.backends.probes import agree, probe_rows
from macft.backends.torch import model as models
from macft.backends.torch.split import SplitModel
from macft.data.batches import collate
from macft.errors import ModelError
from macft.objectives.losses import Sft

pytestmark = pytest.mark.usefixtures("small_threads")

# With beta1 = 0 the first moment is the gradient.
GRADIENT = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)


def test_the_scale_moves_as_gradscaler_moves_it():
    """Also over 4,000 steps: halved at each overflow, doubled 2,000 steps after the last change."""
    overflows = {0, 1, 5, 2005, 2500}
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs, ours = torch.amp.GradScaler("cpu"), LossScale()
    for step in range(5000):
        assert ours.value == theirs.get_scale()
        theirs.scale(torch.zeros(1))
        parameter.grad = torch.tensor([float("inf") if step in overflows else 0.0])
        theirs.step(optimizer)
        theirs.update()
        assert ours.skips(is_finite=step not in overflows) == (step in overflows)


def test_at_scale_1_nothing_is_skipped_so_that_a_diverged_run_stops():
    scale = LossScale()
    skipped = [scale.skips(is_finite=False) for _ in range(18)]
    assert skipped == [True] * 16 + [False] * 2 and scale.value == 1.0


def test_a_saved_scale_goes_on_where_it_was():
    scale = LossScale()
    scale.skips(is_finite=False)
    scale.skips(is_finite=True)
    other = LossScale()
    assert other.restore(scale.state(steps_taken=7)) == 7
    assert (other.value, other.state(7).tolist()) == (32768.0, [32768.0, 1.0, 7.0])


@pytest.fixture
def float16(monkeypatch):
    """float16 on a CPU, where it is never chosen."""
    chosen = models.compute_dtype
    monkeypatch.setattr(
        models, "compute_dtype", lambda name, *rest: torch.float16 if name == "float16" else chosen(name, *rest)
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_loud_model(tmp_path_factory.mktemp("loud"), num_hidden_layers=4)


def gradients(folder, precision: str, weight: float, *, scales: bool = True) -> dict[str, np.ndarray]:
    model = load_model("torch", ModelSpec(folder, LoraSpec(4, 8), precision=precision), GRADIENT)
    if not scales:
        model._loss_scale.value = 1.0
    batch = collate(random_examples(2, seed=3))
    result = model.train_step(Sft(), [batch], weight=weight, lr=0.0, step=0)
    assert not result.is_skipped
    return {name: value for name, value in model.optimizer_state().items() if name.endswith(".exp_avg")}


def error(found: dict, expected: dict) -> float:
    first, second = (np.concatenate([values[name].ravel() for name in expected]) for values in (found, expected))
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.usefixtures("float16")
def test_scaled_float16_gradients_are_those_of_float32_where_unscaled_ones_vanish(model_folder):
    # the mean over as many tokens as a large step has: each gives the backward pass a number near 1e-8
    weight = 2e6
    expected = gradients(model_folder, "float32", weight)
    assert error(gradients(model_folder, "float16", weight), expected) < 0.02
    assert error(gradients(model_folder, "float16", weight, scales=False), expected) > 0.2


@pytest.mark.usefixtures("float16")
def test_a_step_that_overflows_changes_nothing_and_the_next_one_is_taken(model_folder):
    spec = ModelSpec(model_folder, LoraSpec(4, 8), precision="float16")
    model = load_model("torch", spec, OptimizerSpec(max_grad_norm=1.0))
    batch = collate(random_examples(2, seed=3))
    model._loss_scale.value = 2.0**40
    before = model.trained_state()
    first = train_step(model, Sft(), [batch], lr=1e-3, step=0)
    after = model.trained_state()
    assert first.is_skipped and np.isfinite(first.loss) and not np.isfinite(first.grad_norm)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert model.optimizer_state().keys() == {"loss_scale"}
    model._loss_scale.value = 1024.0
    second = train_step(model, Sft(), [batch], lr=1e-3, step=1)
    assert not second.is_skipped and second.loss == first.loss
    # the first step that AdamW takes moves by the rate itself, whatever the gradient
    moved = max(float(np.abs(model.trained_state()[name] - before[name]).max()) for name in before)
    assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.usefixtures("float16")
def test_a_run_goes_on_from_a_checkpoint_before_its_first_taken_step(model_folder):
    def load():
        return load_model("torch", ModelSpec(model_folder, LoraSpec(4, 8), precision="float16"), OptimizerSpec())

    batch = collate(random_examples(2, seed=3))
    model = load()
    model._loss_scale.value = 2.0**40
    assert train_step(model, Sft(), [batch], lr=1e-3, step=0).is_skipped
    resumed = load()
    resumed.set_trained_state(model.trained_state())
    resumed.set_optimizer_state(model.optimizer_state(), 1)
    for each in (model, resumed):
        each._loss_scale.value = 1024.0
    assert train_step(model, Sft(), [batch], lr=1e-3, step=1) == train_step(resumed, Sft(), [batch], lr=1e-3, step=1)


def test_a_model_that_overflows_in_float16_is_refused_by_its_logits():
    class Overflows:
        def logits(self, _layout):
            return np.full((3, 5), np.nan, dtype=np.float32)

    layout = probe_rows()
    with pytest.raises(ModelError) as refusal:
        agree(Overflows(), layout, Overflows(), layout, "float16")
    assert str(refusal.value) == (
        "the model's logits on a few tokens are not finite in float16; float16 overflows in it: compute in float32 "
        "(bf16=false, fp16=false)"
    )


@pytest.mark.usefixtures("float16")
def test_a_loss_that_is_not_finite_is_not_skipped(model_folder, monkeypatch):
    model = load_model("torch", ModelSpec(model_folder, LoraSpec(4, 8), precision="float16"), OptimizerSpec())
    real = SplitModel.hidden
    monkeypatch.setattr(SplitModel, "hidden", lambda self, layout: real(self, layout) * float("inf"))
    result = train_step(model, Sft(), [collate(random_examples(2, seed=3))], lr=1e-3, step=0)
    assert not result.is_skipped and not np.isfinite(result.loss) and model._loss_scale.value == 65536.0


@pytest.mark.usefixtures("float16")
def test_a_resumed_run_has_the_scale_and_the_steps_of_the_one_that_stopped(model_folder):
    def load():
        return load_model("torch", ModelSpec(model_folder, LoraSpec(4, 8), precision="float16"), OptimizerSpec())

    batch = collate(random_examples(2, seed=3))
    model = load()
    model._loss_scale.value = 2.0**40
    for step in range(30):
        train_step(model, Sft(), [batch], lr=1e-3, step=step)
    skipped = 30 - model._steps_taken
    assert 10 < skipped < 30
    resumed = load()
    resumed.set_trained_state(model.trained_state())
    resumed.set_optimizer_state(model.optimizer_state(), 30)
    results = [train_step(each, Sft(), [batch], lr=1e-3, step=30) for each in (model, resumed)]
    assert results[0] == results[1]
    states = [each.trained_state() for each in (model, resumed)]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
