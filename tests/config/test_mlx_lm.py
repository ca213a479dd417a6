"""A LoRA file of mlx-lm gives the run that mlx-lm would make, and differences are reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from macft.config.load import load, load_config
from macft.config.mlx_lm import DEFAULTS, TABLE
from macft.errors import ConfigError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of mlx-lm."""
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "lora.yaml"
    path.write_text(f"model: m\ndata: {folder}\n{text}", encoding="utf-8")
    return path


def notes(path: Path, *overrides: str) -> list[str]:
    return load(path, overrides).notes


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    headline, *problems = str(caught.value).split("\n")
    assert headline.endswith(": 1 problem in the configuration") and len(problems) == 1, problems
    return problems[0].strip()


WHOLE = """train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6, bias_correction: true}
seed: 3
num_layers: -1
batch_size: 2
iters: 100
val_batches: -1
learning_rate: 2e-5
steps_per_report: 5
steps_per_eval: 50
adapter_path: adapters/a
save_every: 25
max_seq_length: 512
grad_checkpoint: true
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 4
  scale: 10.0
  dropout: 0.1
mask_prompt: true
lr_schedule:
  name: cosine_decay
  warmup: 20
  arguments: [2e-5, 80, 1e-7]
"""


def test_every_key_is_translated(folder):
    loaded = load(write(folder, WHOLE), [])
    written = {key: getattr(loaded.settings, key) for key in loaded.entries}
    assert written == {
        "model_name_or_path": "m",
        "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "valid.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 50,
        "mask_history": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 40.0,
        "lora_dropout": 0.1,
        "lora_target": "self_attn.q_proj,self_attn.v_proj",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 100,
        "gradient_checkpointing": True,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-7},
        "warmup_steps": 20,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "seed": 3,
        "output_dir": "adapters/a",
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 25,
        "cutoff_len": 512,
    }
    assert loaded.warnings == [] and loaded.unused == {}
    assert loaded.notes == [
        f"{folder / 'lora.yaml'}: a configuration of mlx-lm",
        "lora_alpha is 40: scale 10 x rank 4",
        "pad tokens are not trained on; mlx-lm's loss counts one per row",
        "rows longer than max_seq_length lose user text first; mlx-lm cuts their end",
        "the adapter is written in PEFT's layout; macft convert adapter --to mlx makes it mlx-lm's",
    ]


def test_what_is_left_out_has_the_default_of_mlx_lm(folder):
    loaded = load(write(folder, "iters: null\nlora_parameters: null\n"), [])
    settings = loaded.settings
    found = settings.max_steps, settings.learning_rate, settings.seed, settings.lora_rank, settings.alpha
    assert found == (1000, 1e-5, 0, 8, 160.0)
    found = settings.per_device_train_batch_size, settings.lr_scheduler_type, settings.save_steps, settings.output_dir
    assert found == (4, "constant", 100, "adapters")
    assert settings.train_on_prompt and settings.weight_decay == 0 and settings.max_grad_norm == 0
    assert loaded.entries["learning_rate"].origin == "mlx-lm's default"
    assert loaded.warnings == [
        "num_layers, by mlx-lm's default, is 16: theirs trains the last 16 layers; here the adapter is on all layers"
    ]
    assert "mask_prompt is false: every token is trained on, the prompt and the template too" in loaded.notes
    assert "adam corrects its moments for their start at 0 (bias_correction): its first steps differ" in loaded.notes


