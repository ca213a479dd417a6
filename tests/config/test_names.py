"""Keys of other programs: translated, without effect here, or refused with the reason."""

from __future__ import annotations

import logging

import pytest
from support.configs import YAML, from_file, load, problem, refusal

from macft.config.load import load as load_whole
from macft.config.load import load_config, overridden_keys
from macft.config.names import ALIASES, NO_EFFECT, REFUSED, REFUSED_VALUES
from macft.config.settings import Settings
from macft.config.translate import TRANSLATIONS


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """The messages so far."""
    caplog.set_level(logging.INFO, logger="macft")
    return lambda: [record.getMessage() for record in caplog.records]


# (written, macft's key, its value, what else must be set)
SAME = [
    ("evaluation_strategy=epoch", "eval_strategy", "epoch", ["val_size=0.1"]),
    ("max_length=77", "cutoff_len", 77, []),
    ("max_seq_length=77", "cutoff_len", 77, []),
    ("block_size=77", "cutoff_len", 77, ["stage=pt"]),
    ("beta=0.3", "pref_beta", 0.3, ["stage=dpo"]),
    ("dpo_ftx=1.0", "pref_ftx", 1.0, ["stage=dpo"]),
    ("label_smoothing=0.2", "dpo_label_smoothing", 0.2, ["stage=dpo"]),
    ("loss_type=ipo", "pref_loss", "ipo", ["stage=dpo"]),
    ("loss_type=[hinge]", "pref_loss", "hinge", ["stage=dpo"]),
    ("loss_type=nll", "pref_loss", "sigmoid", []),
    ("rlhf_type=dpo", "stage", "dpo", []),
    ("rlhf_type=kto", "stage", "kto", []),
    ("loss_type=kto", "pref_loss", "sigmoid", ["stage=kto"]),
    ("desirable_weight=0.5", "kto_chosen_weight", 0.5, ["stage=kto"]),
    ("undesirable_weight=0.5", "kto_rejected_weight", 0.5, ["stage=kto"]),
    ("kto_beta=0.3", "pref_beta", 0.3, ["stage=kto"]),
    ("kto_ftx=0.3", "pref_ftx", 0.3, ["stage=kto"]),
    ("lora_r=4", "lora_rank", 4, []),
    ("lora_target_modules=all-linear", "lora_target", "all", []),
    ("lora_target_modules=[q_proj, v_proj]", "lora_target", "q_proj,v_proj", []),
    ("target_modules=q_proj,v_proj", "lora_target", "q_proj,v_proj", []),
    ("lora_target=all-linear", "lora_target", "all", []),
    ("use_peft=true", "finetuning_type", "lora", []),
    ("use_peft=false", "finetuning_type", "full", []),
    ("load_in_4bit=true", "quantization_bit", 4, []),
    ("load_in_8bit=true", "quantization_bit", 8, []),
    ("load_in_8bit=false", "quantization_bit", None, []),
    ("chat_template_path=chat.jinja", "template", "chat.jinja", []),
    ("dataset_num_proc=3", "preprocessing_num_workers", 3, []),
    ("dataset_streaming=true", "streaming", True, ["max_steps=5"]),
    ("tokenizer=t", "tokenizer_name_or_path", "t", []),
    ("disable_gradient_checkpointing=false", "gradient_checkpointing", True, []),
    ("disable_gradient_checkpointing=true", "gradient_checkpointing", False, []),
    ("activation_checkpointing=true", "gradient_checkpointing", True, []),
    ("warmup_steps=0.1", "warmup_ratio", 0.1, []),
    ("warmup_steps=7", "warmup_steps", 7, []),
    ("neat_packing=true", "packing", True, []),
    ("neat_packing=false", "packing", None, []),
    ("train_sampling_strategy=random", "group_by_length", False, []),
    ("train_sampling_strategy=group_by_length", "group_by_length", True, []),
    ("train_sampling_strategy=sequential", "disable_shuffling", True, []),
    ("use_swanlab=true", "report_to", "swanlab", []),
    ("use_swanlab=false", "report_to", "none", []),
    ("split_dataset_ratio=0.2", "val_size", 0.2, []),
    ("early_stopping_patience=2", "early_stopping_steps", 2, ["val_size=2"]),
    ("interleave_probs=0.7,0.3", "interleave_probs", [0.7, 0.3], ["mix_strategy=interleave_over", "dataset=a,b"]),
    ("system=Be brief.", "default_system", "Be brief.", []),
]


@pytest.mark.parametrize(("written", "key", "value", "others"), SAME, ids=[case[0] for case in SAME])
def test_another_name_sets_the_same_key(written, key, value, others, said):
    required = [name for name in ("model_name_or_path=m", "dataset=d", "output_dir=o") if not overlap(name, others)]
    assert getattr(load_config(None, [*required, *others, written]), key) == value
    assert said() == []


