"""Preference training on two engines, one curve: losses, gradient norms and adapters of MLX and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.engines import load_model, train_step
from support.tiny_models import ARCHITECTURES, WINDOW, random_pairs

from macft.backends.base import LoraSpec, Model, ModelSpec, OptimizerSpec, State, StepResult
from macft.config.settings import Settings
from macft.data.batches import collate
from macft.data.tokenization.table import Reference, TokenizedExample, TokenizedPair
from macft.objectives.batch import NumpyBatch
from macft.objectives.ops import NumpyOps
from macft.objectives.preference import Preference, PromptBeta, answer_positions, reference_columns
from macft.training.objective import make_objective

pytestmark = [pytest.mark.mlx, pytest.mark.torch, pytest.mark.usefixtures("small_threads")]

STEPS = 50
LR = 1e-3
LORA = LoraSpec(rank=4, alpha=8)
# Clipping is active: norms are 0.2 to 5. Adam makes a step of a gradient that is mere rounding (at first 2 entries of
# 24,576: 1e-8, where the median is 2e-3); with epsilon 1e-6 such entries and a few others end 5e-4 apart (measured).
OPTIMIZER = OptimizerSpec(weight_decay=0.1, max_grad_norm=0.5, epsilon=1e-5)
TOLERANCE = 1e-4
# pairs of the micro-batches of a step, again and again
MIXED = ((4,), (2, 1), (3,), (1, 2, 1))
# some prompts of one token, and rows longer than the sliding window
PAIRS = [*random_pairs(4, seed=4, prompt=(1, 3)), *random_pairs(20, seed=3, prompt=(4, 24), answer=(2, 10))]

DPO = Preference()
FOODPO = replace(DPO, prompt_beta=PromptBeta(0.5))
WITH_GRADIENT = replace(DPO, prompt_beta=PromptBeta(0.5, "policy_with_gradient"))
OBJECTIVES = {"dpo": DPO, "foodpo": FOODPO, "foodpo with gradient": WITH_GRADIENT}


@dataclass(frozen=True)
class Curve:
    results: list[StepResult]
    adapter: State

    @property
    def losses(self) -> np.ndarray:
        return np.array([result.loss for result in self.results])

    @property
    def norms(self) -> np.ndarray:
        return np.array([result.grad_norm for result in self.results])


def load(engine: str, folder: Path, *, full: bool = False) -> Model:
    spec = ModelSpec(folder=folder, lora=None if full else LORA, full=full, seed=7, precision="float32")
    backend = load_model(engine, spec, OPTIMIZER)
    assert backend.info.precision == "float32"
    return backend


def with_references(backend: Model, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The policy at step 0 is the reference."""
    batch = collate(pairs)
    logps = backend.logps(batch, answer_positions(batch, with_prompt=True))
    columns = zip(*reference_columns(logps, batch, None), strict=True)
    return [replace(pair, reference=Reference(*map(float, row))) for pair, row in zip(pairs, columns, strict=True)]


def micro_batches(pairs: Sequence[TokenizedPair], steps: int, cuts: Sequence[Sequence[int]]) -> list[list[NumpyBatch]]:
    """Pairs in their order, again and again, cut into micro-batches of these sizes."""
    place, plan = 0, []
    for step in range(steps):
        batches = []
        for size in cuts[step % len(cuts)]:
            batches.append(collate([pairs[(place + i) % len(pairs)] for i in range(size)]))
            place += size
        plan.append(batches)
    return plan


def run(
    engine: str,
    folder: Path,
    objective: Preference,
    *,
    steps: int = STEPS,
    cuts: Sequence[Sequence[int]] = MIXED,
    pairs: Sequence[TokenizedPair] = PAIRS,
    full: bool = False,
    change: Callable[[list[TokenizedPair]], list[TokenizedPair]] = list,
) -> Curve:
    """Train at a falling rate; `change` is applied to the pairs once they have their reference."""
    backend = load(engine, folder, full=full)
    plan = micro_batches(change(with_references(backend, pairs)), steps, cuts)
    results = [
        train_step(backend, objective, batches, lr=LR * (1 - step / STEPS), step=step)
        for step, batches in enumerate(plan)
    ]
    return Curve(results, backend.trained_state())


