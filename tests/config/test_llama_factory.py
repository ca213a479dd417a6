"""Every text LoRA example of LLaMA-Factory, written again: what it means here, and what is said about it."""

from __future__ import annotations

import logging

import pytest
from support.paths import FIXTURES

from macft.config.load import load, load_config
from macft.config.settings import Settings
from macft.errors import ConfigError

FOLDER = FIXTURES / "llamafactory"

REMOTE = "trust_remote_code"
LOADER = "dataloader_num_workers"
TIMEOUT = "ddp_timeout"
WORKER = (REMOTE, LOADER, TIMEOUT)

# what the examples have in common, key by key; all else is at its default
COMMON = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/qwen3-4b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
}
LLAMA = COMMON | {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "template": "llama3",
    "output_dir": "saves/llama3-8b/lora/sft",
}
TRAINING = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "bf16")
TRAINING += ("per_device_train_batch_size", "gradient_accumulation_steps")


def without(settings: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in keys}


# file -> (settings, keys that are said to have no effect)
GOLDEN = {
    "sft": (COMMON, WORKER),
    "sft_deepspeed": (COMMON | {"gradient_accumulation_steps": 2}, (REMOTE, "deepspeed", LOADER, TIMEOUT)),
    "sft_ray": (
        COMMON | {"dataset_dir": "REMOTE:llamafactory/demo_data", "output_dir": "tmp_dir"},
        (*WORKER, "ray_num_workers"),
    ),
    "sft_tokenized": (without(COMMON, *TRAINING), (REMOTE, "tokenized_path")),
    "pretrain": (
        without(COMMON, "template")
        | {"stage": "pt", "dataset": "c4_demo", "output_dir": "saves/qwen3-4b/lora/pretrain"},
        WORKER,
    ),
    "dpo": (
        COMMON
        | {"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo"}
        | {"learning_rate": 5e-6, "output_dir": "saves/qwen3-4b/lora/dpo"},
        WORKER,
    ),
    "kto": (
        COMMON
        | {"stage": "kto", "dataset": "kto_en_demo", "learning_rate": 5e-6, "output_dir": "saves/qwen3-4b/lora/kto"},
        WORKER,
    ),
    "qlora": (COMMON | {"quantization_bit": 4}, WORKER),
    "qlora_npu": (COMMON | {"quantization_bit": 4}, WORKER),
    "qlora_fsdp": (LLAMA | {"quantization_bit": 4, "overwrite_cache": True}, WORKER),
    "qlora_gptq": (LLAMA | {"model_name_or_path": "TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ"}, WORKER),
    "qlora_awq": (LLAMA | {"model_name_or_path": "TechxGenus/Meta-Llama-3-8B-Instruct-AWQ"}, WORKER),
    "qlora_aqlm": (LLAMA | {"model_name_or_path": "ISTA-DASLab/Meta-Llama-3-8B-Instruct-AQLM-2Bit-1x16"}, WORKER),
    "older_sft": (
        without(LLAMA, "bf16")
        | {"cutoff_len": 1024, "overwrite_cache": True, "fp16": True, "val_size": 0.1}
        | {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500},
        ("optim",),
    ),
    "foodpo": (
        {"model_name_or_path": "Qwen/Qwen1.5-0.5B", "stage": "foodpo", "finetuning_type": "lora", "lora_rank": 8}
        | {"lora_alpha": 16.0, "lora_dropout": 0.05, "pref_beta": 0.1, "pref_beta_scale": 0.5, "cutoff_len": 1024}
        | {"dataset": "dpo_zh_demo", "eval_dataset": "dpo_zh_demo", "dataset_dir": "data", "template": "default"}
        | {"max_samples": 20, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        | {"gradient_accumulation_steps": 2, "learning_rate": 5e-5, "num_train_epochs": 1.0, "warmup_ratio": 0.03}
        | {"output_dir": "output/foodpo", "logging_steps": 5, "save_steps": 20, "save_total_limit": 1},
        ("use_mps_device",),
    ),
}
WARNINGS = {
    "kto": [
        "per_device_train_batch_size 1: the KL term of KTO then rests on one answer; set 4 or more, and lower "
        "gradient_accumulation_steps"
    ]
}
REFUSED = {
    "reward": "stage (line 8): rm is not supported; reward models are not trained",
    "loraplus": "loraplus_lr_ratio (line 13): 16.0 is not supported; adapter and layers have one learning rate",
    "pissa": "pissa_init (line 13): true is not supported; an adapter starts as LoRA's authors say: A random, B zero",
}


def test_every_example_is_in_one_of_the_tables():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*GOLDEN, *REFUSED}


@pytest.mark.parametrize("name", GOLDEN)
def test_an_example_means_what_the_table_says(name):
    expected, without_effect = GOLDEN[name]
    defaults = {key: field.default for key, field in Settings.model_fields.items() if not field.is_required()}
    loaded = load(FOLDER / f"{name}.yaml", [])
    assert loaded.settings.model_dump() == defaults | expected
    assert tuple(loaded.unused) == without_effect
    assert loaded.warnings == WARNINGS.get(name, []) and loaded.notes == []


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_that_would_train_something_else_is_refused_with_the_reason(name):
    path = FOLDER / f"{name}.yaml"
    with pytest.raises(ConfigError) as caught:
        load(path, [])
    assert str(caught.value) == f"{path}: 1 problem in the configuration\n  {REFUSED[name]}"


def test_pre_training_is_packed_and_the_rest_is_not():
    packed = {name: load(FOLDER / f"{name}.yaml", []).settings.is_packed for name in GOLDEN}
    assert [name for name, is_packed in packed.items() if is_packed] == ["pretrain"]


def test_the_shell_example_gives_the_same_run_as_the_file():
    words = (
        "--model_name_or_path Qwen/Qwen3-4B-Instruct-2507 --trust_remote_code --stage sft --do_train "
        "--finetuning_type lora --lora_rank 8 --lora_target all --dataset identity,alpaca_en_demo "
        "--template qwen3_nothink --cutoff_len 2048 --max_samples 1000 --preprocessing_num_workers 16 "
        "--dataloader_num_workers 4 --output_dir saves/qwen3-4b/lora/sft --logging_steps 10 --save_steps 500 "
        "--plot_loss --overwrite_output_dir --save_only_model false --report_to none "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 1e-4 "
        "--num_train_epochs 3.0 --lr_scheduler_type cosine --warmup_ratio 0.1 --bf16 --ddp_timeout 180000000"
    )
    assert load(None, words.split()).settings == load(FOLDER / "sft.yaml", []).settings


def test_what_has_no_effect_is_said_in_one_warning_with_the_reasons(caplog):
    caplog.set_level(logging.INFO, logger="macft")
    load_config(FOLDER / "sft_ray.yaml", [])
    assert [record.getMessage() for record in caplog.records] == [
        "no effect here: trust_remote_code (code from a model repository is never run); dataloader_num_workers "
        "(batches are made in the training process); ddp_timeout (one process trains); ray_num_workers "
        "(one process trains: a step holds the examples of one worker, not of all)"
    ]
