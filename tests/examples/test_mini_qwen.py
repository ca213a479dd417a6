"""The mini_qwen example: texts, conversations and pairs, each stage beginning with what the last one left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import CHECKOUT
from support.toy_backend import ENGINES, curve

from macft.config.load import load_config
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.training.run import train
from macft.weights.model_config import read_config

pytestmark = pytest.mark.usefixtures("small_threads")

FOLDER = CHECKOUT / "examples" / "mini_qwen"
STAGES = ("pt", "sft", "dpo")


def run(stage: str, runs: Path, engine: str, *overrides: str) -> Path:
    """One stage as its file has it, in another folder, and each step logged."""
    settings = load_config(
        FOLDER / f"{stage}.yaml",
        [f"backend={engine}", f"output_dir={runs / stage}", "logging_steps=1", "plot_loss=false", *overrides],
    )
    return train(settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_three_stages_make_a_model_that_prefers_the_chosen_answers(engine, tmp_path, monkeypatch):
    # the paths in the files are those of the checkout
    monkeypatch.chdir(CHECKOUT)
    for stage, before in zip(STAGES, ("", "pt", "sft"), strict=True):
        start = [f"model_name_or_path={tmp_path / before}"] if before else []
        run(stage, tmp_path, engine, *start)
    first, last = ([loss for _, loss, _, _ in curve(tmp_path / stage)] for stage in ("pt", "sft"))
    # a model of 1,024 kinds of token that knows nothing loses ln 1024 = 6.93
    assert first[0] == pytest.approx(6.93, abs=0.2)
    assert first[-1] < first[0] - 1.5
    assert last[-1] < last[0] - 1
    rows = [json.loads(line) for line in (tmp_path / "dpo" / "trainer_log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693, abs=1e-3)
    assert rows[-1]["rewards/margins"] > 0
    config = read_config(tmp_path / "dpo")
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 64)
    assert load_tokenizer(tmp_path / "dpo").vocab_size == config["vocab_size"] == 1024


def test_each_stage_begins_where_the_one_before_it_ends():
    settings = {stage: load_config(FOLDER / f"{stage}.yaml", []) for stage in STAGES}
    assert settings["sft"].model_name_or_path == settings["pt"].output_dir
    assert settings["dpo"].model_name_or_path == settings["sft"].output_dir
    assert [settings[stage].stage for stage in STAGES] == list(STAGES)
    assert settings["pt"].is_packed and settings["sft"].is_packed


def test_the_readme_names_every_command():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"macft train examples/mini_qwen/{stage}.yaml" in text
    assert sum(path.stat().st_size for path in (FOLDER / "data").iterdir()) < 100_000
