"""A run that was interrupted and resumed is the run that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.paths import TESTS
from support.toy_backend import ENGINES, curve, press_ctrl_c_in_step, toy_settings, write_rows

from macft.errors import MacftError, StoppedError, UsageError
from macft.training.checkpoint import MANIFEST, OPTIMIZER, find_checkpoint, list_checkpoints
from macft.training.log.report import read_log
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

KINDS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "accumulated, rows of three steps": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
    },
    "held out": {"val_size": 2, "eval_strategy": "steps", "eval_steps": 2},
}


def weights(output_dir: Path) -> dict[str, np.ndarray]:
    names = [name for name in ("adapter_model.safetensors", "model.safetensors") if (output_dir / name).exists()]
    assert len(names) == 1
    return load_file(output_dir / names[0])


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def furthest(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """Largest difference relative to the largest entry."""
    largest = max(float(np.abs(value).max()) for value in one.values())
    return max(float(np.abs(one[name] - two[name]).max()) for name in one) / largest


def evaluations(output_dir: Path) -> list[tuple[int, float]]:
    return [(row["current_steps"], row["eval_loss"]) for row in read_log(output_dir) if "eval_loss" in row]


def interrupted(settings, monkeypatch, step: int) -> str:
    """Run until Ctrl-C in the step after `step`; what the user is told."""
    with monkeypatch.context() as patch, pytest.raises(StoppedError) as stopped:
        press_ctrl_c_in_step(patch, step)
        train(settings)
    return str(stopped.value)


def resume(settings, expected: bool | str = True, **keys) -> Path:
    return train(settings.model_copy(update={"resume_from_checkpoint": expected, **keys}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_same_bits(engine, kind, model, data, tmp_path, monkeypatch):
    keys = {"save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1, **KINDS[kind]}
    whole = toy_settings(model, data, tmp_path / "whole", engine, **keys)
    broken = toy_settings(model, data, tmp_path / "broken", engine, **keys)
    train(whole)
    interrupted(broken, monkeypatch, 6)
    assert not list((tmp_path / "broken").glob("*.safetensors"))
    resume(broken)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "broken")
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "broken")
    results = [json.loads((tmp_path / name / "train_results.json").read_text()) for name in ("whole", "broken")]
    assert [results[0][key] for key in ("train_loss", "total_tokens", "epoch")] == [
        results[1][key] for key in ("train_loss", "total_tokens", "epoch")
    ]


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("order", [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_goes_on_on_the_other_engine(order, kind, model, data, tmp_path, monkeypatch):
    first, second = order
    keys = {"save_strategy": "steps", "save_steps": 5, "weight_decay": 0.1, **KINDS[kind]}
    train(toy_settings(model, data, tmp_path / "whole", first, **keys))
    broken = toy_settings(model, data, tmp_path / "broken", first, **keys)
    interrupted(broken, monkeypatch, 7)
    resume(broken, backend=second)
    one, two = (np.array(curve(tmp_path / name)) for name in ("whole", "broken"))
    assert np.array_equal(one[:5], two[:5])
    assert np.all(np.abs(one - two) <= 1e-5 * np.abs(one))
    assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "broken")) < 1e-5


@pytest.mark.mlx
def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(model, data, tmp_path):
    keys = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    train(toy_settings(model, data, tmp_path / "whole", "mlx", num_train_epochs=3, **keys))
    short = toy_settings(model, data, tmp_path / "short", "mlx", num_train_epochs=1, **keys)
    train(short)
    resume(short, num_train_epochs=3)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "short"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "short")


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    """A run with checkpoints 2, 4, 6, 8, 10."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    return train(toy_settings(model, data, output_dir, "mlx", save_strategy="steps", save_steps=2))


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "a cut weights file": (lambda folder: cut(folder / "adapter_model.safetensors"), "adapter_model.safetensors"),
    "a flipped bit": (lambda folder: flip(folder / OPTIMIZER), OPTIMIZER),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "half a manifest": (lambda folder: cut(folder / MANIFEST) or cut(folder / MANIFEST), MANIFEST),
    "a manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("null"), MANIFEST),
    "a missing file": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json"),
}


@pytest.mark.mlx
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, run_dir):
    spoil, name = DAMAGE[damage]
    spoil(run_dir / "checkpoint-10")
    assert find_checkpoint(run_dir, True) == run_dir / "checkpoint-8"
    with pytest.raises(MacftError, match=f"checkpoint-10: .*{name}"):
        find_checkpoint(run_dir, str(run_dir / "checkpoint-10"))


@pytest.mark.mlx
def test_all_damaged_is_one_error_that_names_each(run_dir):
    for checkpoint in list_checkpoints(run_dir):
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(MacftError) as error:
        find_checkpoint(run_dir, True)
    assert all(f"checkpoint-{step}: no manifest.json" in str(error.value) for step in (2, 4, 6, 8, 10))
    assert "\n" not in str(error.value)


