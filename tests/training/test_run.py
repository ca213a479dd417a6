"""A whole run through `train`: its log, its folder, its evaluation, and how it fails."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.commands import heed_ctrl_c
from support.tiny_tokenizer import DEFAULT_SYSTEM
from support.toy_backend import ENGINES, curve, press_ctrl_c_in_step, toy_settings, write_rows, write_toy_model
from transformers import AutoModelForCausalLM

from macft.config.load import load_config
from macft.data.batches import collate
from macft.errors import MacftError, MissingPackageError, StoppedError, UsageError
from macft.training.checkpoint import list_checkpoints
from macft.training.dry_run import dry_run
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train
from macft.weights.adapters.peft import read_adapter

pytestmark = pytest.mark.usefixtures("small_threads")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 11)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- the log


@pytest.mark.parametrize("engine", ENGINES)
def test_the_log_has_a_row_a_step_with_all_digits(engine, model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, engine))
    rows = read_log(tmp_path)
    # 11 rows, 2 a step: 6 steps an epoch, the last one with a single row
    assert [row["current_steps"] for row in rows] == list(range(1, 13))
    assert {row["total_steps"] for row in rows} == {12}
    assert [row["epoch"] for row in rows] == [round(step / 6, 4) for step in range(1, 13)]
    assert all({"loss", "lr", "grad_norm", "total_tokens", "throughput"} <= row.keys() for row in rows)
    for key in ("loss", "grad_norm"):
        values = [row[key] for row in rows]
        assert all(math.isfinite(value) and value > 0 for value in values)
        # float32 has 24 bits: rounded to 4 decimals, few would differ from themselves
        assert sum(value != round(value, 4) for value in values) == len(values)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["lr"] for row in rows] == [1e-2 * (1 - step / 12) for step in range(12)]


@pytest.mark.mlx
def test_every_token_is_read_once_an_epoch(model, data, tmp_path):
    settings = toy_settings(model, data, tmp_path, "mlx")
    train(settings)
    tokens = sum(len(example.tokens) for example in prepare(settings).train)
    rows = read_log(tmp_path)
    assert (rows[5]["total_tokens"], rows[11]["total_tokens"]) == (tokens, 2 * tokens)
    assert json.loads((tmp_path / "train_results.json").read_text())["total_tokens"] == 2 * tokens


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_rows_a_step_give_one_curve_however_they_are_cut(engine, model, data, tmp_path):
    curves = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        train(toy_settings(model, data, tmp_path / str(size), engine, **keys))
        curves.append(curve(tmp_path / str(size)))
    assert len(curves[0]) == 4
    for other in curves[1:]:
        assert np.allclose(curves[0], other, rtol=1e-5, atol=0)


@pytest.mark.mlx
def test_a_row_is_the_mean_of_its_steps_and_the_last_steps_are_not_lost(model, data, tmp_path):
    train(toy_settings(model, data, tmp_path / "each", "mlx"))
    train(toy_settings(model, data, tmp_path / "fifth", "mlx", logging_steps=5))
    each, fifth = curve(tmp_path / "each"), curve(tmp_path / "fifth")
    losses = [row[1] for row in each]
    assert [row[0] for row in fifth] == [5, 10, 12]
    assert [row[1] for row in fifth] == [sum(losses[:5]) / 5, sum(losses[5:10]) / 5, sum(losses[10:]) / 2]
    assert [row[2:] for row in fifth] == [each[step - 1][2:] for step in (5, 10, 12)]
    results = json.loads((tmp_path / "fifth" / "train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(sum(losses) / 12, rel=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_repeats_the_run_to_the_bit(engine, model, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(toy_settings(model, data, tmp_path / name, engine, seed=seed, lora_dropout=0.1, max_steps=4))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")
    one, two = (read_adapter(tmp_path / name).state for name in "ab")
    assert all(np.array_equal(one[name], two[name]) for name in one)


# ---- evaluation


def transformers_loss(folder: Path, examples) -> float:
    """Sum of the negative log-likelihood of all trained tokens, over their number."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.from_numpy(collate([example]).tokens).long()
        with torch.inference_mode():
            logps = torch.log_softmax(model(input_ids=tokens).logits[0, :-1].double(), -1)
        trained = torch.from_numpy(example.loss_mask[1:])
        total -= float(logps.gather(-1, tokens[0, 1:, None])[:, 0][trained].sum())
        count += int(trained.sum())
    return total / count


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES)
def test_eval_loss_is_the_loss_per_token_that_transformers_computes(engine, model, data, tmp_path):
    keys = {"finetuning_type": "full", "val_size": 5, "per_device_eval_batch_size": 2, "learning_rate": 1e-3}
    settings = toy_settings(model, data, tmp_path, engine, **keys)
    train(settings)
    held_out = prepare(settings).valid
    assert len(held_out) == 5 and len(prepare(settings).train) == 6
    rows = [row for row in read_log(tmp_path) if "eval_loss" in row]
    # once an epoch if nothing else is asked for
    assert [row["current_steps"] for row in rows] == [3, 6]
    assert rows[-1]["eval_loss"] == pytest.approx(transformers_loss(tmp_path, held_out), rel=1e-5)
    assert rows[0]["eval_loss"] != rows[1]["eval_loss"]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_loss"] == rows[-1]["eval_loss"] and results["epoch"] == 2.0


