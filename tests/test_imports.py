"""Each engine works without the other, and what needs no engine works without any."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import CHECKOUT, macft_process, write_chat_data, write_config
from support.toy_backend import write_toy_model

MLX = ("mlx", "mlx_lm")
TORCH = ("torch",)
# what `macft --help` may not wait for
HEAVY = ("torch", "mlx", "mlx_lm", "transformers", "peft", "matplotlib", "huggingface_hub", "numpy", "pydantic", "rich")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    write_toy_model(folder / "model")
    write_chat_data(folder / "chat.jsonl")
    write_config(
        folder / "run.yaml",
        model_name_or_path="model",
        dataset="chat.jsonl",
        output_dir="run",
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        val_size=1,
        save_steps=1,
    )
    return folder


@pytest.mark.parametrize(("backend", "other"), [("mlx", (*TORCH, "peft")), ("torch", MLX)])
def test_one_engine_trains_and_answers_with_the_other_uninstalled(backend, other, folder):
    chosen = macft_process("train", "run.yaml", f"output_dir=run-{backend}", cwd=folder, without=other)
    assert chosen.code == 0, chosen.err
    log = (folder / f"run-{backend}" / "trainer_log.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(line) for line in log) == 2
    assert f" on {backend} " in chosen.err, "auto takes the engine that is there"
    asked = ("chat", "model", "--adapter", f"run-{backend}", "--prompt", "hello", "--max-new-tokens", "3")
    answered = macft_process(*asked, cwd=folder, without=other)
    assert answered.code == 0, answered.err


def test_data_preview_needs_no_engine(folder):
    shown = macft_process("data", "preview", "run.yaml", "--json", cwd=folder, without=[*MLX, *TORCH, "transformers"])
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["num_trained"] == 8


def test_help_imports_nothing_heavy():
    listing = "print([name for name in " + repr(HEAVY) + " if name in sys.modules])"
    shown = macft_process("--help", then=listing)
    assert shown.code == 0 and shown.out.splitlines()[-1] == "[]"


def test_import_contracts_hold():
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert tool is not None, "pip install import-linter"
    done = subprocess.run([tool, "--no-cache"], cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 3 kept, 0 broken." in done.stdout
