"""How much of a step a device holds at once, and what is said when it runs out of memory."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.tiny_models import random_examples, random_feedback, random_pairs, write_model

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.backends.batch_layout import exact, multiples_of, score_in_parts
from macft.backends.memory import LEVERS, plan_passes
from macft.backends.torch import backend as torch_backend
from macft.backends.torch import logits as verification
from macft.backends.torch import memory, model
from macft.backends.torch.split import SplitModel
from macft.data.batches import collate
from macft.errors import ModelError
from macft.objectives.losses import Sft

pytestmark = pytest.mark.usefixtures("small_threads")

# Qwen2.5-0.5B's block
HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
GB = 10**9


def test_a_pass_holds_as_many_rows_as_fit_into_the_memory_that_is_left():
    # 24 layers of Qwen2.5-0.5B keep 1.3 MB a token; 85 % of the memory is used
    plan = plan_passes(10 * GB, 2048, 1.3e6, 0.1e6, checkpoints=False)
    assert (plan.tokens_at_once, plan.checkpoints, plan.note) == (int(8.5 * GB / 1.3e6), False, None)


def test_a_row_that_does_not_fit_switches_checkpointing_on_and_says_so():
    plan = plan_passes(3 * GB, 2048, 1.3e6, 0.1e6, checkpoints=False)
    assert (plan.tokens_at_once, plan.checkpoints) == (int(2.55 * GB / 0.1e6), True)
    assert plan.note == (
        "gradient_checkpointing is on: without it the longest row, 2048 tokens, does not fit into the 3.0 GB that are "
        "free"
    )
    asked = plan_passes(3 * GB, 2048, 1.3e6, 0.1e6, checkpoints=True)
    assert asked == replace(plan, note=None)


@pytest.mark.parametrize("free", [-GB, 0, 10**6])
def test_a_row_that_fits_neither_way_is_still_tried(free):
    plan = plan_passes(free, 2048, float("inf"), float("inf"), checkpoints=False)
    assert (plan.tokens_at_once, plan.checkpoints) == (2048, True)


def kept_by_a_layer(folder, **options) -> float:
    """Bytes that one more token keeps in one more layer, in bfloat16."""
    kept = []
    for layers in (1, 2):
        path = write_model(folder / str(layers), "qwen2", **HALF_BILLION, num_hidden_layers=layers)
        spec = ModelSpec(path, LoraSpec(8, 16, **options), precision="bfloat16")
        loaded = load_model("torch", spec, OptimizerSpec())
        loaded._model.train()
        with torch.autocast("cpu", torch.bfloat16):
            kept.append([memory.kept_bytes(loaded._split, 1, tokens) for tokens in (64, 128)])
    [one, two] = [(long - short) / 64 for short, long in kept]
    return two - one


def test_a_layer_of_half_a_billion_parameters_keeps_54_kilobytes_a_token(tmp_path):
    # counted by hand from the operations: 61,104 with the copies in float32 that PEFT would make
    assert kept_by_a_layer(tmp_path) == pytest.approx(53_936, rel=1e-3)


def test_dropout_keeps_its_masks_and_its_results(tmp_path):
    assert kept_by_a_layer(tmp_path, dropout=0.05) == pytest.approx(81_584, rel=1e-3)


def test_measuring_leaves_nothing_behind(tiny_model):
    """Also not through the cycle that a saved output makes with the graph that saved it."""
    spec = ModelSpec(tiny_model("qwen3"), LoraSpec(4, 8), precision="bfloat16")
    loaded = load_model("torch", spec, OptimizerSpec())
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.kept_bytes(loaded._split, 1, 32) > 0
    weights = [weakref.ref(parameter) for parameter in loaded._split.model.parameters()]
    del loaded
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


@dataclass(eq=False)
class Kept:
    """A tensor for the backward pass."""

    tensor: torch.Tensor


@pytest.mark.parametrize("full", [False, True])
def test_the_head_keeps_no_logits_for_the_backward_pass(full, tmp_path, monkeypatch):
    """Neither a frozen one, nor one that is trained: with 50,000 tokens these would be 200 kB a row."""
    folder = write_model(tmp_path / "model", "llama", vocab_size=50_000, tie_word_embeddings=False)
    spec = ModelSpec(folder, None if full else LoraSpec(4, 8), full=full, precision="float32")
    split = load_model("torch", spec, OptimizerSpec())._split
    layout = {"targets": torch.ones(400, dtype=torch.int32), "valid": torch.ones(400)}
    hidden = torch.randn(400, 64, requires_grad=True)
    monkeypatch.setattr(split, "hidden", lambda _: hidden)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        alive.add(kept := Kept(tensor.detach()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        logps = split.logps(layout)
    weights = {p.data_ptr() for p in split.model.parameters()}
    assert sum(kept.tensor.numel() for kept in alive if kept.tensor.data_ptr() not in weights) <= 4 * hidden.numel()
    logps.sum().backward()
    expected = hidden.detach().requires_grad_()
    whole = torch.log_softmax(split.lm_head(expected), dim=-1)[:, 1]
    whole.sum().backward()
    np.testing.assert_allclose(logps.detach(), whole.detach(), rtol=1e-5)
    np.testing.assert_allclose(hidden.grad, expected.grad, atol=1e-4 * float(expected.grad.abs().max()))


def test_a_model_is_verified_in_float32_on_a_gpu_only_where_it_fits_twice(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    parameters = load_model("torch", ModelSpec(folder, None)).info.total_parameters
    gpu = torch.device("cuda")
    monkeypatch.setattr(memory, "pick_device", lambda: gpu)
    for free, device in ((8 * parameters, gpu), (8 * parameters - 1, torch.device("cpu"))):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.device_for_float32(folder) == device


def run_out(*_args, **_options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def one_line(doing: str, phase: str) -> str:
    """The whole message, as a pattern; `doing` is one too."""
    return rf"is out of memory {doing}, with [0-9.]+ [MG]B of [0-9.]+ GB in use: {re.escape(LEVERS[phase])}$"


def test_memory_that_runs_out_at_load_is_one_line(tiny_model, monkeypatch):
    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", run_out)
    with pytest.raises(ModelError, match=one_line("loading the weights in float32", "load")):
        load_model("torch", ModelSpec(tiny_model("llama"), None))


def test_memory_that_runs_out_while_a_model_is_tried_is_no_property_of_the_model(tiny_model, monkeypatch):
    monkeypatch.setattr(SplitModel, "hidden", run_out)
    with pytest.raises(ModelError, match=one_line("trying the model on a few tokens", "load")):
        load_model("torch", ModelSpec(tiny_model("llama"), LoraSpec(4, 8)), OptimizerSpec())


@pytest.fixture
def loaded(tiny_model) -> torch_backend.TorchModel:
    return load_model("torch", ModelSpec(tiny_model("llama"), LoraSpec(4, 8)), OptimizerSpec())


def test_memory_that_runs_out_in_a_step_is_one_line(loaded, monkeypatch):
    batch = collate(random_examples(3, seed=1))
    monkeypatch.setattr(SplitModel, "hidden", run_out)
    rows = f"in a training step of 3 rows of {batch.tokens.shape[1]} tokens"
    with pytest.raises(ModelError, match=one_line(rows, "train")):
        train_step(loaded, Sft(), [batch], lr=1e-3, step=0)
    with pytest.raises(ModelError, match=one_line(rows.replace("in a training step", "scoring"), "score")):
        loaded.logps(batch, batch.loss_mask[:, 1:])


def test_memory_that_runs_out_in_an_answer_is_one_line(loaded, monkeypatch):
    monkeypatch.setattr(type(loaded._model.base_model.model), "forward", run_out)
    with pytest.raises(ModelError, match=one_line("answering a prompt of 3 tokens", "answer")):
        list(loaded.generate([1, 2, 3], max_new_tokens=4, stop_ids=frozenset(), sampling=torch_backend.Sampling()))
    with pytest.raises(ModelError, match=one_line("computing the logits of 3 tokens", "answer")):
        loaded.logits([1, 2, 3])


def test_memory_that_runs_out_while_logits_are_verified_is_one_line(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    monkeypatch.setattr(verification, "whole_logits", run_out)
    with pytest.raises(ModelError, match=one_line(f"computing the logits of {folder.name} in float32", "load")):
        verification.logits(folder, [], [1, 2, 3])


def test_a_device_that_fails_while_a_model_is_tried_is_no_property_of_the_model(tiny_model, monkeypatch):
    def fail(*_args):
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nCompile with"
        )

    monkeypatch.setattr(SplitModel, "hidden", fail)
    expected = (
        "^CPU failed trying the model on a few tokens: CUDA error: no kernel image is available for execution on the "
        "device; macft doctor says what it lacks$"
    )
    with pytest.raises(ModelError, match=expected):
        load_model("torch", ModelSpec(tiny_model("llama"), LoraSpec(4, 8)), OptimizerSpec())


def test_a_pass_is_planned_by_the_longest_row_with_both_sides_of_a_pair(tiny_model, monkeypatch):
    """Also where rows pack several examples, and are longer than each; never by one row of twice the length."""
    loaded = load_model("torch", ModelSpec(tiny_model("qwen2"), LoraSpec(4, 8), precision="bfloat16"), OptimizerSpec())
    tried = []
    monkeypatch.setattr(
        memory, "kept_bytes", lambda _split, rows, length: tried.append((rows, length)) or 100 * rows * length + 5000
    )
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**9)
    spec = ModelSpec(tiny_model("qwen2"), LoraSpec(4, 8), max_length=91, row_length=200, rows_per_example=2)
    plan = memory.plan_device_passes(loaded._split, spec, 0)
    assert tried == [(2, 200), (2, 100)]
    # what a pass keeps whatever it holds is taken off first
    free = 10**9 - loaded._split.head_bytes - 5000
    assert plan.tokens_at_once == int(0.85 * free / 100) and not plan.checkpoints


def test_a_trial_that_runs_out_is_tried_with_shorter_rows(tiny_model, monkeypatch):
    loaded = load_model("torch", ModelSpec(tiny_model("qwen2"), LoraSpec(4, 8), precision="bfloat16"), OptimizerSpec())

    def kept(_split, rows, length):
        if length > 600:
            run_out()
        return 100 * rows * length

    monkeypatch.setattr(memory, "kept_bytes", kept)
    assert memory._kept_by_tokens(loaded._split, 1, 2048) == (100.0, 0.0)


def test_scoring_in_parts_gives_the_numbers_of_the_whole_batch(tiny_model):
    """Rows, pairs and rated answers, each part of whole rows or pairs."""
    model = load_model("torch", ModelSpec(tiny_model("llama"), LoraSpec(4, 8)), OptimizerSpec())
    pairs = collate(random_pairs(5, seed=3))
    for batch in (collate(random_examples(7, seed=2)), pairs, collate(random_feedback(6, 3))):
        positions = batch.loss_mask[:, 1:]
        sizes: list[int] = []

        def score(part, where, sizes=sizes):
            sizes.append(part.tokens.size)
            return model.logps(part, where)

        found = score_in_parts(batch, positions, 100, score)
        assert len(sizes) > 1 and all(size <= 100 for size in sizes)
        np.testing.assert_allclose(found, model.logps(batch, positions), atol=1e-5)


def test_rows_are_padded_to_few_lengths_and_change_no_number(tiny_model, monkeypatch):
    batch = collate(random_examples(3, seed=2))
    results, scores, lengths = [], [], []
    real = SplitModel.hidden

    def hidden(self, layout):
        lengths.append(layout["inputs"].shape[1])
        return real(self, layout)

    monkeypatch.setattr(SplitModel, "hidden", hidden)
    for round_up in (exact, multiples_of(64)):
        model = load_model("torch", ModelSpec(tiny_model("llama"), LoraSpec(4, 8)), OptimizerSpec())
        model._round_up = round_up
        lengths.clear()
        scores.append(model.logps(batch, batch.loss_mask[:, 1:]))
        results.append(train_step(model, Sft(), [batch], lr=1e-3, step=0))
        assert set(lengths) == {round_up(batch.tokens.shape[1] - 1)}
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)


def test_another_error_of_a_step_stays_what_it_is(loaded, monkeypatch):
    def fail(*_args):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(SplitModel, "hidden", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train_step(loaded, Sft(), [collate(random_examples(1, seed=1))], lr=1e-3, step=0)
