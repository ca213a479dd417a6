"""A step computed in parts, with blocks that keep only large products: the same numbers in less memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.engines import load_model, train_step
from support.tiny_models import random_examples, random_feedback, random_pairs, write_model
from support.toy_backend import ENGINES

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec
from macft.backends.batch_layout import split_by_tokens
from macft.backends.torch import backend as torch_backend
from macft.data.batches import collate
from macft.data.tokenization.table import FeedbackReference, Reference
from macft.objectives.batch import NumpyBatch
from macft.objectives.kto import Kto
from macft.objectives.losses import Sft
from macft.objectives.preference import Preference, PromptBeta

pytestmark = pytest.mark.usefixtures("small_threads")

# With beta1 = 0 the first moment is the gradient.
GRADIENT = OptimizerSpec(beta1=0.0, max_grad_norm=0.0)
# of the largest number: float32 sums in another order
TOLERANCE = 1e-5
BLOCKS = ("llama", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "gemma2", "phi3")
SIZES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
}


def rows() -> NumpyBatch:
    return collate(random_examples(7, seed=1))


def pairs() -> NumpyBatch:
    found = random_pairs(7, seed=1)
    return collate([replace(pair, reference=Reference(-20.0 - i, -18.0 + i, 3.0)) for i, pair in enumerate(found)])


def rated() -> NumpyBatch:
    found = random_feedback(7, 4)
    batch = collate([replace(row, reference=FeedbackReference(-60.0 - i, -50.0)) for i, row in enumerate(found)])
    return Kto().complete(batch, lambda _, positions: -2.0 * positions)


BATCHES = {
    "rows": (rows, Sft()),
    "pairs": (pairs, Preference(ftx=0.3, ld_alpha=0.5)),
    "rated answers": (rated, Kto(ftx=0.3)),
    "pairs with their own beta": (pairs, Preference(prompt_beta=PromptBeta(0.5))),
    "pairs whose prompts are trained": (pairs, Preference(prompt_beta=PromptBeta(0.5, "policy_with_gradient"))),
}


def real_tokens(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """The rows without their padding."""
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("limit", [1, 90, 10_000])
def test_passes_hold_every_row_once_in_order_and_no_more_tokens_than_allowed(name, limit):
    make, objective = BATCHES[name]
    batch = make()
    parts = split_by_tokens(batch, limit)
    assert len(parts) in {1: (7,), 90: range(2, 7), 10_000: (1,)}[limit] or (name != "rows" and limit == 90)
    sides = 1 if batch.prompt_mask is None else 2
    found = [[], []]
    for part in parts:
        count = len(part.tokens) // sides
        assert part.tokens.size <= limit or count == 1
        assert part.tokens.shape[1] == part.lengths.max(), "a part is no wider than its longest row"
        for side in range(sides):
            rows = slice(side * count, (side + 1) * count)
            found[side] += [
                tokens[:n].tolist() for tokens, n in zip(part.tokens[rows], part.lengths[rows], strict=True)
            ]
    assert found[0] + found[1] == real_tokens(batch.tokens, batch.lengths)
    assert sum(objective.weight(part) for part in parts) == objective.weight(batch)
    for column in ("reference_logps", "reference_log_perplexity"):
        whole = getattr(batch, column)
        if whole is not None:
            each = [getattr(part, column).reshape(-1, len(part.tokens) // sides) for part in parts]
            assert np.array_equal(np.concatenate(each, axis=1).reshape(-1), whole)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BATCHES)
def test_a_step_in_passes_has_the_loss_metrics_and_gradient_of_the_whole(name, engine, tiny_model):
    make, objective = BATCHES[name]
    found = []
    for limit in (None, 1, 90):
        backend = load_model(
            engine, ModelSpec(folder=tiny_model("llama"), lora=LoraSpec(4, 8), precision="float32"), GRADIENT
        )
        backend._tokens_at_once = limit
        result = train_step(backend, objective, [make()], lr=0.0, step=0)
        found.append((result, backend.optimizer_state()))
    whole, gradient = found[0]
    for result, moments in found[1:]:
        assert result.loss == pytest.approx(whole.loss, rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(whole.grad_norm, rel=TOLERANCE)
        assert result.metrics == pytest.approx(whole.metrics, rel=TOLERANCE, abs=TOLERANCE)
        for key, value in gradient.items():
            assert np.abs(moments[key] - value).max() <= TOLERANCE * max(np.abs(value).max(), 1e-3), key


def gradients(folder, monkeypatch, *, recompute: bool, full: bool = False) -> tuple[float, dict[str, np.ndarray]]:
    with monkeypatch.context() as patch:
        if not recompute:
            patch.setattr(torch_backend, "recompute_elementwise", lambda _model: None)
        lora = None if full else LoraSpec(4, 8, dropout=0.2)
        backend = load_model("torch", ModelSpec(folder=folder, lora=lora, full=full, precision="float32"), GRADIENT)
        result = train_step(backend, Preference(), [pairs()], lr=0.0, step=3)
    return result.loss, backend.optimizer_state()


@pytest.mark.torch
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", BLOCKS)
def test_blocks_that_compute_again_give_the_same_gradient_to_the_bit(architecture, full, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", architecture, **SIZES.get(architecture, {}))
    loss, again = gradients(folder, monkeypatch, recompute=True, full=full)
    plain_loss, plain = gradients(folder, monkeypatch, recompute=False, full=full)
    assert loss == plain_loss
    assert again.keys() == plain.keys() and all(np.array_equal(again[key], plain[key]) for key in plain)


def kept_bytes(folder, monkeypatch, *, recompute: bool) -> int:
    """What a forward pass has allocated and not freed when it ends."""
    with monkeypatch.context() as patch:
        if not recompute:
            patch.setattr(torch_backend, "recompute_elementwise", lambda _model: None)
        backend = load_model("torch", ModelSpec(folder=folder, lora=LoraSpec(4, 8), precision="float32"), GRADIENT)
    batch = pairs()
    positions = Preference().positions(batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        logps = backend._logps(batch, positions)
    assert logps.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.torch
def test_blocks_that_compute_again_keep_little_more_than_half_as_much(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    assert kept_bytes(folder, monkeypatch, recompute=True) < 0.6 * kept_bytes(folder, monkeypatch, recompute=False)