def test_resuming_where_nothing_is_says_so(tmp_path):
    with pytest.raises(MacftError, match="holds no checkpoint to resume from; remove the key to start again"):
        find_checkpoint(tmp_path, True)
    with pytest.raises(MacftError, match="nowhere is not a directory; pass a checkpoint-N directory"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.mlx
def test_a_path_goes_back_and_later_checkpoints_give_way(model, data, finished, run_dir, monkeypatch):
    settings = toy_settings(
        model, data, run_dir, "mlx", save_strategy="steps", save_steps=3, save_total_limit=2
    ).model_copy(update={"resume_from_checkpoint": str(run_dir / "checkpoint-4")})
    message = interrupted(settings, monkeypatch, 6)
    # the newest kept checkpoint is the one just written, though 8 and 10 were there
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-4", "checkpoint-6"]
    assert message.endswith(f"resume_from_checkpoint=true continues from {run_dir / 'checkpoint-6'}")
    assert [row[0] for row in curve(run_dir)] == [1, 2, 3, 4, 5, 6]
    resume(settings)
    assert same(weights(finished), weights(run_dir))
    assert curve(finished) == curve(run_dir)


@pytest.mark.mlx
def test_other_data_or_another_order_cannot_be_resumed(model, data, run_dir, tmp_path):
    settings = toy_settings(model, data, run_dir, "mlx", save_strategy="steps", save_steps=2)
    before = (run_dir / "trainer_log.jsonl").read_bytes()
    for changed in (
        {"dataset": str(write_rows(tmp_path / "other.jsonl", seed=1))},
        {"seed": 7},
        {"per_device_train_batch_size": 4},
        {"train_on_prompt": True},
    ):
        with pytest.raises(UsageError, match="written with other data"):
            resume(settings, **changed)
    assert (run_dir / "trainer_log.jsonl").read_bytes() == before


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_rank": 8}, "lora_rank 4, this run has 8; lora_alpha 8.0, this run has 16.0"),
        ({"lora_alpha": 32.0}, "lora_alpha 8.0, this run has 32.0"),
        ({"lora_target": "q_proj"}, "lora_target"),
        ({"finetuning_type": "full"}, "finetuning_type lora, this run has full"),
        ({"max_steps": 9}, "past the end of a run of 9 steps"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(changed, said, model, data, run_dir):
    settings = toy_settings(model, data, run_dir, "mlx", save_strategy="steps", save_steps=2)
    with pytest.raises(UsageError) as error:
        resume(settings, **changed)
    assert said in str(error.value) and "checkpoint-10" in str(error.value)


@pytest.mark.mlx
def test_checkpoints_of_only_the_model_say_why_they_cannot_be_resumed(model, data, tmp_path):
    settings = toy_settings(model, data, tmp_path / "out", "mlx", save_strategy="epoch", save_only_model=True)
    train(settings)
    assert not (tmp_path / "out/checkpoint-5" / OPTIMIZER).exists()
    with pytest.raises(MacftError, match=r"checkpoint-10: .* it was written with save_only_model"):
        resume(settings)


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "epoch"}, [5, 10]),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 10]),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}, [8, 9, 10]),
        ({"save_strategy": "epoch", "save_total_limit": 1}, [10]),
    ],
)
def test_checkpoints_are_written_when_asked_and_the_newest_kept(keys, steps, model, data, tmp_path):
    train(toy_settings(model, data, tmp_path, "mlx", **keys))
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)] == steps
    assert all(find_checkpoint(tmp_path, str(path)) == path for path in list_checkpoints(tmp_path))


@pytest.mark.mlx
def test_a_checkpoint_holds_an_adapter_with_its_template_and_the_moments(finished):
    names = {path.name for path in (finished / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"optimizer.safetensors", "trainer_state.json", "manifest.json"} <= names
    moments = load_file(finished / "checkpoint-4" / OPTIMIZER)
    trained = weights(finished)
    assert moments.keys() == {f"{name}.{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq")}
    assert {value.dtype for value in moments.values()} == {np.dtype(np.float32)}


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.toy_backend import toy_settings
from macft.training.run import train
model, data, output_dir, resume = sys.argv[2:]
keys = dict(save_strategy="steps", save_steps=1, max_steps=60, save_total_limit=2)
keys["resume_from_checkpoint"] = resume == "yes"
train(toy_settings(Path(model), Path(data), Path(output_dir), "mlx", **keys))
"""


@pytest.mark.slow
@pytest.mark.mlx
def test_killing_the_process_at_any_moment_loses_nothing(model, data, tmp_path):
    def start(output_dir: Path, resume: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            _CHILD,
            str(TESTS),
            *map(str, (model, data, output_dir)),
            resume,
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    keys = {"save_strategy": "no", "max_steps": 60}
    train(toy_settings(model, data, tmp_path / "whole", "mlx", **keys))
    output_dir = tmp_path / "killed"
    resumed = "no"
    for wait in (0.31, 0.17):
        child = start(output_dir, resumed)
        seen = 0
        while seen < 2 and child.poll() is None:
            time.sleep(0.02)
            seen = len(list_checkpoints(output_dir))
        time.sleep(wait)
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.stderr.read()
        resumed = "yes"
    assert 0 < max(int(path.name.split("-")[1]) for path in list_checkpoints(output_dir)) < 60
    child = start(output_dir, "yes")
    assert child.wait() == 0, child.stderr.read()
    assert same(weights(tmp_path / "whole"), weights(output_dir))
    assert curve(tmp_path / "whole") == curve(output_dir)
    assert not list(output_dir.glob(".*"))
