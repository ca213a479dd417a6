"""Preference objectives: numbers by hand, closed-form gradients in double precision, three array libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from support.hand_pairs import HAND, HANDS, RUN, SOURCES, Hand, build, loss_of, metrics_of, on_numpy
from support.toy_backend import ENGINES

from macft.errors import MacftError
from macft.objectives.ops import NumpyOps
from macft.objectives.preference import LOSSES, Preference, PromptBeta, reference_columns

# Numbers by hand


BY_HAND = {
    # beta delta = 1: log(1 + 1/e)
    "sigmoid": (Preference(beta=0.5), 0.3132616875),
    # 0.9 log(1 + 1/e) + 0.1 log(1 + e) = log(1 + 1/e) + 0.1
    "smoothed": (Preference(beta=0.5, label_smoothing=0.1), 0.4132616875),
    # (0.9 log(1 + 1/e) - 0.1 log(1 + e)) / 0.8 = log(1 + 1/e) - 0.1 / 0.8
    "robust": (Preference("robust", beta=0.5, label_smoothing=0.1), 0.1882616875),
    "hinge inside": (Preference("hinge", beta=0.25), 0.5),
    "hinge outside": (Preference("hinge", beta=1.0), 0.0),
    # (1/2 - (-1/4) - 1)^2
    "ipo": (Preference("ipo", beta=0.5), 0.0625),
    # rewards 1/2 and -1/2: 2 s(-1/2)
    "apo_zero": (Preference("apo_zero", beta=0.5), 0.7550813376),
    # s(1/2) + s(-1)
    "apo_down": (Preference("apo_down", beta=0.5), 0.8914007526),
    # S_r = -3 + 0.5 * -5, rewards 1/2 and 3/4: s(-1/2) + s(3/4)
    "apo_zero with ld": (Preference("apo_zero", beta=0.5, ld_alpha=0.5), 1.0567193680),
    # 2 * 0.5 - 0.5 = 0.5: log(1 + e^-0.5)
    "simpo": (Preference("simpo", beta=2.0, simpo_gamma=0.5), 0.4740769842),
    # + 0.25 * 1.5
    "sigmoid with sft": (Preference(beta=0.5, ftx=0.25), 0.3132616875 + 0.375),
    "hinge with sft": (Preference("hinge", beta=1.0, ftx=0.25), 0.375),
    # two tokens are common: S_r = -3 + 0.5 * -5, delta = 1 - 1.5, beta delta = -1/4: log(1 + e^0.25)
    "ld": (Preference(beta=0.5, ld_alpha=0.5), 0.8259394198),
    # S_r = -3, delta = 1 - 4, beta delta = -3/2: log(1 + e^1.5)
    "ld without the rest": (Preference(beta=0.5, ld_alpha=0.0), 1.7014132780),
    "ld with all of the rest": (Preference(beta=0.5, ld_alpha=1.0), 0.3132616875),
    # beta = 0.5 * 0.5 * 2: as sigmoid
    "foodpo": (Preference(beta=0.5, prompt_beta=PromptBeta(0.5, "policy")), 0.3132616875),
    # beta = 0.5 * 0.5 * 1, beta delta = 1/2
    "foodpo of the reference": (Preference(beta=0.5, prompt_beta=PromptBeta(0.5)), 0.4740769842),
    # beta = 2 * 0.5 * 2, beta (A_c - A_r) - gamma = 1 - 0.5
    "foodpo with simpo": (Preference("simpo", beta=2.0, prompt_beta=PromptBeta(0.5, "policy")), 0.4740769842),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loss_is_the_one_computed_by_hand(name):
    objective, expected = BY_HAND[name]
    assert loss_of(objective, HAND) == pytest.approx(expected, rel=1e-9)


def test_orpo_is_the_one_computed_by_hand():
    # p = 1/2 has odds 1, p = 1/4 odds 1/3; log s(log 3) = log(3/4)
    hand = Hand([-1.0], [-math.log(2)] * 3, [-math.log(8), -math.log(2)], reference=None)
    assert loss_of(Preference("orpo", beta=0.1), hand) == pytest.approx(math.log(2) + 0.1 * math.log(4 / 3), rel=1e-12)


def test_orpo_and_simpo_follow_the_published_formulae():
    """arXiv 2403.07691 (6)-(8) and 2405.14734 (6), with probabilities and odds spelled out."""
    hand = Hand([-2.0], [-0.3, -1.1, -0.2], [-0.9, -2.5], reference=None)
    likelihood = {y: math.exp(np.mean(getattr(hand, y))) for y in ("chosen", "rejected")}
    odds = {y: p / (1 - p) for y, p in likelihood.items()}
    ratio = math.log(odds["chosen"] / odds["rejected"])
    orpo = -math.log(likelihood["chosen"]) + 0.2 * -math.log(1 / (1 + math.exp(-ratio)))
    assert loss_of(Preference("orpo", beta=0.2), hand) == pytest.approx(orpo, rel=1e-12)
    reward = {y: 2.5 / len(getattr(hand, y)) * sum(getattr(hand, y)) for y in likelihood}
    simpo = -math.log(1 / (1 + math.exp(-(reward["chosen"] - reward["rejected"] - 1.4))))
    assert loss_of(Preference("simpo", beta=2.5, simpo_gamma=1.4), hand) == pytest.approx(simpo, rel=1e-12)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"orpo", "simpo"}))
def test_a_policy_that_is_its_own_reference_starts_at_the_start_loss(loss):
    objective = Preference(loss, beta=0.2, label_smoothing=0.1 if loss in ("sigmoid", "robust") else 0.0)
    start = loss_of(objective, replace(HAND, reference=(-3.0, -8.0, 2.0)))
    ones = dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0)
    expected = ({"sigmoid": 0.6931471806, "robust": 0.6931471806, "ipo": 6.25} | ones)[loss]
    assert start == pytest.approx(expected, rel=1e-9)
    assert objective.start_loss == pytest.approx(expected, rel=1e-9)


# Three array libraries against a closed form

OBJECTIVES = {
    **{name: objective for name, (objective, _) in BY_HAND.items() if objective.prompt_beta is None},
    "orpo": Preference("orpo", beta=0.2),
    "orpo with sft": Preference("orpo", beta=0.2, ftx=0.5),
    **{
        f"{loss}, {source}": Preference(loss, beta=0.3, ftx=0.1, prompt_beta=prompt_beta)
        for loss in ("sigmoid", "orpo", "simpo")
        for source, prompt_beta in SOURCES.items()
    },
    "smoothed, policy_with_gradient": Preference(label_smoothing=0.2, prompt_beta=SOURCES["policy_with_gradient"]),
}


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def beta_and_slope(o: Preference, hand: Hand) -> tuple[float, float]:
    """beta of a pair, and its derivative by the log-probability of each prompt token."""
    if o.prompt_beta is None or not hand.prompt:
        return o.beta, 0.0
    source, n = o.prompt_beta.source, len(hand.prompt)
    beta = o.beta * o.prompt_beta.scale * (hand.reference[2] if source == "reference" else -sum(hand.prompt) / n)
    slope = -o.beta * o.prompt_beta.scale / n if source == "policy_with_gradient" else 0.0
    low, high = o.prompt_beta.low, o.prompt_beta.high
    clamped = min(max(beta, -math.inf if low is None else low), math.inf if high is None else high)
    return clamped, slope if clamped == beta else 0.0


def closed_form(o: Preference, hand: Hand) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Loss of one pair, and its derivatives by the log-probabilities of prompt, chosen and rejected tokens."""
    n = {y: len(getattr(hand, y)) for y in ("chosen", "rejected")}
    rest = 1.0 if o.ld_alpha is None else o.ld_alpha
    weights = {y: np.where(np.arange(n[y]) < min(n.values()), 1.0, rest) for y in n}
    average = {y: float(np.mean(getattr(hand, y))) for y in n}
    ratio = {y: weights[y] @ getattr(hand, y) - ref for y, ref in zip(n, hand.reference, strict=False)}
    delta = ratio["chosen"] - ratio["rejected"]
    beta, slope = beta_and_slope(o, hand)
    m, e = beta * delta, o.label_smoothing
    by_m = by_beta = 0.0  # derivatives by beta delta; by beta, where it is not inside beta delta
    by_average = {"chosen": -o.ftx, "rejected": 0.0}
    by_reward = {"chosen": 0.0, "rejected": 0.0}  # where it is not inside beta delta
    if o.loss == "sigmoid":
        loss, by_m = -(1 - e) * log_s(m) - e * log_s(-m), e * s(m) - (1 - e) * s(-m)
    elif o.loss == "robust":
        loss = (e * log_s(-m) - (1 - e) * log_s(m)) / (1 - 2 * e)
        by_m = -((1 - e) * s(-m) + e * s(m)) / (1 - 2 * e)
    elif o.loss == "hinge":
        loss, by_m = max(0.0, 1 - m), -1.0 if m < 1 else 0.0
    elif o.loss in ("apo_zero", "apo_down"):
        rc, rr = beta * ratio["chosen"], beta * ratio["rejected"]
        if o.loss == "apo_zero":
            loss, by_reward = s(-rc) + s(rr), {"chosen": -s(rc) * s(-rc), "rejected": s(rr) * s(-rr)}
        else:
            loss, by_m, by_reward["chosen"] = s(rc) + s(-m), -s(m) * s(-m), s(rc) * s(-rc)
    elif o.loss == "ipo":
        reference = hand.reference[0] / n["chosen"] - hand.reference[1] / n["rejected"]
        off = average["chosen"] - average["rejected"] - reference - 1 / (2 * beta)
        loss, by_average = off**2, {"chosen": 2 * off - o.ftx, "rejected": -2 * off}
    elif o.loss == "orpo":
        p = {y: math.exp(a) for y, a in average.items()}
        z = math.log(p["chosen"] / (1 - p["chosen"])) - math.log(p["rejected"] / (1 - p["rejected"]))
        loss, by_beta = -average["chosen"] - beta * log_s(z), -log_s(z)
        by_average["chosen"] += -1 - beta * s(-z) / (1 - p["chosen"])
        by_average["rejected"] += beta * s(-z) / (1 - p["rejected"])
    else:
        gap = average["chosen"] - average["rejected"]
        z = beta * gap - o.simpo_gamma
        loss, by_beta = -log_s(z), -s(-z) * gap
        by_average["chosen"] -= s(-z) * beta
        by_average["rejected"] += s(-z) * beta
    return (
        loss - o.ftx * average["chosen"],
        np.full(len(hand.prompt), (by_beta + by_m * delta) * slope),
        (by_m + by_reward["chosen"]) * beta * weights["chosen"] + by_average["chosen"] / n["chosen"],
        (by_reward["rejected"] - by_m) * beta * weights["rejected"] + by_average["rejected"] / n["rejected"],
    )


