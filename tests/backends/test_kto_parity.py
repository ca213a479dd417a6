"""KTO on two engines, one curve; and on one engine, the same curve whatever the micro-batches are cut into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.engines import load_model, train_step
from support.tiny_models import ARCHITECTURES, random_feedback

from macft.backends.base import LoraSpec, Model, ModelSpec, OptimizerSpec, State, StepResult
from macft.data.batches import collate
from macft.data.tokenization.table import FeedbackReference, TokenizedFeedback
from macft.objectives.kto import Kto, answer_scores
from macft.objectives.ops import NumpyOps

pytestmark = [pytest.mark.mlx, pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

STEPS = 20
BATCH = 6
# as for pairs: a gradient that is mere rounding must not become a step
OPTIMIZER = OptimizerSpec(weight_decay=0.1, max_grad_norm=0.5, epsilon=1e-5)
TOLERANCE = 1e-4
KTO = Kto(beta=0.2, chosen_weight=1.2, ftx=0.05)
ROWS = random_feedback(24, BATCH, seed=3)

Curve = tuple[list[StepResult], State]


def with_references(model: Model, rows: Sequence[TokenizedFeedback]) -> list[TokenizedFeedback]:
    """The policy at step 0 is the reference."""
    batch = collate(rows)
    scores, _ = answer_scores(NumpyOps(), model.logps(batch, batch.loss_mask[:, 1:]), batch)
    both = zip(scores[: len(rows)], scores[len(rows) :], strict=True)
    return [replace(row, reference=FeedbackReference(*map(float, two))) for row, two in zip(rows, both, strict=True)]


def run(
    engine: str,
    folder: Path,
    *,
    objective: Kto = KTO,
    tokens_at_once: int | None = 1024,
    full: bool = False,
    change: Callable[[list[TokenizedFeedback]], list[TokenizedFeedback]] = list,
) -> Curve:
    lora = None if full else LoraSpec(rank=4, alpha=8)
    model = load_model(engine, ModelSpec(folder=folder, lora=lora, full=full, seed=7, precision="float32"), OPTIMIZER)
    model._tokens_at_once = tokens_at_once
    rows = change(with_references(model, ROWS))
    results = []
    for step in range(STEPS):
        start = step * BATCH % len(rows)
        batch = objective.complete(collate(rows[start : start + BATCH]), model.logps)
        results.append(train_step(model, objective, [batch], lr=1e-3, step=step))
    return results, model.trained_state()


def distance(a: Curve, b: Curve) -> float:
    """Largest relative difference of losses, norms and adapters (these by their largest entry)."""
    largest = max(float(np.abs(value).max()) for value in a[1].values())
    return max(
        *(abs(one.loss / other.loss - 1) for one, other in zip(a[0], b[0], strict=True)),
        *(abs(one.grad_norm / other.grad_norm - 1) for one, other in zip(a[0], b[0], strict=True)),
        max(float(np.abs(a[1][name] - b[1][name]).max()) for name in a[1]) / largest,
    )


@pytest.fixture(scope="module")
def llama_curve(tiny_model) -> Curve:
    return run("torch", tiny_model("llama"))


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gemma3_text")) for name in ARCHITECTURES],
)
def test_both_engines_give_one_curve(architecture, tiny_model, llama_curve):
    theirs = llama_curve if architecture == "llama" else run("torch", tiny_model(architecture))
    ours = run("mlx", tiny_model(architecture))
    assert distance(theirs, ours) < TOLERANCE
    metrics = [KTO.report(result.metrics) for result in ours[0]]
    assert max(one["kl"] for one in metrics) > 0.05, "the KL term takes no part: the test would be blind"
    assert metrics[-1]["rewards/margins"] > 0.2, "nothing was learned: the test would be blind"


def test_engines_agree_on_full_fine_tuning(tiny_model):
    curves = [run(engine, tiny_model("qwen2"), full=True) for engine in ("torch", "mlx")]
    assert distance(*curves) < TOLERANCE


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_a_step_in_passes_has_the_kl_term_of_the_whole(engine, tiny_model):
    whole, parts = (run(engine, tiny_model("llama"), tokens_at_once=limit) for limit in (None, 60))
    assert distance(whole, parts) < TOLERANCE


def exchanged(rows: list[TokenizedFeedback]) -> list[TokenizedFeedback]:
    return [replace(row, is_desirable=not row.is_desirable) for row in rows]


def without_kl(rows: list[TokenizedFeedback]) -> list[TokenizedFeedback]:
    return [replace(row, mismatched=row.row, reference=replace(row.reference, mismatched_logp=0.0)) for row in rows]


@pytest.mark.parametrize(
    "wrong",
    [{"objective": replace(KTO, beta=0.202)}, {"change": exchanged}, {"change": without_kl}],
    ids=["another beta", "ratings exchanged", "no KL term"],
)
def test_the_comparison_notices(wrong, tiny_model, llama_curve):
    assert distance(llama_curve, run("mlx", tiny_model("llama"), **wrong)) > 10 * TOLERANCE
