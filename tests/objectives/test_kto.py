"""KTO: numbers by hand, closed-form gradients in double precision, three array libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from support.toy_backend import ENGINES

from macft.data.batches import collate
from macft.data.tokenization.table import FeedbackReference, TokenizedExample, TokenizedFeedback
from macft.errors import MacftError
from macft.objectives.batch import NumpyBatch
from macft.objectives.kto import Kto
from macft.objectives.ops import NumpyOps

# stands where no objective may look: prompts and padding
JUNK = -77.0


@dataclass(frozen=True)
class Hand:
    """One rated answer by its log-probabilities, and by those of the answer to another prompt."""

    answer: Sequence[float]
    is_desirable: bool
    mismatched: Sequence[float]
    reference: tuple[float, float] | None  # ref S of the two
    prompt: int = 2


# r = 1, -2 and 0.5; mismatched - reference = 1, 0.5 and 0, so z = 0.5
HANDS = (
    Hand([-1.0, -2.0], True, [-2.0], (-4.0, -3.0)),
    Hand([-5.0], False, [-1.0, -1.0, -2.5], (-3.0, -5.0), prompt=1),
    Hand([-0.5, -1.0, -1.0], True, [-3.0, -1.0], (-3.0, -4.0), prompt=4),
)


def build(hands: Sequence[Hand]) -> tuple[NumpyBatch, np.ndarray]:
    """(the batch, the log-probabilities of all its rows float64 [2N, T-1])."""

    def row(hand: Hand, answer: Sequence[float]) -> TokenizedExample:
        length = hand.prompt + len(answer)
        return TokenizedExample(np.arange(length, dtype=np.int32), np.arange(length) >= hand.prompt)

    batch = collate(
        [
            TokenizedFeedback(
                row(hand, hand.answer),
                row(hand, hand.mismatched),
                hand.is_desirable,
                hand.reference and FeedbackReference(*hand.reference),
            )
            for hand in hands
        ]
    )
    logps = np.full((len(batch.tokens), batch.tokens.shape[1] - 1), JUNK)
    for line, answer, hand in zip(
        logps, [*(h.answer for h in hands), *(h.mismatched for h in hands)], [*hands, *hands], strict=True
    ):
        line[hand.prompt - 1 : hand.prompt - 1 + len(answer)] = answer
    return batch, logps


def completed(objective: Kto, hands: Sequence[Hand]) -> tuple[np.ndarray, NumpyBatch]:
    """(the answers' log-probabilities, the batch with its KL term)."""
    batch, logps = build(hands)
    count = len(hands)

    def score(part: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        assert len(part.tokens) == count and positions.shape == part.loss_mask[:, 1:].shape
        return logps[count:, : positions.shape[1]]

    done = objective.complete(batch, score)
    return logps[:count, : done.tokens.shape[1] - 1], done


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def closed_form(o: Kto, hands: Sequence[Hand]) -> tuple[float, np.ndarray]:
    """The loss, and its derivative by the log-probability of each token of each answer."""
    z = max(0.0, float(np.mean([sum(h.mismatched) - h.reference[1] for h in hands])))
    loss, slopes = 0.0, []
    for hand in hands:
        r, n = sum(hand.answer) - hand.reference[0], len(hand.answer)
        x = o.beta * (r - z) if hand.is_desirable else o.beta * (z - r)
        weight, sign = (o.chosen_weight, 1) if hand.is_desirable else (o.rejected_weight, -1)
        sft = o.ftx / n if hand.is_desirable else 0.0
        loss += weight * s(-x) - sft * sum(hand.answer)
        slopes.append(-weight * sign * o.beta * s(x) * s(-x) - sft)
    gradient = np.zeros_like(completed(o, hands)[0])
    for line, slope, hand in zip(gradient, slopes, hands, strict=True):
        line[hand.prompt - 1 : hand.prompt - 1 + len(hand.answer)] = slope
    return loss, gradient


OBJECTIVES = {
    "kto": Kto(beta=0.5),
    "weights": Kto(beta=0.2, chosen_weight=1.5, rejected_weight=0.25),
    "with sft": Kto(beta=0.5, ftx=0.3),
}


def test_the_loss_is_the_one_computed_by_hand():
    logps, batch = completed(Kto(beta=0.5), HANDS)
    np.testing.assert_array_equal(batch.kl, [0.5, 0.5, 0.5])
    loss, _ = Kto(beta=0.5)(NumpyOps(), logps, batch)
    # 0.5 (1 - 0.5), 0.5 (0.5 + 2) and 0.5 (0.5 - 0.5)
    assert float(loss) == pytest.approx(s(-0.25) + s(-1.25) + 0.5, rel=1e-7)
    loss, _ = Kto(beta=0.5, chosen_weight=2.0, rejected_weight=3.0)(NumpyOps(), logps, batch)
    assert float(loss) == pytest.approx(2 * s(-0.25) + 3 * s(-1.25) + 1.0, rel=1e-7)
    # + 0.1 (1.5 + 2.5 / 3)
    loss, _ = Kto(beta=0.5, ftx=0.1)(NumpyOps(), logps, batch)
    assert float(loss) == pytest.approx(s(-0.25) + s(-1.25) + 0.5 + 0.15 + 0.25 / 3, rel=1e-7)


def test_a_kl_term_below_0_is_0():
    below = [Hand([-1.0], True, [-3.0], (-1.0, -1.0)), Hand([-1.0], False, [-1.0], (-1.0, -2.0))]
    assert completed(Kto(), below)[1].kl.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_policy_that_is_its_own_reference_starts_at_the_start_loss(share):
    objective = Kto(beta=0.3, chosen_weight=1.5, rejected_weight=0.5)
    hands = [Hand([-1.0, -2.0], i < 4 * share, [-0.5], (-3.0, -0.5)) for i in range(4)]
    logps, batch = completed(objective, hands)
    loss, _ = objective(NumpyOps(), logps, batch)
    assert float(loss) / 4 == pytest.approx(objective.start_loss(share), rel=1e-9)
    assert objective.start_loss(share) == pytest.approx(0.25 + 0.5 * share)


def on_mlx(objective: Kto, logps: np.ndarray, batch: NumpyBatch) -> tuple[float, dict[str, float], np.ndarray]:
    import mlx.core as mx

    from macft.backends.mlx.ops import MlxOps

    (loss, metrics), gradient = mx.value_and_grad(lambda x: objective(MlxOps(), x, batch.map(mx.array)))(
        mx.array(logps.astype(np.float32))
    )
    return loss.item(), {name: value.item() for name, value in metrics.items()}, np.array(gradient)


def on_torch(objective: Kto, logps: np.ndarray, batch: NumpyBatch) -> tuple[float, dict[str, float], np.ndarray]:
    import torch

    from macft.backends.torch.ops import TorchOps

    values = torch.tensor(logps, dtype=torch.float32, requires_grad=True)
    loss, metrics = objective(TorchOps(), values, batch.map(torch.from_numpy))
    loss.backward()
    return loss.item(), {name: value.item() for name, value in metrics.items()}, values.grad.numpy()


RUN: dict[str, Callable] = {"mlx": on_mlx, "torch": on_torch}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_libraries_agree_with_the_closed_form(name, engine):
    objective = OBJECTIVES[name]
    logps, batch = completed(objective, HANDS)
    expected, gradient = closed_form(objective, HANDS)
    value, metrics = objective(NumpyOps(), logps, batch)
    assert float(value) == pytest.approx(expected, rel=1e-7)
    loss, others, slope = RUN[engine](objective, logps, batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=0)
    assert others == pytest.approx({name: float(value) for name, value in metrics.items()}, rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_closed_form_is_the_derivative_of_the_numpy_loss(name):
    objective = OBJECTIVES[name]
    logps, batch = completed(objective, HANDS)
    numeric = np.zeros_like(logps)
    for place in np.ndindex(logps.shape):
        step = np.zeros_like(logps)
        step[place] = 1e-6
        values = [float(objective(NumpyOps(), logps + sign * step, batch)[0]) for sign in (1, -1)]
        numeric[place] = (values[0] - values[1]) / 2e-6
    np.testing.assert_allclose(numeric, closed_form(objective, HANDS)[1], rtol=1e-6, atol=1e-8)


def reported(objective: Kto, hands: Sequence[Hand]) -> dict[str, float]:
    logps, batch = completed(objective, hands)
    _, metrics = objective(NumpyOps(), logps, batch)
    return objective.report({name: float(value) / len(hands) for name, value in metrics.items()})


def test_metrics_are_means_over_the_answers_of_their_kind():
    assert reported(Kto(beta=0.5, ftx=0.1), HANDS) == pytest.approx(
        {
            "share/chosen": 2 / 3,
            "rewards/chosen": 0.375,
            "rewards/rejected": -1.0,
            "rewards/margins": 1.375,
            "logps/chosen": -2.75,
            "logps/rejected": -5.0,
            "kl": 0.5,
            "sft_loss": (1.5 + 2.5 / 3) / 2,
        }
    )


def test_a_step_of_one_kind_says_nothing_of_the_other():
    assert reported(Kto(), HANDS[1:2]).keys() == {"share/chosen", "rewards/rejected", "logps/rejected", "kl"}
    assert "rewards/margins" not in reported(Kto(), [HANDS[0], HANDS[2]])


def test_a_batch_without_a_reference_is_refused():
    with pytest.raises(MacftError, match="stage kto needs the reference's log-probabilities, and the batch has none"):
        completed(Kto(), [Hand([-1.0], True, [-1.0], None)])