def closed_gradient(objective: Preference, hands: Sequence[Hand], extra: int = 0) -> np.ndarray:
    """d loss / d logps [rows, T-1]."""
    gradient = np.zeros_like(build(hands, extra)[0])
    for i, hand in enumerate(hands):
        _, prompt, chosen, rejected = closed_form(objective, hand)
        start = len(prompt)
        gradient[i, :start] = prompt
        gradient[i, start : start + len(chosen)] = chosen
        gradient[len(hands) + i, start : start + len(rejected)] = rejected
    return gradient


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_closed_form_is_the_derivative_of_the_numpy_loss(name):
    objective = OBJECTIVES[name]
    stopped = objective.prompt_beta is not None and objective.prompt_beta.source == "policy"
    logps, batch = build(HANDS)
    if stopped:  # NumPy has no gradient to stop: hold the perplexity still instead
        *_, perplexity = reference_columns(logps, batch, None)
        batch = replace(batch, reference_log_perplexity=perplexity)
        objective = replace(objective, prompt_beta=replace(objective.prompt_beta, source="reference"))
    numeric = np.zeros_like(logps)
    for place in np.ndindex(logps.shape):
        step = np.zeros_like(logps)
        step[place] = 1e-6
        numeric[place] = (
            float(objective(NumpyOps(), logps + step, batch)[0]) - float(objective(NumpyOps(), logps - step, batch)[0])
        ) / 2e-6
    np.testing.assert_allclose(numeric, closed_gradient(OBJECTIVES[name], HANDS), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_libraries_agree_with_the_closed_form(name, engine):
    objective = OBJECTIVES[name]
    expected = sum(closed_form(objective, hand)[0] for hand in HANDS)
    numpy_result, result = on_numpy(objective, HANDS), RUN[engine](objective, HANDS)
    # the reference's columns are float32
    assert numpy_result.loss == pytest.approx(expected, rel=1e-7)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(result.gradient, closed_gradient(objective, HANDS), rtol=1e-5, atol=0)
    assert result.metrics.keys() == numpy_result.metrics.keys()
    for metric, value in numpy_result.metrics.items():
        assert result.metrics[metric] == pytest.approx(value, rel=1e-5), metric


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("margin", [-20.0, 4.0, 8.0, 12.0, 16.0, 20.0])
def test_the_slope_of_a_learned_pair_is_exact(margin, engine):
    """1 - s(margin) would be exact to 4e-5 at 8, to 6 % at 16, and 0 at 20."""
    hand = replace(HAND, reference=(-3.0, -8.0 + margin, 1.0))
    result = RUN[engine](Preference(beta=1.0), [hand])
    assert result.loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    np.testing.assert_allclose(result.gradient[0, 2:4], -s(-margin), rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_orpo_of_a_certain_answer_is_finite(engine):
    certain = Hand([-1.0], [0.0, 0.0], [-1.0], reference=None)
    result = RUN[engine](Preference("orpo"), [certain])
    # the odds are cut off at A = -1e-6: only -A_c has a slope there
    log_odds = -1e-6 - math.log(-math.expm1(-1e-6)) - math.log(math.exp(-1) / (1 - math.exp(-1)))
    assert result.loss == pytest.approx(-0.1 * log_s(log_odds), rel=1e-4)
    np.testing.assert_array_equal(result.gradient[0, 1:3], [-0.5, -0.5])


@pytest.mark.parametrize("engine", ENGINES)
def test_very_good_and_very_bad_margins_stay_finite(engine):
    far = [replace(HAND, reference=(1000.0, -1000.0, 1.0)), replace(HAND, reference=(-1000.0, 1000.0, 1.0))]
    result = RUN[engine](Preference(beta=1.0), far)
    # delta = 5 - 2000 and 5 + 2000
    assert result.loss == pytest.approx(1995.0, rel=1e-6)
    np.testing.assert_array_equal(result.gradient[:2, 2:4], [[-1, -1], [0, 0]])


# Metrics by hand


def test_rewards_accuracies_and_margins_are_those_computed_by_hand():
    # rewards 0.5 and -0.5; then -1 and 0.5
    worse = Hand([-1.0], [-6.0], [-1.0], reference=(-4.0, -2.0, 1.0))
    metrics = metrics_of(Preference(beta=0.5), HAND, worse)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.5 - 1.0,
            "rewards/rejected": -0.5 + 0.5,
            "rewards/accuracies": 1.0,
            "rewards/margins": 1.0 - 1.5,
            "logps/chosen": -3.0 - 6.0,
            "logps/rejected": -8.0 - 1.0,
        }
    )