@pytest.mark.mlx
def test_a_full_model_has_its_template_where_each_reader_looks(model, data, tmp_path):
    """The base's own, which stands in tokenizer_config.json, is not what this run was trained with."""
    (tmp_path / "mine.jinja").write_text(DEFAULT_SYSTEM)
    keys = {"finetuning_type": "full", "max_steps": 1, "template": str(tmp_path / "mine.jinja")}
    train(toy_settings(model, data, tmp_path / "run", "mlx", **keys))
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == DEFAULT_SYSTEM
    assert json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())["chat_template"] == DEFAULT_SYSTEM


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8]),
        ({"eval_strategy": "steps", "logging_steps": 3}, [3, 6, 9]),
        ({"eval_strategy": "epoch", "num_train_epochs": 1.5}, [5, 8]),
    ],
)
def test_evaluations_come_when_asked_for(keys, steps, model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, "mlx", val_size=0.1, **keys))
    assert [row["current_steps"] for row in read_log(tmp_path) if "eval_loss" in row] == steps


@pytest.mark.mlx
def test_evaluation_does_not_change_the_training(model, data, tmp_path):
    separate = {"eval_dataset": str(write_rows(tmp_path / "held-out.jsonl", 3, seed=8)), "lora_dropout": 0.2}
    train(toy_settings(model, data, tmp_path / "with", "mlx", eval_strategy="steps", eval_steps=1, **separate))
    train(toy_settings(model, data, tmp_path / "without", "mlx", lora_dropout=0.2))
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


