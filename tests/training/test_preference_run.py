"""A whole preference run through `train`: where it starts, what it writes, and that it can be interrupted."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.pair_oracle import dpo_metrics, scores
from support.toy_backend import (
    ENGINES,
    curve,
    press_ctrl_c_in_step,
    toy_settings,
    write_toy_model,
)

from macft.errors import MacftError, StoppedError
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train
from macft.weights.adapters.peft import read_adapter

pytestmark = pytest.mark.usefixtures("small_threads", "cache")

LN2 = math.log(2.0)
# what a row of the log says of the clock and the machine
CLOCK = {"throughput", "peak_memory_gb", "elapsed_time", "remaining_time"}
PICTURES = {
    *("training_loss.png", "training_rewards_accuracies.png", "training_rewards_margins.png"),
    *("training_rewards.png", "training_logps.png"),
}
FOODPO_PICTURES = {"training_dynamic_beta.png", "training_prompt_perplexity.png", "foodpo_distribution.png"}


@pytest.fixture(scope="module")
def data(pair_data) -> Path:
    return pair_data


def dpo(model: Path, data: Path, output_dir: Path, engine: str, **keys):
    return toy_settings(model, data, output_dir, engine, **{"stage": "dpo", **keys})


def rows_of(output_dir: Path) -> list[dict]:
    """The rows of the log without what the clock says."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_log(output_dir)]


def pictures_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


# ---- the start

STARTS = {
    "a fresh adapter": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "a loaded adapter": {"adapter_name_or_path": "ADAPTER"},
    "a new adapter on a loaded one": {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True},
    "foodpo": {"stage": "foodpo"},
    "foodpo, policy": {"stage": "foodpo", "foodpo_perplexity": "policy"},
    "ld_alpha": {"ld_alpha": 0.3},
    "recomputed blocks": {"gradient_checkpointing": True},
}


