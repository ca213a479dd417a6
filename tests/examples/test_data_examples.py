"""The examples of other tools' data run as they stand: files, names, templates and keys are taken as they are."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.commands import CHECKOUT
from support.data_rows import read_examples, read_pairs
from support.toy_backend import ENGINES

from macft.commands.data import data
from macft.config.load import load_config
from macft.errors import MacftError
from macft.models.locate import resolve_model
from macft.training.log.report import read_log
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

EXAMPLES = {
    "foodpo_zh": "foodpo.yaml",
    "gsm8k": "sft.yaml",
    "huanhuan": "sft.yaml",
    "tinystories": "dpo.yaml",
}
each_example = pytest.mark.parametrize("name", EXAMPLES)
CONFIGS = {name: Path("examples") / name / file for name, file in EXAMPLES.items()}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the READMEs say that the commands are given."""
    monkeypatch.chdir(CHECKOUT)


@pytest.mark.parametrize("backend", ENGINES)
@each_example
def test_an_example_trains_for_its_two_steps(name: str, backend: str, model: Path, tmp_path: Path) -> None:
    overrides = [f"model_name_or_path={model}", f"output_dir={tmp_path}/out", f"backend={backend}"]
    train(load_config(CONFIGS[name], overrides))
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    assert [row["current_steps"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if name in ("foodpo_zh", "tinystories"):
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


@each_example
def test_nothing_is_wrong_with_the_data_of_an_example(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = data.main(["check", str(CONFIGS[name]), "--model", str(model), "--json"], standalone_mode=False) or 0
    found = json.loads(capsys.readouterr().out)
    # the toy tokenizer may join a colon and the answer behind it
    assert code == 0 and {one["kind"] for one in found["findings"]} <= {"boundary_tokens"}
    assert found["rows"] >= 4


@each_example
def test_the_keys_of_an_example_are_understood_or_named_as_without_effect(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="macft")
    settings = load_config(CONFIGS[name], [])
    expected = {
        "foodpo_zh": ("foodpo", 0.1, 2),
        "gsm8k": ("sft", 0.1, 4),
        "huanhuan": ("sft", 0.1, 4),
        "tinystories": ("dpo", 0.1, 2),
    }[name]
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    assert (settings.stage, settings.pref_beta, rows) == expected
    assert settings.model_name_or_path == "smollm2-135m" and settings.max_steps == 2
    for record in caplog.records:
        assert record.getMessage().startswith("no effect here: ")


def test_the_arrow_columns_are_mapped_by_dataset_info() -> None:
    examples = read_examples("gsm8k_mini", "examples/gsm8k", None)
    assert len(examples) == 8
    for example in examples:
        question, answer = example.messages
        assert question["role"] == "user" and question["content"].endswith("?")
        assert answer["role"] == "assistant" and "\n#### " in answer["content"]


def test_the_pairs_are_found_by_only_their_entry() -> None:
    pairs = read_pairs("dpo_zh_mini", "examples/foodpo_zh", 20)
    assert len(pairs) == 8 and [m["role"] for m in pairs[6].prompt] == ["system", "user", "assistant", "user"]
    with pytest.raises(MacftError, match=r"dpo_zh_demo: not in .*dataset_info.json, .* did you mean dpo_zh_mini\?"):
        read_pairs("dpo_zh_demo", "examples/foodpo_zh", None)


def test_the_templates_are_those_of_the_configs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(name: str) -> str:
        data.main(["preview", str(CONFIGS[name]), "--model", str(model)], standalone_mode=False)
        return capsys.readouterr().out

    assert shown("foodpo_zh").startswith("--- prompt\nHuman: 为什么海水是咸的？")
    assert shown("tinystories").startswith(
        "--- prompt\nInstruct:Write a story about a small dog and a red ball.⏎\nOutput:"
    )
    assert shown("huanhuan").startswith("<|im_start|>system⏎\n现在你要扮演皇帝身边的女人。<|im_end|>⏎\n")


@pytest.mark.slow
def test_the_foodpo_example_trains_the_model_it_names(tmp_path: Path) -> None:
    assert resolve_model("smollm2-135m").path.is_dir()
    # its two steps of two pairs run on a toy model above
    shorter = ["max_steps=1", "gradient_accumulation_steps=1", f"output_dir={tmp_path}/out"]
    train(load_config(CONFIGS["foodpo_zh"], shorter))
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    # the reference is the model itself before the first step
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=2e-2) and rows[0]["rewards/margins"] == pytest.approx(
        0, abs=2e-2
    )
    assert rows[0]["prompt_perplexity"] > 1 and len(rows) == 1
