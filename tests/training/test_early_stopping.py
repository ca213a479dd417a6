"""The best evaluation of a run: which one it is, when to stop waiting for a better one, what a checkpoint keeps."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from macft.config.settings import Settings
from macft.errors import ConfigError
from macft.training.early_stopping import BestEvaluation, MetricGoal, check_metric, judge, metric_goal

MARGIN = "eval_rewards/margins"


def goal_of(metric: str | None, greater_is_better: bool | None, patience: int | None) -> MetricGoal:
    keys = {"metric_for_best_model": metric, "greater_is_better": greater_is_better, "early_stopping_steps": patience}
    return metric_goal(Settings(model_name_or_path="m", dataset="d", output_dir="o", **keys))


def follow(
    goal: MetricGoal, values: list[float], best: BestEvaluation | None = None
) -> list[tuple[bool, bool, BestEvaluation]]:
    """(is_best, is_enough, best so far) after each evaluation, one every ten steps."""
    best, seen = best or BestEvaluation(), []
    for number, value in enumerate(values, start=1):
        best = judge(goal, best, 10 * number, {goal.metric: value, "eval_other": 9.0})
        seen.append((best.evaluations_since == 0, goal.is_out_of_patience(best), best))
    return seen


def test_by_default_the_smallest_eval_loss_is_the_best():
    assert goal_of(None, None, None) == MetricGoal("eval_loss", greater_is_better=False, patience=None)
    seen = follow(goal_of(None, None, None), [0.7, 0.5, 0.6, 0.4])
    assert [is_best for is_best, _, _ in seen] == [True, True, False, True]
    assert [best.step for _, _, best in seen] == [10, 20, 20, 40]
    # all figures of the best evaluation go along
    assert seen[2][2] == BestEvaluation(20, 0.5, 1, {"eval_loss": 0.5, "eval_other": 9.0})
    assert seen[3][2] == BestEvaluation(40, 0.4, 0, {"eval_loss": 0.4, "eval_other": 9.0})


@pytest.mark.parametrize(
    ("given", "metric", "greater"),
    [
        ("rewards/margins", MARGIN, True),
        (MARGIN, MARGIN, True),
        ("loss", "eval_loss", False),
        ("eval_sft_loss", "eval_sft_loss", False),
    ],
)
def test_a_name_with_or_without_eval_means_the_same_and_losses_are_to_be_small(given, metric, greater):
    assert goal_of(given, None, 3) == MetricGoal(metric, greater, 3)
    assert goal_of(given, not greater, 3) == MetricGoal(metric, not greater, 3)


def test_greater_is_better_for_a_margin():
    seen = follow(goal_of("rewards/margins", None, None), [-0.1, 0.2, 0.1])
    assert [is_best for is_best, _, _ in seen] == [True, True, False]
    assert seen[-1][2] == BestEvaluation(20, 0.2, 1, {MARGIN: 0.2, "eval_other": 9.0})


def test_patience_counts_evaluations_in_a_row_and_a_better_one_restarts_it():
    seen = follow(MetricGoal("eval_loss", greater_is_better=False, patience=2), [0.7, 0.8, 0.6, 0.6, 0.61])
    # 0.6 again is no better
    assert [is_enough for _, is_enough, _ in seen] == [False, False, False, False, True]
    assert [best.evaluations_since for _, _, best in seen] == [0, 1, 0, 1, 2]


def test_without_patience_it_is_never_enough():
    assert not any(is_enough for _, is_enough, _ in follow(goal_of(None, None, None), [0.5] + [0.6] * 50))


def test_a_value_that_is_no_number_is_never_the_best():
    nan, inf = float("nan"), float("inf")
    seen = follow(MetricGoal("eval_loss", greater_is_better=False, patience=3), [nan, 0.7, nan, -inf, 0.6])
    assert [is_best for is_best, _, _ in seen] == [False, True, False, False, True]
    assert seen[0][2] == BestEvaluation(None, None, 1)


def test_what_a_checkpoint_keeps_goes_on_where_it_was():
    aim = MetricGoal("eval_loss", greater_is_better=False, patience=3)
    values = [0.7, 0.5, 0.6, 0.55, 0.8]
    whole = follow(aim, values)
    kept = BestEvaluation(**json.loads(json.dumps(asdict(follow(aim, values[:3])[-1][2]))))
    resumed = follow(aim, values[3:], kept)
    assert resumed[-1] == whole[-1] == (False, True, BestEvaluation(20, 0.5, 3, {"eval_loss": 0.5, "eval_other": 9.0}))


def test_a_metric_that_is_not_there_names_those_that_are():
    text = (
        "metric_for_best_model: found eval_rewards/margin, expected one of the metrics of this run's evaluation: "
        "eval_loss, eval_rewards/margins"
    )
    with pytest.raises(ConfigError) as error:
        judge(goal_of("rewards/margin", None, None), BestEvaluation(), 10, {MARGIN: 0.1, "eval_loss": 0.5})
    assert str(error.value) == text
    with pytest.raises(ConfigError, match=r"eval_loss, eval_rewards/margins$"):
        check_metric(goal_of("rewards/margin", None, None), {"eval_loss", MARGIN})
    check_metric(goal_of("rewards/margins", None, None), {"eval_loss", MARGIN})