def test_a_tie_is_not_accurate():
    assert metrics_of(Preference(), replace(HAND, reference=(-3.0, -8.0, 1.0)))["rewards/accuracies"] == 0.0


def test_losses_without_a_reference_reward_the_average():
    metrics = metrics_of(Preference("simpo", beta=2.0), HAND)
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"], metrics["rewards/margins"]) == (-3.0, -4.0, 1.0)
    assert metrics["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_averages_log_averages_beside_sums(loss):
    metrics = metrics_of(Preference(loss), HAND)
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (-3.0, -8.0)
    averages = [metrics.get("logps/chosen_avg"), metrics.get("logps/rejected_avg")]
    assert averages == ([-1.5, -2.0] if loss in ("ipo", "orpo", "simpo") else [None, None])


def test_orpo_and_sft_log_their_parts():
    hand = Hand([-1.0], [-math.log(2)] * 3, [-math.log(8), -math.log(2)], reference=None)
    metrics = metrics_of(Preference("orpo"), hand)
    assert metrics["sft_loss"] == pytest.approx(math.log(2))
    assert metrics["odds_ratio_loss"] == pytest.approx(math.log(4 / 3))
    assert metrics_of(Preference(ftx=0.25), HAND)["sft_loss"] == 1.5
    assert not {"sft_loss", "odds_ratio_loss", "dynamic_beta"} & metrics_of(Preference(), HAND).keys()


def test_the_batch_says_what_it_weighs_and_where_it_wants_log_probabilities():
    _, batch = build([HAND, Hand([], [-1.0], [-1.0])])
    answers = np.zeros((4, 6), dtype=bool)
    answers[0, 2:4] = answers[1, :1] = answers[2, 2:6] = answers[3, :1] = True
    prompts = answers.copy()
    prompts[0, :2] = True
    assert Preference().weight(batch) == 2.0
    for source, positions in (("dpo", answers), ("reference", answers), ("policy", prompts)):
        np.testing.assert_array_equal(Preference(prompt_beta=SOURCES[source]).positions(batch), positions)


def test_reference_columns_are_those_computed_by_hand():
    logps, batch = build([HAND, Hand([], [-1.0], [-0.5])])
    columns = reference_columns(logps.astype(np.float32), batch, None)
    np.testing.assert_array_equal(columns, [[-3, -1], [-8, -0.5], [2, 0]])
    np.testing.assert_array_equal(reference_columns(logps, batch, 0.5)[:2], [[-3, -1], [-5.5, -0.5]])


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"])
def test_a_loss_with_a_reference_refuses_a_batch_without(loss):
    with pytest.raises(MacftError, match=f"{loss} needs the reference's log-probabilities, and the batch has none"):
        loss_of(Preference(loss), replace(HAND, reference=None))
    with pytest.raises(MacftError, match="reference's perplexit"):
        loss_of(Preference("orpo", prompt_beta=PromptBeta(0.5)), replace(HAND, reference=None))