# ---- the run folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_folder_holds_everything(engine, model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, engine, plot_loss=True, val_size=2, save_strategy="epoch"))
    assert names_in(tmp_path) == {
        "config.yaml",
        "trainer_log.jsonl",
        "train_results.json",
        "eval_results.json",
        "all_results.json",
        "training_loss.png",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "checkpoint-5",
        "checkpoint-10",
    }
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results.keys() == {
        *("epoch", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
        *("train_tokens_per_second", "total_tokens", "peak_memory_gb"),
        *("eval_loss", "eval_runtime", "eval_samples_per_second"),
    }
    assert results["epoch"] == 2.0 and results["peak_memory_gb"] > 0
    runtime = results["train_runtime"]
    # 9 rows, twice, in 10 steps
    assert results["train_samples_per_second"] == pytest.approx(18 / runtime, rel=0.01)
    assert results["train_steps_per_second"] == pytest.approx(10 / runtime, rel=0.01)
    assert (tmp_path / "training_loss.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_config_of_a_run_reads_back_to_its_settings(kind, model, data, tmp_path):
    keys = {"finetuning_type": kind, "val_size": 2, "max_steps": 2, "learning_rate": 1.5e-5}
    settings = toy_settings(model, data, tmp_path / "out", "mlx", **keys)
    train(settings)
    again = load_config(tmp_path / "out" / "config.yaml", [])
    expected = settings.model_dump() | ({"lora_alpha": 8.0} if kind == "lora" else {})
    assert again.model_dump() == expected


@pytest.mark.mlx
def test_the_config_of_a_run_that_began_from_an_adapter_runs_again(model, data, tmp_path):
    train(toy_settings(model, data, tmp_path / "first", "mlx", lora_target="q_proj,v_proj", max_steps=2))
    start = {"model_name_or_path": str(model), "dataset": str(data), "backend": "mlx", "plot_loss": False}
    start |= {"adapter_name_or_path": str(tmp_path / "first"), "output_dir": str(tmp_path / "second"), "max_steps": 2}
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(start))
    train(load_config(tmp_path / "start.yaml", []))
    again = load_config(tmp_path / "second" / "config.yaml", [f"output_dir={tmp_path / 'third'}"])
    assert (again.lora_rank, again.lora_alpha, again.lora_target) == (4, 8.0, "q_proj,v_proj")
    train(again)
    assert curve(tmp_path / "second") == curve(tmp_path / "third")
    assert read_adapter(tmp_path / "third").config.rank == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_full_fine_tuning_leaves_a_model_folder(engine, model, data, tmp_path):
    settings = toy_settings(model, data, tmp_path / "full", engine, finetuning_type="full", max_steps=2)
    train(settings)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names_in(tmp_path / "full")
    assert "adapter_model.safetensors" not in names_in(tmp_path / "full")
    # it is a base for the next run
    train(toy_settings(tmp_path / "full", data, tmp_path / "next", engine, max_steps=1))
    assert len(curve(tmp_path / "next")) == 1


# ---- what stands in the way


@pytest.mark.mlx
def test_a_folder_with_a_run_is_left_alone(model, data, tmp_path):
    settings = toy_settings(model, data, tmp_path, "mlx", max_steps=1)
    train(settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError) as error:
        train(settings)
    assert "resume_from_checkpoint=true" in str(error.value) and "overwrite_output_dir=true" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.mlx
def test_overwriting_removes_the_old_run_and_nothing_else(model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, "mlx", save_strategy="epoch", val_size=2, plot_loss=True))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-notes").mkdir()
    train(toy_settings(model, data, tmp_path, "mlx", overwrite_output_dir=True, max_steps=2))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-notes").is_dir()
    assert not list_checkpoints(tmp_path)
    assert not {"eval_results.json", "training_loss.png"} & names_in(tmp_path)
    assert "eval_loss" not in json.loads((tmp_path / "all_results.json").read_text())
    assert [row["current_steps"] for row in read_log(tmp_path)] == [1, 2]


def test_an_old_run_outlives_a_new_one_that_cannot_begin(model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, "mlx", max_steps=1))
    with pytest.raises(MacftError):
        train(toy_settings(model, tmp_path / "no.jsonl", tmp_path, "mlx", overwrite_output_dir=True))
    with pytest.raises(MacftError):
        train(toy_settings(model, data, tmp_path, "mlx", overwrite_output_dir=True, lora_target="c_attn"))
    assert read_adapter(tmp_path).config.rank == 4 and len(curve(tmp_path)) == 1


def test_the_base_model_is_never_the_run_folder(model, data, tmp_path):
    base = write_toy_model(tmp_path / "base")
    for keys in ({"overwrite_output_dir": True}, {"overwrite_output_dir": True, "finetuning_type": "full"}):
        with pytest.raises(UsageError, match="is the folder of the base model"):
            train(toy_settings(base, data, tmp_path / "x" / ".." / "base", "mlx", **keys))
    assert names_in(base) == names_in(model)


def test_a_run_folder_that_cannot_be_is_an_error_before_anything_is_loaded(data, tmp_path):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=r"output_dir: .*file"):
            train(toy_settings(tmp_path / "no-model", data, output_dir, "mlx"))
    assert names_in(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_an_error_before_anything_is_loaded(data, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(UsageError, match=r"output_dir: .*cannot be written"):
        train(toy_settings(tmp_path / "no-model", data, tmp_path / "closed" / "run", "mlx"))


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "swanlab"])
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(tracker, data, tmp_path, monkeypatch):
    for package in (tracker, "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"pip install {tracker}"):
        train(toy_settings(tmp_path / "no-model", data, tmp_path / "out", "mlx", report_to=f"none,{tracker}"))
    assert not names_in(tmp_path)


@pytest.mark.parametrize(("stage", "rate"), [("sft", 1e6), ("sft", 1e30), ("dpo", 1e30)])
@pytest.mark.parametrize("engine", ENGINES)
def test_diverged_training_stops_with_one_error_and_no_adapter(engine, stage, rate, model, data, pair_data, tmp_path):
    rows = data if stage == "sft" else pair_data
    settings = toy_settings(model, rows, tmp_path / "out", engine, stage=stage, learning_rate=rate, max_grad_norm=0.0)
    with pytest.raises(MacftError, match=r"^step [2-9]: loss .* training has diverged: lower learning_rate") as error:
        train(settings)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path / "out") == {"config.yaml", "trainer_log.jsonl"}
    assert all(math.isfinite(row["loss"]) for row in read_log(tmp_path / "out"))