def test_the_defaults_are_those_of_the_installed_mlx_lm(monkeypatch):
    # mlx-lm teaches PyYAML's own loader to read 1e-4 as a number: it must forget that again
    resolvers = {first: list(pairs) for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    monkeypatch.setattr(yaml.SafeLoader, "yaml_implicit_resolvers", resolvers)
    lora = pytest.importorskip("mlx_lm.lora")
    theirs = {key: value for key, value in lora.CONFIG_DEFAULTS.items() if key in DEFAULTS}
    own = {**DEFAULTS, "optimizer_config": theirs["optimizer_config"], "train": False, "test_batches": 500}
    assert theirs == {key: own[key] for key in theirs} | {"data": theirs["data"]}
    others = {"model", "learning_rate", "seed", "max_seq_length", "report_to", "project_name", "trust_remote_code"}
    assert set(lora.CONFIG_DEFAULTS) - set(DEFAULTS) == others | {"config"}
    assert lora.CONFIG_DEFAULTS["learning_rate"] == 1e-5 and lora.CONFIG_DEFAULTS["seed"] == 0
    assert set(TABLE) <= set(lora.CONFIG_DEFAULTS)


def test_iterations_are_batches(folder):
    loaded = load(write(folder, "iters: 100\ngrad_accumulation_steps: 4\nsteps_per_report: 10\nsave_every: 2\n"), [])
    settings = loaded.settings
    assert (settings.max_steps, settings.gradient_accumulation_steps) == (25, 4)
    assert (settings.logging_steps, settings.eval_steps, settings.save_steps) == (2, 50, 1)
    assert (
        "iters are batches: 100 of them are 25 optimizer steps, and so with steps_per_report, steps_per_eval and "
        "save_every"
    ) in loaded.notes


def test_rows_of_text_make_it_pre_training(folder):
    (folder / "train.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    settings = load_config(write(folder, "iters: 5\n"), [])
    assert settings.stage == "pt" and not settings.is_packed and not settings.train_on_prompt
    assert problem(write(folder, "mask_prompt: true\n")) == (
        "mask_prompt (line 3): found true, expected false: rows of text have no prompt"
    )


def test_without_a_validation_set_nothing_is_evaluated(folder):
    (folder / "valid.jsonl").unlink()
    settings = load_config(write(folder, "iters: 5\nsteps_per_eval: 2\n"), [])
    assert settings.eval_dataset is None and settings.when_to_evaluate == "no"


def test_a_name_that_is_no_folder_is_a_data_set(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("model: m\ndata: mlx-community/wikisql\niters: 5\n", encoding="utf-8")
    settings = load_config(path, [])
    assert settings.dataset == "mlx-community/wikisql" and settings.train_on_prompt


def test_kinds_of_training(folder):
    dora = load_config(write(folder, "fine_tune_type: dora\n"), [])
    assert dora.use_dora and dora.finetuning_type == "lora"
    full = load(write(folder, "fine_tune_type: full\nnum_layers: 4\n"), [])
    assert full.settings.finetuning_type == "full" and "lora_rank" not in full.entries
    assert full.warnings == ["num_layers is 4: theirs trains the last 4 layers; here all layers are trained"]


def test_courses_of_the_learning_rate(folder):
    def course(text: str) -> tuple[object, ...]:
        settings = load_config(write(folder, f"iters: 100\nlr_schedule: {text}\n"), [])
        return settings.lr_scheduler_type, settings.learning_rate, settings.lr_scheduler_kwargs, settings.warmup_steps

    assert course("{name: cosine_decay, arguments: [1e-4, 100]}") == ("cosine", 1e-4, {}, 0)
    assert course("{name: linear_schedule, warmup: 5, arguments: [1e-4, 0, 95]}") == ("linear", 1e-4, {}, 5)
    polynomial = {"lr_end": 1e-6, "power": 1.0}
    assert course("{name: linear_schedule, arguments: [1e-4, 1e-6, 100]}") == ("polynomial", 1e-4, polynomial, 0)
    said = notes(write(folder, "iters: 100\nlr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-4, 500]}\n"))
    assert "the learning rate falls until the last step, 100; by lr_schedule until step 510" in said


def test_the_command_line_overrides_by_either_name(folder):
    path = write(folder, "iters: 100\nlora_parameters: {rank: 4, scale: 2.0}\n")
    settings = load_config(path, ["--iters", "7", "--grad-checkpoint", "lora_rank=16", "--output-dir", "o", "seed=9"])
    assert (settings.max_steps, settings.lora_rank, settings.output_dir, settings.seed) == (7, 16, "o", 9)
    assert settings.gradient_checkpointing and settings.alpha == 8.0
    alone = load_config(None, ["--model", "m", "--train", "--data", str(folder), "--iters", "7", "--mask-prompt"])
    assert alone.max_steps == 7 and alone.mask_history and alone.dataset == str(folder / "train.jsonl")


def test_an_adapter_is_resumed_by_its_folder(folder):
    path = write(folder, "iters: 5\nresume_adapter_file: old/adapters.safetensors\n")
    assert load_config(path, []).adapter_name_or_path == "old"
    assert problem(path, "resume_adapter_file=old/0000100_adapters.safetensors") == (
        "resume_adapter_file (command line): found 'old/0000100_adapters.safetensors', expected a file "
        "adapters.safetensors beside its adapter_config.json"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: muon", "optimizer (line 4): found 'muon', expected adam or adamw"),
        ("fine_tune_type: oft", "fine_tune_type (line 4): found 'oft', expected lora, dora or full"),
        (
            "lora_parameters: {rank: 8, alpha: 16}",
            "lora_parameters (line 4): found {'rank': 8, 'alpha': 16}, expected rank and scale, and perhaps dropout "
            "and keys",
        ),
        ("batch_size: many", "batch_size (line 4): found 'many', expected a whole number"),
        ("train: false", "train (line 4): found false, expected true: macft train trains"),
        (
            "lr_schedule: {name: step_decay, arguments: [1, 2, 3]}",
            "lr_schedule (line 4): found {'name': 'step_decay', 'arguments': [1, 2, 3]}, expected cosine_decay or "
            "linear_schedule with its numbers, and a rate that falls",
        ),
        (
            "optimizer_config: {adam: {beta: 1}}",
            "optimizer_config (line 4): found {'adam': {'beta': 1}}, expected adam: with betas, eps, weight_decay or "
            "bias_correction",
        ),
        ("iterations: 4", "iterations (line 4): unknown key; see docs/configuration.md"),
        (
            "lora_parameters: {rank: 8, scale: 1.0, dropout: 2}",
            "lora_parameters.dropout (line 4): found 2, expected less than 1",
        ),
    ],
)
def test_what_cannot_be_translated_is_refused_with_its_line(folder, text, message):
    assert problem(write(folder, f"iters: 5\n{text}\n")) == message


def test_a_folder_without_training_data_is_refused(folder):
    (folder / "train.jsonl").unlink()
    assert problem(write(folder, "iters: 5\n")) == (
        f"data (line 2): found {str(folder)!r}, expected a folder that holds train.jsonl"
    )


def test_what_has_no_effect_is_named(folder, caplog):
    caplog.set_level(logging.WARNING, logger="macft")
    load_config(write(folder, "iters: 5\nnum_layers: -1\nval_batches: 10\ntest: true\n"), [])
    assert [record.getMessage() for record in caplog.records] == [
        "no effect here: val_batches (the whole validation set is evaluated); test (test.jsonl is not evaluated)"
    ]