def overlap(name: str, others: list[str]) -> bool:
    return name.split("=")[0] in {other.split("=")[0] for other in others}


def test_names_of_required_keys():
    settings = load_config(None, ["model=m", "dataset_name=x.json", "output_dir=o"])
    assert (settings.model_name_or_path, settings.dataset) == ("m", "x.json")
    assert load_config(None, ["model=m", "train_dataset=x.json", "output_dir=o"]).dataset == "x.json"
    assert overridden_keys(["train_dataset=x", "--lora-r", "4", "--use_peft"]) == {
        "dataset",
        "lora_rank",
        "finetuning_type",
    }


def test_every_other_name_is_of_a_key_and_no_key_has_two_meanings():
    tables = [set(Settings.model_fields) - set(TRANSLATIONS), set(ALIASES), set(TRANSLATIONS)]
    tables += [set(NO_EFFECT), set(REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(ALIASES.values()) <= set(Settings.model_fields)
    assert {key for key, _ in REFUSED_VALUES} <= set(Settings.model_fields)


@pytest.mark.parametrize("order", [("max_length", "cutoff_len"), ("cutoff_len", "max_length")])
def test_two_names_of_one_key_are_refused(order):
    first, second = order
    message = f"{second} (command line): means the same as {first}; keep one"
    assert problem(f"{first}=8", f"{second}=9") == message
    assert load(f"{first}=8", f"{second}=8").cutoff_len == 8


def test_packing_and_neat_packing_go_together_and_what_packing_is_is_said_once(tmp_path, said):
    assert from_file(tmp_path, f"{YAML}packing: true\nneat_packing: true\n").is_packed
    assert problem("packing=false", "neat_packing=true") == (
        "neat_packing (command line): means the same as packing; keep one"
    )
    said_of_packing = (
        "packing is block-diagonal: packed examples do not see each other, as with neat_packing of LLaMA-Factory"
    )
    assert said() == []
    assert load("packing=true").is_packed
    assert said() == [said_of_packing]
    assert not load("packing=false").is_packed and not load().is_packed
    assert said() == [said_of_packing]


def test_a_tracker_of_its_own_switch_joins_the_others():
    assert load("use_swanlab=true", "report_to=[wandb]").report_to == "wandb,swanlab"
    assert load("use_swanlab=true", "report_to=swanlab").report_to == "swanlab"
    assert load("use_swanlab=true", "report_to=none").report_to == "swanlab"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("neat_packing=perhaps", "found 'perhaps', expected true or false"),
        ("train_sampling_strategy=weighted", "found 'weighted', expected random, group_by_length or sequential"),
        (
            "loss_type=[sigmoid, sft]",
            "found ['sigmoid', 'sft'], expected one loss; the chosen answer's own loss is added by pref_ftx",
        ),
        ("beta=x", "found 'x', expected a number"),
        ("lora_r=0", "found 0, expected greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_shown_under_the_name_that_was_written(override, message):
    assert problem(override) == f"{override.split('=')[0]} (command line): {message}"


def test_a_loss_of_single_answers_is_none_of_pairs():
    assert problem("stage=dpo", "loss_type=nll").startswith("loss_type (command line): found 'nll', expected 'sigmoid'")


# (written, reason)
REFUSALS = [
    ("resize_vocab=true", "true is not supported; vocabulary and embeddings stay as they are"),
    ("pissa_init=true", "true is not supported; an adapter starts as LoRA's authors say: A random, B zero"),
    ("use_galore=true", "true is not supported; macft trains with AdamW"),
    ("optim=adafactor", "'adafactor' is not supported; macft trains with AdamW"),
    ("finetuning_type=freeze", "freeze is not supported; macft trains an adapter or every parameter"),
    ("finetuning_type=oft", "oft is not supported; macft's adapter is LoRA"),
    (
        "stage=ppo",
        "ppo is not supported; macft learns from pairs (dpo) or rated answers (kto), not from a reward model",
    ),
    ("rlhf_type=orpo", "orpo is not supported; write stage: dpo with pref_loss: orpo"),
    (
        "quantization_method=gptq",
        "'gptq' is not supported; quantize with quantization_bit, or name a model in MLX's quantized layout",
    ),
    ("rope_scaling=linear", "'linear' is not supported; rotary embeddings stay as config.json says"),
    ("neftune_noise_alpha=5", "5 is not supported; the loss has no such term"),
    ("pref_bco_weight=1", "1 is not supported; the loss has no such term"),
    ("rpo_alpha=1", "1 is not supported; write pref_ftx, the weight of the chosen answer's own loss"),
    ("sync_ref_model=true", "true is not supported; the reference is fixed and is loaded as the policy is"),
    ("ref_model_quantization_bit=4", "4 is not supported; the reference is fixed and is loaded as the policy is"),
    ("disable_dropout=false", "false is not supported; preference training has no dropout"),
    ("pure_bf16=true", "true is not supported; adapter and optimizer state stay float32; write bf16: true"),
    ("model_revision=v2", "'v2' is not supported; download that revision and write its folder"),
    ("do_train=false", "false is not supported; macft train trains"),
    ("ignore_pad_token_for_loss=false", "false is not supported; padding is never trained on"),
]


@pytest.mark.parametrize(("override", "reason"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_what_would_change_the_result_is_refused_with_the_reason(override, reason):
    assert problem(override) == f"{override.split('=')[0]} (command line): {reason}"


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_that_asks_for_nothing_is_accepted_in_silence(key, said):
    load(f"{key}=null")
    if key not in ("do_train", "ignore_pad_token_for_loss", "disable_dropout"):
        load(f"{key}=false")
    assert said() == []


@pytest.mark.parametrize("key", NO_EFFECT)
def test_a_key_without_effect_is_named_with_its_reason(key, said):
    load(f"{key}=something")
    load(f"{key}=null")
    assert said() == [f"no effect here: {key} ({NO_EFFECT[key]})"]


@pytest.mark.parametrize(
    "override",
    [
        "do_train=true",
        "trust_remote_code=false",
        "use_unsloth=false",
        "dataloader_num_workers=0",
        "deepspeed=null",
        "use_fast_tokenizer=true",
        "save_safetensors=true",
        "optim=adamw_torch",
        "quantization_method=bnb",
        "double_quantization=false",
        "flash_attn=auto",
        "ignore_pad_token_for_loss=true",
        "f_divergence_type=reverse_kl",
        "fsdp=",
    ],
)
def test_what_macft_does_anyway_is_accepted_in_silence(override, said):
    load(override)
    assert said() == []


def test_what_asks_for_something_by_false_is_named(said):
    load("use_fast_tokenizer=false", "save_safetensors=false")
    assert said() == [
        "no effect here: use_fast_tokenizer (the fast tokenizer is the only one); "
        "save_safetensors (safetensors is the only format)"
    ]


def test_eight_bit_optimizers_are_adamw_with_its_state_in_full(said):
    load("optim=paged_adamw_8bit")
    assert said() == ["no effect here: optim (the state of AdamW stays in float32 in memory)"]


def test_unknown_keys_offer_names_of_other_programs_too():
    assert problem("trust_remote_cod=true") == (
        "trust_remote_cod (command line): unknown key; did you mean trust_remote_code?"
    )
    assert problem("iters=5", "stage=sft") == "iters (command line): a key of mlx-lm, unknown here; write max_steps"
    assert problem("num_layers=5") == "num_layers (command line): a key of mlx-lm, unknown here; remove it"


def test_a_nested_configuration_of_llama_factory_v1_is_refused_in_words(tmp_path):
    text = f"{YAML}peft_config:\n  name: lora\n  target_modules: all\n  r: 16\nmicro_batch_size: 1\n"
    nested = (
        "a configuration of LLaMA-Factory v1, whose keys are nested: write lora_rank, per_device_train_batch_size, ... "
        "as the examples in train_lora of LLaMA-Factory do"
    )
    assert refusal(tmp_path, text).split("\n")[1:] == [
        f"  peft_config (line 4) is not supported; {nested}",
        f"  micro_batch_size (line 8): 1 is not supported; {nested}",
    ]


def test_a_bare_key_is_true_and_only_where_it_can_be():
    settings = load("--bf16", "--plot_loss", "--do_train", "--use-dora", "lora_rank=4")
    assert settings.bf16 is True and settings.use_dora and settings.lora_rank == 4
    assert load("--bf16", "false", "--packing").packing is True
    assert load("--packing", "seed=3").seed == 3, "key=value is no value of the key before it"
    assert problem("--lora_rnk") == "lora_rnk (command line): unknown key; did you mean lora_rank?"


def test_the_environment_of_llama_factory_sets_the_hub(monkeypatch):
    assert load().hub == "hf"
    for value, hub in (("1", "modelscope"), ("on", "modelscope"), ("Y", "modelscope"), ("0", "hf"), ("", "hf")):
        monkeypatch.setenv("USE_MODELSCOPE_HUB", value)
        assert load().hub == hub
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert load("hub=hf").hub == "hf"
    loaded = load_whole(None, ["model_name_or_path=m", "dataset=d", "output_dir=o"])
    assert loaded.entries["hub"].origin == "USE_MODELSCOPE_HUB"


INTERLEAVE = ["mix_strategy=interleave_under", "dataset=a,b"]
STREAM = ["streaming=true", "max_steps=5"]
SCRATCH = ["train_from_scratch=true", "finetuning_type=full"]
CONTRADICTIONS = [
    (
        ["stage=dpo", "packing=true"],
        "packing is for stages pt and sft; stage dpo compares the two answers of a pair: remove it",
    ),
    (["stage=pt", "mask_history=true"], "mask_history is for stage sft; stage pt trains on every token: remove it"),
    (["stage=pt", "ref_model=m"], "stage pt has no reference; remove ref_model"),
    (["interleave_probs=0.5,0.5"], "interleave_probs needs mix_strategy interleave_under or interleave_over"),
    ([*INTERLEAVE, "interleave_probs=0.5,0.6"], "interleave_probs 0.5, 0.6: expected shares that add up to 1"),
    ([*INTERLEAVE, "interleave_probs=1.5,-0.5"], "interleave_probs 1.5, -0.5: expected shares that add up to 1"),
    ([*INTERLEAVE, "interleave_probs=[1]"], "interleave_probs: found 1, expected 2, one for each data set of dataset"),
    (
        [*INTERLEAVE, "interleave_probs=0.5,0.5", "eval_dataset=e"],
        "interleave_probs: found 2, expected 1, one for each data set of eval_dataset",
    ),
    (["streaming=true"], "streaming has no known end; set max_steps"),
    ([*STREAM, "max_samples=5"], "streaming and max_samples exclude each other; set only max_steps"),
    ([*STREAM, "val_size=0.1"], "val_size 0.1 is a share, which a stream does not have; write a count"),
    ([*STREAM, "save_strategy=epoch"], "streaming has no epochs; set save_strategy to steps"),
    (
        [*STREAM, "stage=dpo"],
        "streaming is for stages pt and sft; stage dpo looks at all rows before the first step",
    ),
    (
        ["model_overrides={num_hidden_layers: 2}"],
        "model_overrides needs train_from_scratch: weights that are there fit their own config.json",
    ),
    (
        ["train_from_scratch=true"],
        "train_from_scratch needs finetuning_type full: an adapter on random weights is of no use",
    ),
    (
        [*SCRATCH, "stage=dpo"],
        "train_from_scratch has no model to be the reference of stage dpo; start with stage pt",
    ),
    (
        ["lr_scheduler_kwargs={power: 2}"],
        "lr_scheduler_kwargs: lr_scheduler_type linear has no power; it has none",
    ),
    (
        ["lr_scheduler_type=cosine_with_min_lr"],
        "lr_scheduler_type cosine_with_min_lr needs either min_lr or min_lr_rate in lr_scheduler_kwargs",
    ),
    (
        ["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={lr_end: 1e-4}"],
        "learning_rate 5e-05 cannot fall to 0.0001; set a smaller lr_end or min_lr",
    ),
    (
        ["lr_scheduler_type=cosine_with_restarts", "lr_scheduler_kwargs={num_cycles: 0}"],
        "lr_scheduler_kwargs: num_cycles 0, expected above 0",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=[" ".join(case[0]) for case in CONTRADICTIONS])
def test_what_does_not_go_together_is_refused_in_one_line(overrides, message):
    required = [name for name in ("model_name_or_path=m", "dataset=d", "output_dir=o") if not overlap(name, overrides)]
    with pytest.raises(Exception, match="1 problem") as caught:
        load_config(None, [*required, *overrides])
    assert str(caught.value).split("\n")[1].strip() == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=pt", "template=t.jinja"], "template (stage is pt)"),
        (["stage=pt", "pref_beta=1"], "pref_beta (stage is pt)"),
        (["buffer_size=5"], "buffer_size (streaming is off)"),
        ([*STREAM, "overwrite_cache=true"], "overwrite_cache (streaming caches nothing)"),
        (["mix_strategy=interleave_over"], "mix_strategy (dataset is one)"),
    ],
)
def test_new_keys_that_this_run_does_not_look_at_are_named(overrides, message, said):
    load(*overrides)
    assert said() == [f"no effect here: {message}"]


def test_a_stream_is_evaluated_by_steps_and_a_given_order_is_kept():
    assert load(*STREAM, "val_size=5").when_to_evaluate == "steps"
    assert load("val_size=5").when_to_evaluate == "epoch"
    assert load().sorts_by_length
    for override in (STREAM, ["disable_shuffling=true"], ["packing=true"], ["group_by_length=false"]):
        assert not load(*override).sorts_by_length