@pytest.mark.mlx
@pytest.mark.parametrize("keys", [{}, {"finetuning_type": "full"}, {"save_strategy": "epoch"}])
def test_weights_that_the_last_step_ruined_are_not_written(keys, model, data, tmp_path):
    with pytest.raises(MacftError, match="not finite after the last step"):
        train(toy_settings(model, data, tmp_path, "mlx", learning_rate=1e39, max_steps=1, **keys))
    assert names_in(tmp_path) == {"config.yaml", "trainer_log.jsonl"}


@pytest.mark.mlx
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_full_disk_leaves_no_half_file(strategy, model, data, tmp_path):
    keys = {"lora_rank": 64, "save_strategy": strategy}
    settings = toy_settings(model, data, tmp_path, "mlx", **keys)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # files end at 200 kB: the tokenizer fits, the adapter (600 kB) does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            train(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert left == {"config.yaml", "trainer_log.jsonl"} | (tokenizer if strategy == "no" else set())


# ---- Ctrl-C


@pytest.mark.mlx
def test_ctrl_c_says_where_the_run_stands(model, data, tmp_path, monkeypatch):
    press_ctrl_c_in_step(monkeypatch, 3)
    with pytest.raises(StoppedError) as stopped:
        train(toy_settings(model, data, tmp_path / "none", "mlx"))
    expected = f"stopped after step 3 of 12; {tmp_path / 'none'} holds no checkpoint to resume from"
    assert str(stopped.value).startswith(expected) and "overwrite_output_dir=true" in str(stopped.value)
    with pytest.raises(StoppedError) as stopped:
        train(toy_settings(model, data, tmp_path / "two", "mlx", save_strategy="steps", save_steps=2))
    assert str(stopped.value).startswith("stopped after step 3 of 12; resume_from_checkpoint=true continues from")
    assert str(stopped.value).endswith("checkpoint-2")
    assert len(curve(tmp_path / "two")) == 3


@pytest.mark.slow
@pytest.mark.mlx
def test_ctrl_c_in_a_terminal_ends_with_code_130_and_no_traceback(model, data, tmp_path):
    settings = toy_settings(model, data, tmp_path / "out", "mlx", max_steps=5000, save_strategy="steps", save_steps=5)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    command = [sys.executable, "-m", "macft", "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as child:
        lines = []
        for line in child.stderr:
            lines.append(line)
            if line.startswith("step    7/5000"):
                child.send_signal(signal.SIGINT)
                break
        lines += child.stderr.readlines()
        assert child.wait(timeout=60) == 130
        assert child.stdout.read() == ""
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("stopped after step ") and "resume_from_checkpoint=true continues from" in lines[-1]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.mlx
def test_a_dry_run_keeps_nothing(model, data, tmp_path):
    said = dry_run(toy_settings(model, data, tmp_path / "out", "mlx", save_strategy="epoch"))
    assert said.startswith("dry run: all of it works")
    assert not names_in(tmp_path)


def test_overwriting_a_full_run_with_lora_leaves_no_model_config_behind(model, data, tmp_path):
    """A folder with config.json but no weights would pass for a broken model."""
    run = tmp_path / "run"
    train(toy_settings(model, data, run, "torch", finetuning_type="full", max_steps=1))
    assert "config.json" in names_in(run)
    train(toy_settings(model, data, run, "torch", max_steps=1, overwrite_output_dir=True))
    assert not {"config.json", "generation_config.json", "model.safetensors"} & names_in(run)
    assert "adapter_config.json" in names_in(run)


def test_a_folder_that_cannot_be_made_is_refused_before_the_data_is_read(model, tmp_path):
    (tmp_path / "file").write_text("")
    settings = toy_settings(model, tmp_path / "absent.jsonl", tmp_path / "file" / "run", "torch")
    with pytest.raises(UsageError, match=r"output_dir: .* cannot be written; give another directory"):
        train(settings)
