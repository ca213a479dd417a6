"""A whole KTO run through `train`: where it starts, what it logs, that it can be interrupted, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.toy_backend import ENGINES, curve, press_ctrl_c_in_step, toy_settings, write_feedback, write_toy_model

from macft.data.batches import in_order
from macft.errors import ConfigError, DataError, MacftError, StoppedError, UsageError
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train
from macft.weights.adapters.peft import read_adapter

pytestmark = pytest.mark.usefixtures("small_threads", "cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve rated answers."""
    return write_feedback(tmp_path_factory.mktemp("data") / "rated.jsonl", 12)


def kto(model: Path, data: Path, output_dir: Path, engine: str, **keys):
    return toy_settings(model, data, output_dir, engine, **{"stage": "kto", "per_device_train_batch_size": 4, **keys})


def rows_of(output_dir: Path) -> list[dict]:
    """The rows of the log without what the clock says."""
    clock = {"throughput", "peak_memory_gb", "elapsed_time", "remaining_time"}
    return [{key: value for key, value in row.items() if key not in clock} for row in read_log(output_dir)]


# ---- the start

STARTS = {
    "a fresh adapter": {},
    "DoRA": {"use_dora": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "a loaded adapter": {"adapter_name_or_path": "ADAPTER"},
    "a new adapter on a loaded one": {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True},
    "recomputed blocks": {"gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_starts_at_half_its_weights_with_rewards_0(engine, start, model, data, adapter, tmp_path):
    keys = {key: str(adapter) if value == "ADAPTER" else value for key, value in STARTS[start].items()}
    weights = {"kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5}
    train(kto(model, data, tmp_path / "out", engine, **keys, **weights, max_steps=2, disable_shuffling=True))
    first, second = rows_of(tmp_path / "out")
    assert first["share/chosen"] == 0.5
    assert first["loss"] == pytest.approx(0.5, abs=3e-6)
    assert abs(first["rewards/chosen"]) < 3e-6 and abs(first["rewards/rejected"]) < 3e-6 and first["kl"] < 3e-5
    # and then moves
    assert abs(second["rewards/chosen"]) > 1e-3 and abs(second["loss"] - 0.5) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_supervised_loss_of_desirable_answers_comes_on_top(engine, model, data, tmp_path):
    train(kto(model, data, tmp_path / "out", engine, pref_ftx=0.7, max_steps=1))
    [row] = rows_of(tmp_path / "out")
    assert row["sft_loss"] > 1
    assert row["loss"] == pytest.approx(0.5 + 0.7 * row["share/chosen"] * row["sft_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ([-1.0, 0.0], r"with rewards \+0\.1000 and \+0\.1000 and [+-]0\.0000, and must be 0\.500000"),
        ([0.0, -1.0], r"with rewards [+-]0\.0000 and [+-]0\.0000 and \+0\.1000, and must be 0\.500000"),
    ],
    ids=["answers", "mismatched answers"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_start_that_is_not_its_own_reference_stops(engine, shift, said, model, data, cache, tmp_path):
    keys = {"per_device_train_batch_size": 12, "max_steps": 1}
    train(kto(model, data, tmp_path / "first", engine, **keys))
    [path] = cache.iterdir()
    save_file({"columns": load_file(path)["columns"] + shift}, path)
    with pytest.raises(MacftError, match=rf"^step 1: the kto loss is 0\.\d+ {said} with rewards 0"):
        train(kto(model, data, tmp_path / "second", engine, **keys))


@pytest.mark.parametrize("engine", ENGINES)
def test_another_model_may_be_the_reference(engine, model, data, tmp_path):
    other = write_toy_model(tmp_path / "other", seed=1)
    train(kto(model, data, tmp_path / "out", engine, ref_model=str(other), max_steps=1))
    [row] = rows_of(tmp_path / "out")
    assert abs(row["rewards/chosen"]) > 1e-2


# ---- the log and the evaluation


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_and_pictures_have_what_is_logged(engine, model, data, tmp_path):
    keys = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "plot_loss": True}
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "rewards/margins"}
    train(kto(model, data, tmp_path / "out", engine, **keys, **best))
    names = {"loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    evaluations = [row for row in rows_of(tmp_path / "out") if "eval_loss" in row]
    assert len(evaluations) == 2
    for row in evaluations:
        assert {f"eval_{name}" for name in names} <= row.keys()
        assert row["eval_rewards/margins"] == pytest.approx(row["eval_rewards/chosen"] - row["eval_rewards/rejected"])
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"training_kl.png", "training_rewards.png", "training_rewards_margins.png"} <= pictures
    assert "training_rewards_accuracies.png" not in pictures


def test_the_evaluation_is_that_of_a_step_without_an_update(model, data, tmp_path):
    """Both engines' evaluation, in one batch, is the loss of a training step on the same rows."""
    found = []
    for engine in ("mlx", "torch"):
        keys = {"eval_dataset": str(data), "eval_strategy": "steps", "eval_steps": 3, "disable_shuffling": True}
        keys |= {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 12, "max_steps": 4}
        train(kto(model, data, tmp_path / engine, engine, **keys))
        rows = rows_of(tmp_path / engine)
        evaluated = next(row for row in rows if "eval_loss" in row)
        step = next(row for row in rows if row.get("current_steps") == 4 and "loss" in row)
        for name in ("loss", "kl", "rewards/margins", "logps/chosen"):
            assert evaluated[f"eval_{name}"] == pytest.approx(step[name], rel=1e-4, abs=1e-5)
        found.append(evaluated["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_steps_without_one_of_the_ratings_are_logged_without_it(model, data, tmp_path):
    train(
        kto(model, data, tmp_path / "out", "torch", per_device_train_batch_size=1, disable_shuffling=True, max_steps=2)
    )
    first, second = rows_of(tmp_path / "out")
    assert "rewards/chosen" in first and "rewards/rejected" not in first and "rewards/margins" not in first
    assert "rewards/rejected" in second and "rewards/chosen" not in second


# ---- interrupted

KINDS = {
    "lora": {},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_unbroken_one(engine, kind, model, data, tmp_path, monkeypatch):
    keys = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, **KINDS[kind]}
    train(kto(model, data, tmp_path / "whole", engine, **keys))
    broken = kto(model, data, tmp_path / "broken", engine, **keys)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        press_ctrl_c_in_step(patch, 3)
        train(broken)
    train(broken.model_copy(update={"resume_from_checkpoint": True}))
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    if kind != "full":
        whole, resumed = (read_adapter(tmp_path / name).state for name in ("whole", "broken"))
        assert all(np.array_equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("change", ["rating", "batch size"])
def test_other_ratings_or_blocks_are_other_data(change, model, data, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(data.read_text())
    keys = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
    train(kto(model, own, tmp_path / "out", "torch", **keys, max_steps=1))
    if change == "rating":
        first, *rest = own.read_text().splitlines()
        own.write_text("\n".join([json.dumps(json.loads(first) | {"label": False}), *rest]) + "\n")
    else:
        keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(UsageError, match="written with other data"):
        train(kto(model, own, tmp_path / "out", "torch", **keys, max_steps=2, resume_from_checkpoint=True))


def test_a_later_run_asks_the_reference_only_for_other_mismatched_answers(model, data, cache, tmp_path):
    train(kto(model, data, tmp_path / "a", "torch", max_steps=3))
    train(kto(model, data, tmp_path / "b", "torch", max_steps=3, pref_beta=0.4, seed=7))
    assert len(list(cache.iterdir())) == 1
    train(kto(model, data, tmp_path / "c", "torch", max_steps=6, per_device_train_batch_size=2))
    assert len(list(cache.iterdir())) == 2


# ---- the data


def test_in_the_order_of_the_data_a_micro_batch_holds_its_own_answers_mismatched(model, data, tmp_path):
    prepared = prepare(kto(model, data, tmp_path / "out", "torch", disable_shuffling=True))
    [batch], *_ = prepared.batches(0, print)
    answers = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)]
    assert answers[4:] == [answers[3], *answers[:3]]
    # and the evaluation covers every row once, whatever its length
    assert sorted(i for indices, _ in in_order(prepared.train, 5) for i in indices) == list(range(12))


def test_ratings_out_of_balance_are_warned_about(model, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="macft")
    rows = [json.dumps({"prompt": "one", "completion": "two", "label": i == 0}) for i in range(6)]
    (tmp_path / "rated.jsonl").write_text("\n".join(rows) + "\n")
    train(kto(model, tmp_path / "rated.jsonl", tmp_path / "out", "torch", max_steps=1))
    said = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("1 desirable and 5 undesirable rows, weighted 1 and 1: 0.20 to 1") for text in said)
    assert any(
        text.startswith("loss: kto, beta 0.1, weights 1 and 1, reference: the model as it starts") for text in said
    )


@pytest.mark.parametrize(
    ("rows", "keys", "error", "message"),
    [
        (
            [{"prompt": "q", "completion": "a", "label": True}],
            {},
            DataError,
            "a single rated answer cannot be trained on",
        ),
        ([{"prompt": "q", "completion": "a"}], {}, DataError, "stage: kto needs a conversation"),
        (
            [{"prompt": "q", "completion": "a", "label": 1}] * 2,
            {},
            DataError,
            r'line 2: "label": found 1, expected true \(desirable\) or false',
        ),
        (
            [{"prompt": "q", "completion": "a", "label": True}] * 3,
            {"val_size": 1, "eval_strategy": "epoch"},
            DataError,
            "a single rated answer cannot be trained on",
        ),
        (
            [{"prompt": "q", "completion": "a", "label": True}] * 4,
            {"val_size": 2, "metric_for_best_model": "rewards/accuracies", "early_stopping_steps": 1},
            ConfigError,
            "metric_for_best_model: found eval_rewards/accuracies, expected one of .* eval_kl, .*eval_rewards/margins",
        ),
    ],
    ids=["one row", "no rating", "a number", "one row held out", "no such metric"],
)
def test_what_cannot_be_trained_on_is_refused(rows, keys, error, message, model, tmp_path):
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(error, match=message):
        train(kto(model, tmp_path / "rated.jsonl", tmp_path / "out", "torch", **keys))
    assert not (tmp_path / "out").exists()
