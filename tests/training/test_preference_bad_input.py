"""What a user of preference training gets wrong is one clear error, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import macft, write_chat_data, write_config
from support.refused_runs import changed_model, message_of, refused
from support.toy_backend import toy_settings, write_pairs, write_rows, write_toy_model

from macft.engines import BACKENDS
from macft.training.run import train

GOOD = {"prompt": "hello", "chosen": "Paris is the capital.", "rejected": "one two"}

ENGINES = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data and a config whose run would work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl")
    write_chat_data(tmp_path / "chat.jsonl")
    keys = {"model_name_or_path": str(model), "dataset": "pairs.jsonl", "output_dir": "out", "max_steps": 1}
    write_config(tmp_path / "run.yaml", **keys, stage="dpo", backend="mlx", plot_loss=False)
    return tmp_path


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"dataset={path.name}"


@pytest.mark.parametrize("stage", ["dpo", "foodpo"])
def test_single_answers_in_a_preference_stage(stage, folder):
    assert refused(folder, "dataset=chat.jsonl", f"stage={stage}") == (
        "chat.jsonl: line 1: found the keys messages; a preference stage needs prompt, chosen and rejected; "
        "to train on single answers set stage: sft"
    )


def test_pairs_in_supervised_training(folder):
    assert refused(folder, "stage=sft") == (
        "pairs.jsonl: line 1: found chosen and rejected: these are preference pairs; set stage: dpo"
    )


def test_invalid_rows_are_named_by_file_line_and_key_all_at_once(folder):
    bad = (
        GOOD,
        GOOD | {"prompt": ""},
        GOOD | {"rejected": " "},
        {"prompt": "q", "rejected": "a"},
        GOOD | {"chosen": 3},
    )
    assert refused(folder, write_jsonl(folder / "bad.jsonl", *bad)).split("\n") == [
        "bad.jsonl: 4 problems in preference rows",
        "  line 2: the prompt is empty: it holds no user text and no system text",
        '  line 3: "rejected": the answer is empty',
        '  line 4: no "chosen"; a pair needs chosen and rejected, found prompt, rejected',
        '  line 5: "chosen": found a number, expected a string or a list of messages',
    ]


def test_invalid_rows_of_the_evaluation_are_named_too(folder):
    write_jsonl(folder / "bad.jsonl", GOOD | {"rejected": ""})
    assert refused(folder, "eval_dataset=bad.jsonl").endswith('  line 1: "rejected": the answer is empty')


def test_a_template_that_leaves_the_prompt_no_token(folder):
    write_jsonl(folder / "bad.jsonl", GOOD)
    (folder / "answer.jinja").write_text("{{ messages[-1]['content'] if messages[-1]['role'] == 'assistant' else '' }}")
    message = refused(folder, "dataset=bad.jsonl", "template=answer.jinja")
    assert message.startswith("bad.jsonl:1: the prompt has no token of its own with the template ")
    assert "give a longer prompt or a chat template" in message and "\n" not in message


def test_a_cutoff_below_every_answer(folder):
    assert refused(folder, "cutoff_len=2") == (
        "none of the 10 pairs can be trained on: cutoff_len 2 leaves 10 without an answer on one side and 0 without a "
        "prompt; raise it"
    )


def test_identical_answers_are_kept_with_a_warning(folder):
    data = write_jsonl(folder / "same.jsonl", GOOD, GOOD | {"rejected": GOOD["chosen"]})
    result = macft("train", folder / "run.yaml", data)
    assert result.code == 0, result.err
    assert (
        "warning: 1 of 2 pairs have the same tokens on both sides, so they show no preference (first: same.jsonl:2)"
    ) in result.err
    assert "data: 2 pairs, " in result.err


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["stage=foodpo", "pref_loss=hinge"],
            "stage foodpo combines with pref_loss sigmoid, orpo and simpo, found hinge",
        ),
        (
            ["pref_loss=ipo", "dpo_label_smoothing=0.1"],
            "dpo_label_smoothing is for pref_loss sigmoid and robust, found ipo; remove it",
        ),
        (["pref_loss=orpo", "ref_model=MODEL"], "pref_loss orpo has no reference; remove ref_model"),
        (
            ["stage=foodpo", "pref_loss=simpo"],
            "foodpo_perplexity is reference and pref_loss simpo has none; set policy or policy_with_gradient",
        ),
        (["create_new_adapter=true"], "create_new_adapter needs adapter_name_or_path, the adapter to build on"),
        (
            ["create_new_adapter=true", "adapter_name_or_path=nowhere", "use_dora=true"],
            "create_new_adapter and use_dora are both set; keep one",
        ),
        (["load_best_model_at_end=true"], "load_best_model_at_end needs an evaluation; set eval_dataset or val_size"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_go_together(overrides, problem, folder, model):
    overrides = [override.replace("MODEL", str(model)) for override in overrides]
    assert refused(folder, *overrides, code=2).split("\n") == [
        f"{folder / 'run.yaml'}: 1 problem in the configuration",
        f"  {problem}",
    ]


def test_a_metric_that_no_evaluation_has(folder):
    message = refused(folder, "val_size=2", "early_stopping_steps=1", "metric_for_best_model=margins", code=2)
    assert message.startswith(
        "metric_for_best_model: found eval_margins, expected one of the metrics of this run's evaluation: eval_logps/"
    )


def test_a_reference_that_is_not_there(folder):
    assert refused(folder, "ref_model=nowhere").startswith("model nowhere: not a built-in name")
    assert refused(folder, "ref_model_adapters=nowhere").startswith("adapter nowhere: no such folder")


def test_a_reference_with_another_vocabulary(folder, model):
    other = changed_model(model, folder / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 999, "content": "<|new|>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert refused(folder, f"ref_model={other}", code=2) == (
        f"ref_model: the vocabulary of {other} differs from that of {model}, so its probabilities cannot be compared; "
        "name a model of the same family"
    )


@pytest.fixture
def adapter(folder: Path, model: Path) -> Path:
    train(toy_settings(model, write_rows(folder / "rows.jsonl"), folder / "dora", "torch", use_dora=True, max_steps=1))
    train(toy_settings(model, folder / "rows.jsonl", folder / "lora", "torch", max_steps=1))
    return folder / "lora"


def test_a_new_adapter_on_a_dora_adapter(folder, adapter):
    assert refused(folder, f"adapter_name_or_path={adapter.parent / 'dora'}", "create_new_adapter=true", code=2) == (
        f"create_new_adapter: {adapter.parent / 'dora'} is a DoRA adapter, which cannot be stacked; remove the key to "
        "train it further"
    )


@ENGINES
@pytest.mark.parametrize("how", ["to go on", "below a new one", "as the reference"])
def test_an_adapter_of_another_model(backend, how, folder, adapter):
    other = write_toy_model(folder / "other", hidden_size=32, head_dim=16)
    key = "ref_model_adapters" if how == "as the reference" else "adapter_name_or_path"
    new = ["create_new_adapter=true"] if how == "below a new one" else []
    arguments = [f"model_name_or_path={other}", f"{key}={adapter}", f"backend={backend}", *new]
    message = refused(folder, *arguments)
    assert message.startswith(f"{adapter}: made for {adapter.parents[1]}")
    assert f", on {other}: the adapter does not fit this model: base_model.model.model.layers.0." in message
    assert "has shape [4, 64], the model expects [4, 32]" in message and "\n" not in message


def test_a_start_that_is_not_its_own_reference(folder):
    from safetensors.numpy import load_file, save_file

    assert macft("train", folder / "run.yaml", "output_dir=first").code == 0
    [path] = (folder / "cache" / "reference").iterdir()
    save_file({"columns": load_file(path)["columns"] - [[1.0, 0.0, 0.0]]}, path)
    message = message_of(macft("train", folder / "run.yaml", "save_strategy=epoch"), 1)
    assert "step 1: the sigmoid loss is 0.64439" in message and "must be 0.693147 with rewards 0" in message
    assert "\n" not in message.partition("step 1")[2]
    assert {path.name for path in (folder / "out").iterdir()} == {"config.yaml", "trainer_log.jsonl"}
