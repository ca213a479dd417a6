"""Evaluation of a preference run: its numbers, the best checkpoint it ends with, and when it stops early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.pair_oracle import dpo_metrics, scores
from support.toy_backend import ENGINES, press_ctrl_c_in_step, toy_settings, write_pairs, write_rows

from macft.errors import ConfigError, StoppedError
from macft.training.checkpoint import list_checkpoints
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads", "cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 13)


# each of the 8 steps is evaluated and saved
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def settings_of(model: Path, data: Path, output_dir: Path, engine: str, **keys):
    return toy_settings(model, data, output_dir, engine, **{"stage": "dpo", "val_size": 5, **keys})


def evaluations(output_dir: Path) -> list[dict]:
    return [row for row in read_log(output_dir) if "eval_loss" in row]


def same_adapter(one: Path, two: Path) -> bool:
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (two / name).read_bytes()


# ---- the numbers


@pytest.mark.torch
@pytest.mark.parametrize(
    "keys", [{}, {"stage": "foodpo"}, {"pref_ftx": 0.3}], ids=["dpo", "foodpo", "with the supervised loss"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_is_what_transformers_computes_of_the_adapter(engine, keys, model, data, tmp_path):
    """Five pairs in batches of two: the mean is over pairs, not over batches."""
    settings = settings_of(model, data, tmp_path / "out", engine, **keys, per_device_eval_batch_size=2)
    train(settings)
    pairs = prepare(settings).valid
    policy, reference = scores(model, pairs, tmp_path / "out"), scores(model, pairs)
    beta = 0.1 * 0.5 * reference[:, 2] if keys.get("stage") else 0.1
    expected = dpo_metrics(policy, reference, beta)
    if "pref_ftx" in keys:
        lengths = [len(pair.chosen.tokens) - pair.prompt_length for pair in pairs]
        expected["sft_loss"] = -float((policy[:, 0] / lengths).mean())
        expected["loss"] += 0.3 * expected["sft_loss"]
    if "stage" in keys:
        expected |= {"dynamic_beta": beta.mean(), "prompt_perplexity": np.exp(reference[:, 2]).mean()}
    # once an epoch
    rows = evaluations(tmp_path / "out")
    assert [row["current_steps"] for row in rows] == [4, 8]
    assert {name: rows[-1][f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(expected["rewards/chosen"]) > 1e-2


# ---- the best


@pytest.mark.parametrize(
    ("keys", "name", "pick"),
    [
        ({}, "eval_loss", np.argmin),
        ({"metric_for_best_model": "eval_rewards/margins"}, "eval_rewards/margins", np.argmax),
        ({"metric_for_best_model": "rewards/chosen"}, "eval_rewards/chosen", np.argmax),
        (
            {"metric_for_best_model": "eval_rewards/rejected", "greater_is_better": False},
            "eval_rewards/rejected",
            np.argmin,
        ),
    ],
    ids=["loss", "margins", "without eval_", "less is better"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_ends_with_its_best_checkpoint(engine, keys, name, pick, model, data, tmp_path):
    out = tmp_path / "out"
    train(settings_of(model, data, out, engine, **EVERY_STEP, load_best_model_at_end=True, **keys))
    values = [row[name] for row in evaluations(out)]
    best = int(pick(values)) + 1
    assert len(values) == 8 and len(list_checkpoints(out)) == 8
    assert same_adapter(out, out / f"checkpoint-{best}")
    assert best == 8 or not same_adapter(out, out / "checkpoint-8")


@pytest.mark.mlx
def test_the_best_of_these_runs_is_not_always_the_last(model, data, tmp_path):
    """What the tests of this file rest on."""
    train(settings_of(model, data, tmp_path, "mlx", eval_strategy="steps", eval_steps=1))
    values = [row["eval_loss"] for row in evaluations(tmp_path)]
    assert 1 <= int(np.argmin(values)) + 1 <= 6


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_checkpoint_outlives_the_limit(engine, kind, model, data, tmp_path):
    full = {"finetuning_type": "full", "learning_rate": 2e-3} if kind == "full" else {}
    keys = {"load_best_model_at_end": True, "save_total_limit": 1, **EVERY_STEP, **full}
    train(settings_of(model, data, tmp_path, engine, **keys))
    best = int(np.argmin([row["eval_loss"] for row in evaluations(tmp_path)])) + 1
    assert best < 8
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{best}", "checkpoint-8"]
    name = "model.safetensors" if full else "adapter_model.safetensors"
    one, two = load_file(tmp_path / name), load_file(tmp_path / f"checkpoint-{best}" / name)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.mlx
def test_a_resumed_run_remembers_its_best(model, data, tmp_path, monkeypatch):
    keys = {"load_best_model_at_end": True, "save_total_limit": 1, **EVERY_STEP}
    train(settings_of(model, data, tmp_path / "whole", "mlx", **keys))
    best = int(np.argmin([row["eval_loss"] for row in evaluations(tmp_path / "whole")])) + 1
    broken = settings_of(model, data, tmp_path / "broken", "mlx", **keys)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        press_ctrl_c_in_step(patch, best + 1)
        train(broken)
    train(broken.model_copy(update={"resume_from_checkpoint": True}))
    assert same_adapter(tmp_path / "whole", tmp_path / "broken")
    assert same_adapter(tmp_path / "broken", tmp_path / "broken" / f"checkpoint-{best}")


# ---- enough


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("loads_best", [True, False])
@pytest.mark.mlx
def test_a_run_stops_after_so_many_evaluations_without_a_better_one(loads_best, patience, model, data, tmp_path):
    train(settings_of(model, data, tmp_path / "whole", "mlx", **EVERY_STEP))
    whole = [row["eval_loss"] for row in evaluations(tmp_path / "whole")]
    best, since, steps = np.inf, 0, 0
    while since < patience:
        best, since = (whole[steps], 0) if whole[steps] < best else (best, since + 1)
        steps += 1
    assert steps < 8
    out = tmp_path / "out"
    # logged every third step: the row of the last ones must not be lost
    keys = {"early_stopping_steps": patience, "load_best_model_at_end": loads_best, "logging_steps": 3, **EVERY_STEP}
    train(settings_of(model, data, out, "mlx", **keys))
    assert [row["eval_loss"] for row in evaluations(out)] == whole[:steps]
    assert [row["current_steps"] for row in read_log(out) if "loss" in row][-1] == steps
    assert list_checkpoints(out)[-1].name == f"checkpoint-{steps}"
    ends_with = steps - patience if loads_best else steps
    assert same_adapter(out, out / f"checkpoint-{ends_with}")
    assert same_adapter(out, tmp_path / "whole" / f"checkpoint-{ends_with}")


# ---- a metric that is not there


@pytest.mark.parametrize(
    ("keys", "known"),
    [
        (
            {"stage": "dpo", "metric_for_best_model": "eval_reward/margins"},
            "eval_logps/chosen, eval_logps/rejected, eval_loss, eval_rewards/accuracies, eval_rewards/chosen, "
            "eval_rewards/margins, eval_rewards/rejected",
        ),
        (
            {"stage": "foodpo", "pref_loss": "orpo", "foodpo_perplexity": "policy", "metric_for_best_model": "beta"},
            "eval_dynamic_beta, eval_log_prompt_perplexity, eval_logps/chosen, eval_logps/chosen_avg, "
            "eval_logps/rejected, eval_logps/rejected_avg, eval_loss, eval_odds_ratio_loss, eval_prompt_perplexity, "
            "eval_rewards/accuracies, eval_rewards/chosen, eval_rewards/margins, eval_rewards/rejected, eval_sft_loss",
        ),
        ({"stage": "sft", "metric_for_best_model": "rewards/margins"}, "eval_loss"),
    ],
    ids=["dpo", "foodpo", "sft"],
)
def test_a_metric_that_no_evaluation_has_is_an_error_before_the_model_is_loaded(keys, known, model, data, tmp_path):
    if keys["stage"] == "sft":
        data = write_rows(tmp_path / "rows.jsonl")
    settings = settings_of(model, data, tmp_path / "out", "mlx", **EVERY_STEP, early_stopping_steps=2, **keys)
    with pytest.raises(ConfigError) as error:
        train(settings)
    name = keys["metric_for_best_model"]
    found = name if name.startswith("eval_") else f"eval_{name}"
    assert str(error.value) == (
        f"metric_for_best_model: found {found}, expected one of the metrics of this run's evaluation: {known}"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache" / "reference").exists()


@pytest.mark.mlx
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo", "simpo"])
def test_the_metrics_that_are_promised_are_those_that_come(loss, model, data, tmp_path):
    keys = {"pref_loss": loss, "metric_for_best_model": "nonsense", "max_steps": 1, "pref_ftx": 0.1}
    with pytest.raises(ConfigError) as error:
        train(settings_of(model, data, tmp_path / "out", "mlx", **keys))
    promised = set(str(error.value).rpartition("evaluation: ")[2].split(", "))
    train(settings_of(model, data, tmp_path / "out", "mlx", **keys | {"metric_for_best_model": None}))
    [row] = evaluations(tmp_path / "out")
    assert {name for name in row if name.startswith("eval_")} == promised
