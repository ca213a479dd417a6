"""The first step of a run that is its own reference: what is rounding, and what is a wrong signal."""

from __future__ import annotations

import math

import numpy as np
import pytest

from macft.backends.base import StepResult
from macft.errors import MacftError
from macft.objectives.batch import Batch
from macft.objectives.preference import Preference
from macft.training.checks.first_step import check_start


def pairs(count: int, answer: int) -> Batch:
    """Rows of a prompt of 4 tokens and an answer."""
    loss_mask = np.zeros((2 * count, 4 + answer), dtype=bool)
    loss_mask[:, 4:] = True
    return Batch(
        np.zeros(loss_mask.shape, dtype=np.int32),
        loss_mask,
        np.full(2 * count, 4 + answer, dtype=np.int32),
        prompt_mask=np.zeros_like(loss_mask),
    )


def step_off_by(nats: float, beta: float = 0.1) -> StepResult:
    """A step whose chosen answers score so much more than the reference says, and the rejected ones less."""
    loss = math.log1p(math.exp(-2 * beta * nats))
    return StepResult(loss, 1.0, {"rewards/chosen": beta * nats, "rewards/rejected": -beta * nats})


def check(nats: float, precision: str, count: int = 1, answer: int = 300, beta: float = 0.1) -> str | None:
    return check_start(Preference(beta=beta), step_off_by(nats, beta), [pairs(count, answer)], precision)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(("count", "answer", "measured"), [(1, 119, 1.8), (1, 555, 2.9), (8, 555, 1.0)])
def test_differences_between_kernels_in_bfloat16_are_let_pass(count, answer, measured, beta):
    """The largest differences measured on SmolLM2: 1.8 nats over 119 tokens, 2.9 over 555."""
    assert check(measured, "bfloat16", count, answer, beta) is None
    with pytest.raises(MacftError, match=r"^step 1: the sigmoid loss"):
        check(measured, "float32", count, answer, beta)


def test_what_rounding_hardly_explains_is_told_and_does_not_stop_the_run():
    alarm = check(8.0, "bfloat16")
    assert alarm is not None
    assert alarm.startswith(
        "step 1: the sigmoid loss is 0.183901 with rewards +0.8000 and -0.8000, and must be 0.693147"
    )
    assert alarm.endswith("more than rounding to bfloat16 explains; bf16=false computes in float32")


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nats", [300.0, -300.0, math.nan])
def test_another_model_as_reference_stops_the_run_in_every_precision(nats, precision):
    """One nat a token is little between two models."""
    with pytest.raises(MacftError, match="training would follow a wrong signal"):
        check(nats, precision)