def distance(a: Curve, b: Curve) -> tuple[float, float, float]:
    """Largest relative differences of losses, norms (of the steps both have) and adapters (by their largest entry)."""
    steps = min(len(a.results), len(b.results))
    assert a.adapter.keys() == b.adapter.keys()
    largest = max(float(np.abs(value).max()) for value in a.adapter.values())
    adapters = max(float(np.abs(a.adapter[name] - b.adapter[name]).max()) for name in a.adapter)
    return (
        float(np.max(np.abs(a.losses[:steps] / b.losses[:steps] - 1))),
        float(np.max(np.abs(a.norms[:steps] / b.norms[:steps] - 1))),
        adapters / largest,
    )


@pytest.fixture(scope="module")
def torch_curve(tiny_model):
    """The PyTorch curve of an architecture and an objective, trained once."""
    curves: dict[tuple[str, str], Curve] = {}

    def get(architecture: str, name: str) -> Curve:
        if (architecture, name) not in curves:
            curves[architecture, name] = run("torch", tiny_model(architecture), OBJECTIVES[name])
        return curves[architecture, name]

    return get


@pytest.mark.parametrize("loss", ["apo_zero", "apo_down"])
def test_both_engines_give_one_curve_of_other_losses(loss, tiny_model):
    """Of their own formulas; the architectures are those of DPO above."""
    theirs, ours = (
        run(engine, tiny_model("llama"), Preference(loss, beta=0.2), steps=20) for engine in ("torch", "mlx")
    )
    assert max(distance(theirs, ours)) < TOLERANCE
    assert ours.losses[0] == pytest.approx(1.0, abs=1e-5)
    assert ours.losses[-5:].mean() < 0.98, "nothing was learned: the test would be blind"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(architecture, name, marks=[pytest.mark.slow] * (architecture == "gemma3_text"))
        for architecture in ARCHITECTURES
        for name in OBJECTIVES
    ],
)
def test_both_engines_give_one_curve_over_50_steps(architecture, name, tiny_model, torch_curve):
    """Measured at most: losses 6e-6, norms 5e-6, adapters 6e-5."""
    theirs, ours = torch_curve(architecture, name), run("mlx", tiny_model(architecture), OBJECTIVES[name])
    assert max(distance(theirs, ours)) < TOLERANCE
    assert ours.losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert ours.losses[-10:].mean() < 0.6, "nothing was learned: the test would be blind"
    assert np.mean(ours.norms > OPTIMIZER.max_grad_norm) > 0.5


def test_the_pairs_have_what_the_comparison_needs():
    assert sum(len(pair.chosen.tokens) > WINDOW for pair in PAIRS) >= 12
    assert sum(pair.prompt_length == 1 for pair in PAIRS) >= 1


