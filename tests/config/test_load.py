"""A configuration is read whole or refused in one message; nothing in it is ignored in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from support.commands import CHECKOUT
from support.configs import YAML, from_file, load, problem, refusal

from macft.config import mlx_lm
from macft.config.load import dump_yaml, load_config
from macft.config.names import ALIASES, NO_EFFECT, REFUSED
from macft.config.settings import Settings
from macft.config.translate import TRANSLATIONS
from macft.docs import configuration_page
from macft.errors import ConfigError


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="macft")
    return caplog


def test_an_unknown_key_offers_the_nearest_name():
    assert problem("lora_rnk=4") == "lora_rnk (command line): unknown key; did you mean lora_rank?"
    assert problem("--learning-rte", "1") == "learning_rte (command line): unknown key; did you mean learning_rate?"
    assert problem("zzz=4") == "zzz (command line): unknown key; see docs/configuration.md"


def test_all_problems_come_in_one_message(tmp_path):
    text = "model_name_or_path: m\nlora_rnk: 4\nlora_rank: many\nlearning_rate: .nan\nsave_strategy: never\n"
    assert refusal(tmp_path, text, "seed=x").split("\n") == [
        "DIR/run.yaml: 7 problems in the configuration",
        "  lora_rnk (line 2): unknown key; did you mean lora_rank?",
        "  lora_rank (line 3): found 'many', expected a whole number",
        "  dataset: missing; Files, or names from `dataset_dir` and its `dataset_info.json`, separated by commas.",
        "  learning_rate (line 4): found nan, expected a finite number",
        "  seed (command line): found 'x', expected a whole number",
        "  output_dir: missing; The run folder.",
        "  save_strategy (line 5): found 'never', expected 'no', 'steps' or 'epoch'",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_rank=1.5", "found 1.5, expected a whole number"),
        ("lora_rank=true", "found true, expected a number"),
        ("lora_rank=null", "found null, expected a whole number"),
        ("lora_rank=0", "found 0, expected greater than or equal to 1"),
        ("num_train_epochs=false", "found false, expected a number"),
        ("learning_rate=fast", "found 'fast', expected a number"),
        ("learning_rate=.inf", "found inf, expected a finite number"),
        ("learning_rate=0", "found 0, expected greater than 0"),
        ("bf16=maybe", "found 'maybe', expected true or false"),
        ("quantization_bit=5", "found 5, expected 4 or 8"),
        ("stage=sfp", "found 'sfp', expected 'pt', 'sft', 'dpo', 'foodpo' or 'kto'"),
        ("template=[a]", "found ['a'], expected text (a number or a date in quotes)"),
        ("enable_thinking=null", "found null, expected true, or false to train the form without thinking"),
        ("resume_from_checkpoint=[]", "found [], expected true, false or the path of a checkpoint"),
        ("warmup_ratio=2", "found 2, expected less than or equal to 1"),
        ("disable_gradient_checkpointing=maybe", "found 'maybe', expected true or false"),
        ("model_overrides=48", "found 48, expected keys with values, such as {name: 1}"),
        ("lr_scheduler_kwargs={power: x}", "found 'x', expected a number"),
        ("interleave_probs=[a, 1]", "found 'a', expected a number"),
        ("interleave_probs=0.5", "found 0.5, expected numbers separated by commas"),
        ("save_steps=0.1", "found 0.1, expected a whole number of steps, not a share of them"),
        ("preprocessing_num_workers=0", "found 0, expected greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(override, message):
    assert problem(override) == f"{override.split('=')[0]} (command line): {message}"


def test_a_key_written_twice_is_refused_with_its_line(tmp_path):
    text = f"{YAML}seed: 1\nseed: 2\n"
    assert refusal(tmp_path, text) == "DIR/run.yaml line 5, column 1: the key seed appears twice; keep one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", " line 2, column 2: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", " line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", " line 2, column 1: but found another document"),
        ("[a]: 1\n", " line 1, column 1: found unhashable key"),
        ("a: !!python/name:os.system 1\n", None),
        ("run_name: 2026-13-45\n", ": a value is not what it looks like (month must be in 1..12); put it in quotes"),
        ("- a\n- b\n", ": found a list, expected keys such as model_name_or_path: ..."),
        ("# nothing\n", ": found nothing, expected keys such as model_name_or_path: ..."),
    ],
)
def test_a_problem_of_yaml_is_one_line_with_its_place(tmp_path, text, message):
    found = refusal(tmp_path, text)
    assert "\n" not in found
    if message is None:
        assert found.startswith("DIR/run.yaml line 1, column 4: could not determine a constructor")
    else:
        assert found == f"DIR/run.yaml{message}"


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"run.yaml: not UTF-8 at byte 3; save the file as UTF-8$"):
        load_config(tmp_path / "run.yaml", [])


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "one.yaml").touch()
    (tmp_path / "two.yml").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", [])
    there = f"{tmp_path} holds {tmp_path / 'one.yaml'}, {tmp_path / 'two.yml'}"
    assert str(caught.value) == f"{tmp_path / 'run.yaml'}: no such configuration file; {there}"
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path, [])
    assert str(caught.value) == f"{tmp_path}: a folder, expected a YAML file; {there}"


def test_overrides_have_three_spellings_and_win_over_the_file(tmp_path):
    settings = from_file(tmp_path, f"{YAML}seed: 1\n", "seed=2", "--lora-rank", "4", "--max_steps=-1", "--cutoff_len=9")
    assert (settings.seed, settings.lora_rank, settings.max_steps, settings.cutoff_len) == (2, 4, -1, 9)
    assert load("--max_steps", "-1").max_steps == -1


def test_an_override_by_another_name_wins_over_the_file(tmp_path):
    assert from_file(tmp_path, f"{YAML}cutoff_len: 9\n", "max_length=8").cutoff_len == 8
    assert from_file(tmp_path, f"{YAML}max_length: 9\n", "cutoff_len=8").cutoff_len == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed"], "--seed has no value; write --seed VALUE"),
        (["--seed", "--lora_rank", "8"], "--seed has no value; write --seed VALUE"),
        (["seed"], "'seed' is not an override; write key=value or --key value"),
        (["seed=1", "seed=2"], "seed appears twice on the command line; keep one"),
        (["lora_rank=1", "--lora-rank", "1"], "lora_rank appears twice on the command line; keep one"),
        (["--max_steps", "1", "--max-steps=2"], "max_steps appears twice on the command line; keep one"),
        (
            ["seed=1", "run.yaml"],
            "'run.yaml' is not an override; write key=value or --key value; a configuration file comes first",
        ),
    ],
)
def test_an_override_that_is_none_is_refused(arguments, message):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert str(caught.value) == message


def test_a_float_without_a_dot_is_a_number(tmp_path):
    assert yaml.safe_load("1e-4") == "1e-4", "PyYAML reads text here: that is why this is tested"
    assert load("train_from_scratch=true", "finetuning_type=full", "model_overrides={eps: 1e-6}").model_overrides == {
        "eps": 1e-6
    }
    assert load("learning_rate=1e-4").learning_rate == 1e-4
    assert from_file(tmp_path, f"{YAML}learning_rate: 1e-4\n").learning_rate == 1e-4


@pytest.mark.parametrize("text", ["2024", "1.10", "#1", "2026-11-21", "2026-13-45", "a: b", "[x"])
def test_text_on_the_command_line_needs_no_quotes(text):
    assert load(f"run_name={text}").run_name == text


def test_no_and_null_mean_what_they_say(tmp_path):
    text = f"{YAML}eval_strategy: no\nsave_strategy: no\nreport_to: no\nresume_from_checkpoint: null\neval_dataset:\n"
    settings = from_file(tmp_path, text)
    assert (settings.eval_strategy, settings.save_strategy, settings.report_to) == ("no", "no", "none")
    assert settings.resume_from_checkpoint is False and settings.eval_dataset is None
    assert load("report_to=null").report_to == load("report_to=none").report_to == "none"


def test_lists_are_joined():
    lists = ["lora_target=[q_proj, v_proj]", "report_to=[wandb]", "dataset=[a.jsonl, b.json]"]
    settings = load_config(None, ["model_name_or_path=m", "output_dir=o", *lists])
    assert (settings.lora_target, settings.report_to, settings.dataset) == ("q_proj,v_proj", "wandb", "a.jsonl,b.json")


@pytest.mark.parametrize("order", [("max_length", "cutoff_len"), ("cutoff_len", "max_length")])
def test_two_names_of_one_key_are_refused(order):
    first, second = order
    message = f"{second} (command line): means the same as {first}; keep one"
    assert problem(f"{first}=8", f"{second}=9") == message


def test_keys_that_this_run_does_not_look_at_are_said_once(warnings):
    load("finetuning_type=full", "lora_rank=4", "save_strategy=epoch", "save_steps=10")
    assert [record.getMessage() for record in warnings.records] == [
        "no effect here: lora_rank (finetuning_type is full); save_steps (save_strategy is epoch)"
    ]


CONTRADICTIONS = [
    (["bf16=true", "fp16=true"], "bf16 and fp16 are both set; keep one"),
    (["train_on_prompt=true", "mask_history=true"], "train_on_prompt and mask_history are both set; keep one"),
    (["eval_dataset=e", "val_size=0.1"], "eval_dataset and val_size are both set; keep one"),
    (["eval_strategy=steps"], "eval_strategy steps needs eval_dataset or val_size"),
    (["eval_strategy=no", "eval_dataset=e"], "eval_dataset is set but eval_strategy is no; remove one"),
    (["eval_steps=3", "val_size=0.1"], "eval_steps needs eval_strategy steps"),
    (["eval_steps=3", "val_size=0.1", "eval_strategy=epoch"], "eval_steps needs eval_strategy steps"),
    (
        ["finetuning_type=full", "quantization_bit=4"],
        "finetuning_type full cannot train a quantized base; remove quantization_bit",
    ),
    (["finetuning_type=full", "adapter_name_or_path=a"], "adapter_name_or_path needs finetuning_type lora"),
    (["finetuning_type=full", "use_dora=true"], "use_dora and use_rslora need finetuning_type lora"),
    (
        ["overwrite_output_dir=true", "resume_from_checkpoint=true"],
        "overwrite_output_dir and resume_from_checkpoint are both set; keep one",
    ),
    (["max_steps=0"], "max_steps 0: expected -1 or above 0"),
    *(
        (
            ["lr_scheduler_type=constant", warmup],
            "lr_scheduler_type constant has no warmup; write constant_with_warmup, "
            "or remove warmup_ratio and warmup_steps",
        )
        for warmup in ("warmup_ratio=0.1", "warmup_steps=5")
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_keys_that_exclude_each_other_are_refused(overrides, message):
    assert problem(*overrides) == message


def test_contradictions_come_with_the_problems_of_single_values():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["dataset=d", "output_dir=o", "seed=x", "lora_rnk=1", "bf16=true", "fp16=true"])
    assert str(caught.value).split("\n") == [
        "4 problems in the configuration",
        "  lora_rnk (command line): unknown key; did you mean lora_rank?",
        "  model_name_or_path: missing; `smollm2-135m`, a hub id, a local folder (HF or MLX layout) or a `.gguf` file.",
        "  seed (command line): found 'x', expected a whole number",
        "  bf16 and fp16 are both set; keep one",
    ]


def test_one_of_two_excluding_keys_is_fine():
    for overrides, _ in CONTRADICTIONS:
        if len(overrides) == 2 and overrides[0] not in ("eval_strategy=no", "eval_steps=3"):
            load(overrides[0])
    load("lr_scheduler_type=constant_with_warmup", "warmup_steps=5")
    load("eval_strategy=steps", "eval_steps=3", "val_size=0.1")


# LLaMA-Factory's defaults (its hparams and transformers' TrainingArguments); None: no default
LLAMA_FACTORY = {
    "adapter_name_or_path": None,
    "quantization_bit": None,
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_alpha": None,  # 2 x rank
    "lora_dropout": 0.0,
    "lora_target": "all",
    "use_rslora": False,
    "use_dora": False,
    "eval_dataset": None,
    "dataset_dir": "data",
    "template": None,
    "cutoff_len": 2048,
    "max_samples": None,
    "val_size": 0.0,
    "train_on_prompt": False,
    "mask_history": False,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "fp16": False,
    "seed": 42,
    "data_seed": None,
    "eval_steps": None,
    "per_device_eval_batch_size": 8,
    "overwrite_output_dir": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "save_only_model": False,
    "report_to": "none",
    "run_name": None,
    "create_new_adapter": False,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "pref_ftx": 0.0,
    "dpo_label_smoothing": 0.0,
    "simpo_gamma": 0.5,
    "ld_alpha": None,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "ref_model": None,
    "ref_model_adapters": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "early_stopping_steps": None,
    "train_from_scratch": False,
    "mix_strategy": "concat",
    "interleave_probs": None,
    "default_system": None,
    "enable_thinking": True,
    "packing": None,
    "streaming": False,
    "buffer_size": 16384,
    "overwrite_cache": False,
    "preprocessing_num_workers": None,
    "disable_shuffling": False,
}
# key -> (macft's default, LLaMA-Factory's, words of the description that say so)
OTHER_DEFAULTS = {
    "gradient_checkpointing": (False, True, "LLaMA-Factory's default is on"),
    "logging_steps": (10, 500, "LLaMA-Factory's 500"),
    "plot_loss": (True, False, "LLaMA-Factory's default is off"),
    "group_by_length": (True, False, "LLaMA-Factory's default is off"),
    "bf16": (None, False, "Default: yes on Metal and on CUDA devices that have it"),
    "eval_strategy": (None, "no", "Default: each epoch if there is evaluation data, else `no`"),
    "resume_from_checkpoint": (False, None, "`true`"),
}


def test_defaults_are_llama_factorys_or_say_that_they_are_not():
    own = {"backend": "auto", "pref_beta_scale": 0.5, "foodpo_perplexity": "reference"}
    own |= {"foodpo_beta_min": None, "foodpo_beta_max": None, "tokenizer_name_or_path": None, "hub": "hf"}
    own |= {"model_overrides": {}, "lr_scheduler_kwargs": {}}
    defaults = {key: f.default for key, f in Settings.model_fields.items() if not f.is_required()}
    expected = LLAMA_FACTORY | own | {key: ours for key, (ours, _, _) in OTHER_DEFAULTS.items()}
    assert defaults == expected
    for key, (ours, theirs, words) in OTHER_DEFAULTS.items():
        assert ours != theirs and words in str(Settings.model_fields[key].description)
    assert load().alpha == 16 and load("lora_rank=4").alpha == 8 and load("lora_alpha=5").alpha == 5


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_load_without_a_warning(path, warnings, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    settings = load_config(path, [])
    if not path.name.startswith("seed_"):  # those ask for a data set of the user's
        assert all(Path(name).is_file() for name in settings.dataset.split(","))
    assert not warnings.records


def test_the_page_of_keys_is_up_to_date():
    page = (CHECKOUT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m macft.docs > docs/configuration.md"
    assert all(f"| `{key}` |" in page for key in [*Settings.model_fields, *ALIASES, *NO_EFFECT, *REFUSED])
    assert all(f"| `{key}` |" in page for key in [*TRANSLATIONS, *mlx_lm.TABLE])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_resolved_configuration_reads_back_the_same(method, tmp_path, warnings):
    text = "model_name_or_path: m\noutput_dir: o\ndataset: 数据.jsonl\n"
    settings = from_file(tmp_path, text, f"finetuning_type={method}", "run_name=2024", "learning_rate=1e-5")
    again = from_file(tmp_path, dump_yaml(settings))
    assert again.model_dump(exclude={"lora_alpha"}) == settings.model_dump(exclude={"lora_alpha"})
    assert again.alpha == settings.alpha
    assert not warnings.records
    assert dump_yaml(again) == dump_yaml(settings)