def with_adapter(keys: dict, adapter: Path) -> dict:
    return {key: str(adapter) if value == "ADAPTER" else value for key, value in keys.items()}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_starts_at_ln_2_with_rewards_0(engine, start, model, data, adapter, tmp_path):
    keys = with_adapter(STARTS[start], adapter)
    train(dpo(model, data, tmp_path / "out", engine, **keys, per_device_train_batch_size=3, max_steps=2))
    first, second = rows_of(tmp_path / "out")
    assert first["loss"] == pytest.approx(LN2, abs=3e-6)
    assert abs(first["rewards/chosen"]) < 3e-6 and abs(first["rewards/rejected"]) < 3e-6
    # and then moves
    assert abs(second["rewards/chosen"]) > 1e-3 and abs(second["loss"] - LN2) > 1e-3


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({"pref_loss": "hinge"}, 1.0),
        ({"pref_loss": "apo_zero"}, 1.0),
        ({"pref_loss": "apo_down"}, 1.0),
        ({"pref_loss": "ipo", "pref_beta": 0.3}, 1 / (4 * 0.09)),
        ({"pref_loss": "robust", "dpo_label_smoothing": 0.2}, LN2),
        ({"pref_loss": "sigmoid", "dpo_label_smoothing": 0.2}, LN2),
    ],
    ids=lambda value: value.get("pref_loss") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_loss_starts_where_rewards_are_0(engine, keys, loss, model, data, tmp_path):
    train(dpo(model, data, tmp_path / "out", engine, **keys, max_steps=1))
    [row] = rows_of(tmp_path / "out")
    assert row["loss"] == pytest.approx(loss, rel=3e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_supervised_loss_comes_on_top_of_the_start(engine, model, data, tmp_path):
    settings = dpo(model, data, tmp_path / "out", engine, pref_ftx=0.7, max_steps=1)
    train(settings)
    [row] = rows_of(tmp_path / "out")
    prepared = prepare(settings)
    pairs = [prepared.train[index] for index in next(prepared.plan.steps())[0]]
    lengths = np.array([len(pair.chosen.tokens) - pair.prompt_length for pair in pairs])
    supervised = float((-scores(model, pairs)[:, 0] / lengths).mean())
    assert row["sft_loss"] == pytest.approx(supervised, rel=1e-5)
    assert row["loss"] == pytest.approx(LN2 + 0.7 * supervised, rel=1e-5)


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        # ln(1 + e^-0.002), 0.1 x 0.02
        ([-0.02, 0.0, 0.0], r"loss is 0\.692148 with rewards \+0\.0020 and [+-]0\.0000,"),
        ([1.0, 1.0, 0.0], r"loss is 0\.69314\d with rewards -0\.1000 and -0\.1000,"),
    ],
    ids=["margins", "rewards alone"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_start_that_is_not_its_own_reference_stops_and_leaves_no_checkpoint(
    engine, shift, said, model, data, cache, tmp_path
):
    keys = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 11}
    train(dpo(model, data, tmp_path / "first", engine, **keys, max_steps=1))
    [path] = cache.iterdir()
    save_file({"columns": load_file(path)["columns"] + shift}, path)
    with pytest.raises(MacftError, match=f"^step 1: the sigmoid {said} and must be 0.693147 with rewards 0 ") as error:
        train(dpo(model, data, tmp_path / "second", engine, **keys, max_steps=1))
    assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"config.yaml", "trainer_log.jsonl"}
    assert read_log(tmp_path / "second") == []


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["ref_model", "ref_model_adapters", "both", "the bare base of a loaded adapter"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_named_reference_says_what_transformers_says_of_it(engine, kind, model, data, adapter, tmp_path):
    other = write_toy_model(tmp_path / "other", seed=1)
    keys = {
        "ref_model": {"ref_model": str(other)},
        "ref_model_adapters": {"ref_model_adapters": str(adapter)},
        "both": {"ref_model": str(other), "ref_model_adapters": str(adapter)},
        "the bare base of a loaded adapter": {"ref_model": str(model), "adapter_name_or_path": str(adapter)},
    }[kind]
    settings = dpo(model, data, tmp_path / "out", engine, **keys, max_steps=1)
    train(settings)
    prepared = prepare(settings)
    pairs = [prepared.train[index] for index in next(prepared.plan.steps())[0]]
    policy = scores(model, pairs, adapter if "adapter_name_or_path" in keys else None)
    reference = scores(
        other if kind in ("ref_model", "both") else model, pairs, adapter if "ref_model_adapters" in keys else None
    )
    expected = dpo_metrics(policy, reference)
    [row] = rows_of(tmp_path / "out")
    assert abs(expected["rewards/margins"]) > 1e-2
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


# ---- interrupted

KINDS = {
    "lora": {},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "dora": {"use_dora": True},
    "a loaded adapter": {"adapter_name_or_path": "ADAPTER"},
    "a new adapter on a loaded one": {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True, "lora_rank": 3},
    "foodpo": {"stage": "foodpo", "pref_ftx": 0.1},
    "foodpo without a reference": {"stage": "foodpo", "pref_loss": "orpo", "foodpo_perplexity": "policy_with_gradient"},
    "another reference": {"ref_model_adapters": "ADAPTER"},
    "foodpo, its cache deleted": {"stage": "foodpo", "lora_rank": 3},
    "a new adapter on a loaded one, its cache deleted": {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True},
    "held out": {"val_size": 3, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
}

WITHOUT_CACHE = {kind for kind in KINDS if "deleted" in kind}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_unbroken_one(engine, kind, model, data, adapter, cache, tmp_path, monkeypatch):
    keys = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1, **with_adapter(KINDS[kind], adapter)}
    train(dpo(model, data, tmp_path / "whole", engine, **keys))
    broken = dpo(model, data, tmp_path / "broken", engine, **keys)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        press_ctrl_c_in_step(patch, 3)
        train(broken)
    assert not list((tmp_path / "broken").glob("*.safetensors"))
    if kind in WITHOUT_CACHE:
        shutil.rmtree(cache)
    train(broken.model_copy(update={"resume_from_checkpoint": True}))
    assert len(curve(tmp_path / "whole")) == (4 if kind == "held out" else 6)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "broken")
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "broken" / path.relative_to(tmp_path / "whole"))
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# ---- foodpo


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_foodpo_logs_the_beta_and_the_perplexity_that_transformers_computes(engine, model, data, tmp_path):
    keys = {"stage": "foodpo", "pref_beta": 0.2, "pref_beta_scale": 0.25, "per_device_train_batch_size": 4}
    settings = dpo(model, data, tmp_path / "out", engine, **keys, num_train_epochs=1)
    train(settings)
    prepared = prepare(settings)
    for row, [indices] in zip(rows_of(tmp_path / "out"), prepared.plan.steps(), strict=True):
        costs = scores(model, [prepared.train[index] for index in indices])[:, 2]
        expected = {
            "log_prompt_perplexity": costs.mean(),
            "prompt_perplexity": np.exp(costs).mean(),
            "dynamic_beta": (0.2 * 0.25 * costs).mean(),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert row["dynamic_beta"] > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_foodpo_of_scale_0_is_dpo_to_the_bit(engine, model, data, tmp_path):
    train(dpo(model, data, tmp_path / "dpo", engine, val_size=2))
    train(dpo(model, data, tmp_path / "foodpo", engine, val_size=2, stage="foodpo", pref_beta_scale=0))
    assert rows_of(tmp_path / "dpo") == rows_of(tmp_path / "foodpo")
    one, two = (read_adapter(tmp_path / name).state for name in ("dpo", "foodpo"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    train(dpo(model, data, tmp_path / "scaled", engine, val_size=2, stage="foodpo"))
    assert rows_of(tmp_path / "scaled")[-1]["eval_loss"] != rows_of(tmp_path / "dpo")[-1]["eval_loss"]


# ---- pictures


@pytest.mark.mlx
def test_pictures_are_drawn_of_what_the_stage_logs_and_an_older_run_leaves_none(model, data, tmp_path):
    out = tmp_path / "out"
    train(dpo(model, data, out, "mlx", stage="foodpo", plot_loss=True, max_steps=3))
    assert pictures_in(out) == PICTURES | FOODPO_PICTURES
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    (out / "training_mine.png").write_text("mine")
    again = {"plot_loss": True, "max_steps": 3, "overwrite_output_dir": True}
    train(dpo(model, data, out, "mlx", **again))
    assert pictures_in(out) == {*PICTURES, "training_mine.png"}
    train(dpo(model, data, out, "mlx", **again | {"pref_loss": "orpo"}))
    own = {"training_sft_loss.png", "training_odds_ratio_loss.png"}
    assert pictures_in(out) == {*PICTURES, *own, "training_mine.png"}
    train(dpo(model, data, out, "mlx", **again | {"plot_loss": False}))
    assert pictures_in(out) == {"training_mine.png"}


@pytest.mark.torch
def test_a_run_in_bfloat16_on_a_cpu_starts_near_ln_2_and_learns(model, data, tmp_path):
    train(dpo(model, data, tmp_path / "run", "torch", bf16=True, max_steps=12))
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(LN2, abs=2e-2)
    assert np.mean([row["rewards/margins"] for row in rows[-4:]]) > 1.0