def without_reference(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    return [replace(pair, reference=replace(pair.reference, chosen_logp=0.0, rejected_logp=0.0)) for pair in pairs]


def shifted(pair: TokenizedPair) -> TokenizedPair:
    """The pair with answers that begin one token late."""
    chosen, rejected = (
        TokenizedExample(row.tokens, np.arange(len(row.tokens)) > pair.prompt_length)
        for row in (pair.chosen, pair.rejected)
    )
    return TokenizedPair(chosen, rejected, pair.prompt_length + 1)


MUTATIONS = {
    "another beta": ("dpo", {"objective": replace(DPO, beta=0.101)}),
    "no reference": ("dpo", {"objective": DPO, "change": without_reference}),
    "a mask late by one": ("dpo", {"objective": DPO, "pairs": [shifted(pair) for pair in PAIRS]}),
    "chosen and rejected exchanged": (
        "dpo",
        {"objective": DPO, "pairs": [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in PAIRS]},
    ),
    "another scale": ("foodpo", {"objective": replace(FOODPO, prompt_beta=PromptBeta(0.505))}),
    "one beta for all": ("foodpo", {"objective": DPO}),
    "the policy's perplexity": ("foodpo", {"objective": replace(FOODPO, prompt_beta=PromptBeta(0.5, "policy"))}),
    "a stopped gradient": (
        "foodpo with gradient",
        {"objective": replace(FOODPO, prompt_beta=PromptBeta(0.5, "policy"))},
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices(name, tiny_model, torch_curve):
    right, wrong = MUTATIONS[name]
    curve = run("mlx", tiny_model("llama"), steps=20, **wrong)
    assert max(distance(torch_curve("llama", right), curve)[:2]) > 10 * TOLERANCE


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_does_not_change_the_curve(engine, name, tiny_model):
    curves = [
        run(engine, tiny_model("llama"), OBJECTIVES[name], steps=8, cuts=[cut]) for cut in ((4,), (1, 1, 1, 1), (3, 1))
    ]
    for curve in curves[1:]:
        losses, norms, adapters = distance(curves[0], curve)
        assert max(losses, norms) < 1e-5
        assert adapters < 1e-4
        # of the first step, where policy and reference differ by rounding alone, accuracy and rewards say nothing
        for one, other in zip(curves[0].results[1:], curve.results[1:], strict=True):
            assert other.metrics == pytest.approx(one.metrics, rel=1e-4, abs=1e-5)


def settings(**keys) -> Settings:
    return Settings(model_name_or_path="model", dataset="data", output_dir="run", pref_beta=0.2, **keys)


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("source", ["reference", "policy", "policy_with_gradient"])
def test_foodpo_of_scale_0_is_dpo_bit_for_bit(engine, source, tiny_model):
    foodpo = make_objective(settings(stage="foodpo", pref_beta_scale=0.0, foodpo_perplexity=source))
    curves = [
        run(engine, tiny_model("llama"), objective, steps=4)
        for objective in (make_objective(settings(stage="dpo")), foodpo)
    ]
    assert curves[0].results == curves[1].results
    for name, value in curves[0].adapter.items():
        np.testing.assert_array_equal(value, curves[1].adapter[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_sources_of_the_perplexity_agree_before_the_first_update(architecture, tiny_model):
    results, norms = [], {}
    for engine in ("torch", "mlx"):
        for source in ("reference", "policy", "policy_with_gradient"):
            backend = load(engine, tiny_model(architecture))
            batch = collate(with_references(backend, PAIRS))
            # another reference than the policy, or nothing but ln 2 would be compared
            batch = replace(batch, reference_logps=batch.reference_logps + np.linspace(-3, 3, 48, dtype=np.float32))
            objective = replace(DPO, prompt_beta=PromptBeta(0.5, source))
            evaluated, metrics = objective(NumpyOps(), backend.logps(batch, objective.positions(batch)), batch)
            result = train_step(backend, objective, [batch], lr=LR, step=0)
            assert result.loss == pytest.approx(float(evaluated) / 24, rel=1e-5)
            assert result.metrics == pytest.approx({k: float(v) / 24 for k, v in metrics.items()}, rel=1e-5)
            results.append(result)
            norms.setdefault(source, []).append(result.grad_norm)
    assert results[0].metrics["dynamic_beta"] > 0.1
    for other in results[1:]:
        assert other.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert other.metrics == pytest.approx(results[0].metrics, rel=1e-5)
    assert norms["policy"] == pytest.approx(norms["reference"], rel=1e-5)
    assert norms["policy_with_gradient"] != pytest.approx(norms["policy"], rel=1e-4)


@pytest.mark.parametrize("name", ["dpo", "foodpo with gradient"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_engines_agree_on_full_fine_tuning(architecture, name, tiny_model):
    """The head, tied to the embeddings in one of these models, is trained too (measured at most: 5e-6)."""
    curves = [
        run(engine, tiny_model(architecture), OBJECTIVES[name], steps=10, full=True) for engine in ("torch", "mlx")
    ]
    assert max(distance(*curves)) < TOLERANCE
