"""Settings of preference training: what goes together, what is refused, what is said to have no effect."""

from __future__ import annotations

import logging

import pytest
from support.commands import CHECKOUT
from support.configs import from_file, load, problem

from macft.config.load import dump_yaml, load_config

DPO, FOODPO, KTO = "stage=dpo", "stage=foodpo", "stage=kto"
BEST = ["load_best_model_at_end=true", "val_size=2"]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """The warnings so far."""
    caplog.set_level(logging.WARNING, logger="macft")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("stage", ["sft", "dpo", "foodpo"])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "orpo", "simpo"])
def test_pairs_and_a_reference_go_with_the_stage_and_the_loss(stage, loss):
    settings = load(DPO, f"pref_loss={loss}").model_copy(update={"stage": stage})
    assert settings.is_preference == settings.has_pairs == (stage in ("dpo", "foodpo"))
    assert settings.has_reference == (stage != "sft" and loss not in ("orpo", "simpo"))


def test_kto_has_a_reference_and_no_pairs():
    settings = load(KTO)
    assert settings.is_preference and settings.has_reference and not settings.has_pairs


def test_names_of_trl_set_the_same_keys():
    settings = load(DPO, "beta=0.3", "loss_type=robust", "label_smoothing=0.1", "max_length=99")
    found = settings.pref_beta, settings.pref_loss, settings.dpo_label_smoothing, settings.cutoff_len
    assert found == (0.3, "robust", 0.1, 99)
    assert problem(DPO, "beta=0.3", "pref_beta=0.4") == "pref_beta (command line): means the same as beta; keep one"


LOSSES = "'sigmoid', 'hinge', 'ipo', 'robust', 'apo_zero', 'apo_down', 'orpo' or 'simpo'"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (f"pref_loss={name}", f"found '{name}', expected {LOSSES}")
            for name in ("kto_pair", "bco_pair", "sppo_hard")
        ),
        ("pref_beta=0", "found 0, expected greater than 0"),
        ("pref_ftx=-1", "found -1, expected greater than or equal to 0"),
        ("dpo_label_smoothing=0.5", "found 0.5, expected less than 0.5"),
        ("ld_alpha=1.5", "found 1.5, expected less than or equal to 1"),
        ("pref_beta_scale=.nan", "found nan, expected a finite number"),
        ("foodpo_perplexity=base", "found 'base', expected 'reference', 'policy' or 'policy_with_gradient'"),
        ("foodpo_beta_min=0", "found 0, expected greater than 0"),
        ("early_stopping_steps=0", "found 0, expected greater than or equal to 1"),
    ],
)
def test_a_value_outside_its_range_is_refused(override, message):
    assert problem(FOODPO, override) == f"{override.split('=')[0]} (command line): {message}"


SMOOTHING = "dpo_label_smoothing is for pref_loss sigmoid and robust, found {}; remove it"
LD_ALPHA = "ld_alpha weighs answers of unlike length, and pref_loss {} takes averages; remove it"
NO_PERPLEXITY = "foodpo_perplexity is reference and pref_loss {} has none; set policy or policy_with_gradient"
SFT_ONLY = "{} is for stage sft; stage {} trains on the two answers only: remove it"
CONTRADICTIONS = [
    *(
        ([DPO, "dpo_label_smoothing=0.1", f"pref_loss={loss}", "pref_beta=2"], SMOOTHING.format(loss))
        for loss in ("hinge", "ipo", "apo_zero", "apo_down", "orpo", "simpo")
    ),
    *(
        ([DPO, "simpo_gamma=1", f"pref_loss={loss}"], f"simpo_gamma is for pref_loss simpo, found {loss}; remove it")
        for loss in ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "orpo")
    ),
    *(
        ([DPO, "ld_alpha=0.5", f"pref_loss={loss}", "pref_beta=2"], LD_ALPHA.format(loss))
        for loss in ("ipo", "orpo", "simpo")
    ),
    *(
        ([DPO, f"{key}=other", f"pref_loss={loss}", "pref_beta=2"], f"pref_loss {loss} has no reference; remove {key}")
        for key in ("ref_model", "ref_model_adapters")
        for loss in ("orpo", "simpo")
    ),
    (["ref_model=other"], "stage sft has no reference; remove ref_model"),
    (["ref_model_adapters=other"], "stage sft has no reference; remove ref_model_adapters"),
    *(
        ([FOODPO, f"pref_loss={loss}"], f"stage foodpo combines with pref_loss sigmoid, orpo and simpo, found {loss}")
        for loss in ("hinge", "ipo", "robust", "apo_zero", "apo_down")
    ),
    *(([FOODPO, f"pref_loss={loss}", "pref_beta=2"], NO_PERPLEXITY.format(loss)) for loss in ("orpo", "simpo")),
    *(
        ([KTO, f"{key}=true"], f"{key} is for stage sft; stage kto trains on the last answer only: remove it")
        for key in ("train_on_prompt", "mask_history")
    ),
    ([KTO, "packing=true"], "packing is for stages pt and sft; stage kto scores each answer by itself: remove it"),
    (
        [KTO, "streaming=true", "max_steps=5"],
        "streaming is for stages pt and sft; stage kto looks at all rows before the first step",
    ),
    (
        [KTO, "kto_chosen_weight=0", "kto_rejected_weight=0"],
        "kto_chosen_weight and kto_rejected_weight are both 0, so nothing is trained; set one of them above 0",
    ),
    ([FOODPO, "foodpo_beta_min=2", "foodpo_beta_max=1"], "foodpo_beta_min 2.0 is above foodpo_beta_max 1.0"),
    ([DPO, "train_on_prompt=true"], SFT_ONLY.format("train_on_prompt", "dpo")),
    ([FOODPO, "mask_history=true"], SFT_ONLY.format("mask_history", "foodpo")),
    (["create_new_adapter=true"], "create_new_adapter needs adapter_name_or_path, the adapter to build on"),
    (["create_new_adapter=true", "finetuning_type=full"], "create_new_adapter needs finetuning_type lora"),
    *(
        (
            ["create_new_adapter=true", "adapter_name_or_path=a", f"{key}={value}"],
            f"create_new_adapter and {key} are both set; keep one",
        )
        for key, value in (("use_dora", "true"), ("quantization_bit", "4"))
    ),
    *(
        ([override], f"{override.split('=')[0]} needs an evaluation; set eval_dataset or val_size")
        for override in (
            "load_best_model_at_end=true",
            "metric_for_best_model=loss",
            "greater_is_better=false",
            "early_stopping_steps=2",
        )
    ),
    (
        ["early_stopping_steps=2", "val_size=2", "eval_strategy=no"],
        "early_stopping_steps needs an evaluation; set eval_strategy to steps or epoch",
    ),
    (
        BEST,
        "load_best_model_at_end needs save_strategy equal to eval_strategy, found steps and epoch (its default)",
    ),
    (
        [*BEST, "eval_strategy=steps", "save_strategy=no"],
        "load_best_model_at_end needs save_strategy equal to eval_strategy, found no and steps",
    ),
    (
        [*BEST, "eval_strategy=steps", "eval_steps=7"],
        "load_best_model_at_end needs save_steps to be a multiple of eval_steps, found 500 and 7",
    ),
    (
        [*BEST, "eval_strategy=steps", "save_steps=25"],
        "load_best_model_at_end needs save_steps to be a multiple of eval_steps, found 25 and 10 (logging_steps)",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=[" ".join(case[0]) for case in CONTRADICTIONS])
def test_what_does_not_go_together_is_refused_in_one_line(overrides, message):
    assert problem(*overrides) == message


@pytest.mark.parametrize(
    ("unsound", "others"),
    [
        ("val_size", ["eval_strategy=steps"]),
        ("eval_strategy", ["eval_steps=3", "val_size=2"]),
        ("val_size", ["early_stopping_steps=3"]),
        ("eval_strategy", ["load_best_model_at_end=true", "val_size=2"]),
        ("save_strategy", ["load_best_model_at_end=true", "val_size=2"]),
        (
            "save_steps",
            ["load_best_model_at_end=true", "val_size=2", "eval_strategy=steps", "save_strategy=steps", "eval_steps=7"],
        ),
        ("adapter_name_or_path", ["create_new_adapter=true"]),
        ("stage", ["ref_model=a"]),
        ("pref_loss", ["stage=dpo", "simpo_gamma=1"]),
        ("foodpo_perplexity", ["stage=foodpo", "pref_loss=simpo", "pref_beta=2"]),
        ("pref_beta_scale", ["stage=foodpo", "pref_loss=simpo", "pref_beta=2"]),
    ],
)
def test_no_contradiction_is_read_into_a_value_that_is_not_known(unsound, others):
    assert problem(*others), "with the default in its place there is one"
    assert problem(*others, f"{unsound}=[1]").startswith(f"{unsound} (command line): found [1], expected ")


@pytest.mark.parametrize(
    "overrides",
    [
        *([DPO, "dpo_label_smoothing=0.1", f"pref_loss={loss}"] for loss in ("sigmoid", "robust")),
        *([DPO, "ld_alpha=0.5", f"pref_loss={loss}"] for loss in ("sigmoid", "hinge", "apo_zero", "apo_down")),
        [DPO, "ld_alpha=0.5", "pref_loss=robust", "dpo_label_smoothing=0.1"],
        [DPO, "simpo_gamma=1", "pref_loss=simpo", "pref_beta=2"],
        [DPO, "pref_loss=orpo", "pref_ftx=1"],
        [FOODPO, "ref_model=other", "ref_model_adapters=a"],
        [FOODPO, "pref_beta_scale=0"],
        [FOODPO, "pref_beta_scale=0", "pref_loss=orpo"],
        *(
            [FOODPO, f"pref_loss={loss}", f"foodpo_perplexity={source}", "pref_beta=2"]
            for loss in ("orpo", "simpo")
            for source in ("policy", "policy_with_gradient")
        ),
        [FOODPO, "foodpo_beta_min=1", "foodpo_beta_max=1"],
        [DPO, "lora_dropout=0.1"],
        [KTO, "pref_beta=0.3", "pref_ftx=1", "kto_chosen_weight=1.3", "kto_rejected_weight=0", "ref_model=other"],
        ["create_new_adapter=true", "adapter_name_or_path=a", "lora_rank=4", "use_rslora=true"],
        [*BEST, "save_strategy=epoch", "metric_for_best_model=eval_rewards/margins", "greater_is_better=true"],
        [*BEST, "eval_strategy=steps", "eval_steps=5", "save_steps=10"],
        ["val_size=2", "early_stopping_steps=2", "metric_for_best_model=loss"],
    ],
    ids=" ".join,
)
def test_what_goes_together_loads_without_a_word(overrides, said):
    load(*overrides)
    assert said() == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pref_beta=0.2", "pref_loss=ipo"], "pref_beta (stage is sft); pref_loss (stage is sft)"),
        (["pref_ftx=1", "pref_beta_scale=1"], "pref_ftx (stage is sft); pref_beta_scale (stage is sft)"),
        (["kto_chosen_weight=2"], "kto_chosen_weight (stage is sft)"),
        ([DPO, "kto_rejected_weight=2"], "kto_rejected_weight (stage is dpo)"),
        (
            [KTO, "pref_loss=ipo", "ld_alpha=0.5", "pref_beta_scale=1"],
            "pref_loss (stage is kto); ld_alpha (stage is kto); pref_beta_scale (stage is kto)",
        ),
        (["simpo_gamma=1", "ld_alpha=0.1"], "simpo_gamma (stage is sft); ld_alpha (stage is sft)"),
        (
            [DPO, "foodpo_perplexity=policy", "foodpo_beta_max=1"],
            "foodpo_perplexity (stage is dpo); foodpo_beta_max (stage is dpo)",
        ),
        (
            [FOODPO, "pref_beta_scale=-1", "foodpo_perplexity=policy", "foodpo_beta_min=1"],
            "foodpo_perplexity (pref_beta_scale is -1); foodpo_beta_min (pref_beta_scale is -1)",
        ),
        ([FOODPO, "pref_beta_scale=0", "foodpo_beta_max=1"], "foodpo_beta_max (pref_beta_scale is 0)"),
        (
            ["val_size=2", "metric_for_best_model=loss"],
            "metric_for_best_model (neither load_best_model_at_end nor early_stopping_steps is set)",
        ),
        (
            [DPO, "remove_unused_columns=false", "precompute_ref_log_probs=true"],
            "remove_unused_columns (columns without a use are not read); "
            "precompute_ref_log_probs (the reference is computed once, before the first step)",
        ),
    ],
)
def test_keys_of_another_stage_are_said_to_have_no_effect(overrides, message, said):
    load(*overrides)
    assert said() == [f"no effect here: {message}"]


def test_simpo_with_a_beta_made_for_dpo_is_doubted(said):
    load(DPO, "pref_loss=simpo", "pref_beta=1")
    load("pref_beta=0.1")
    assert said() == []
    load(DPO, "pref_loss=simpo", "simpo_gamma=0.3")
    assert said() == [
        "pref_beta 0.1 is small for pref_loss simpo: simpo_gamma 0.3 outweighs the answers; "
        "the paper takes a pref_beta of 2 to 10"
    ]


def test_kto_on_one_answer_at_a_time_is_doubted(said):
    load(KTO, "per_device_train_batch_size=2")
    assert said() == []
    load(KTO, "per_device_train_batch_size=1")
    assert said() == [
        "per_device_train_batch_size 1: the KL term of KTO then rests on one answer; set 4 or more, and lower "
        "gradient_accumulation_steps"
    ]


def test_robust_without_smoothing_is_doubted(said):
    load(DPO, "pref_loss=robust")
    assert said() == ["pref_loss robust with dpo_label_smoothing 0 is sigmoid; set dpo_label_smoothing above 0"]


@pytest.mark.parametrize(
    "overrides",
    [[DPO], [DPO, "pref_loss=simpo", "pref_beta=2"], [FOODPO, "foodpo_beta_max=1"], [*BEST, "save_strategy=epoch"]],
    ids=" ".join,
)
def test_the_resolved_configuration_of_a_preference_run_reads_back(overrides, tmp_path, said):
    settings = load(*overrides)
    again = from_file(tmp_path, dump_yaml(settings))
    assert again.model_dump(exclude={"lora_alpha"}) == settings.model_dump(exclude={"lora_alpha"})
    assert said() == []


def test_the_seed_experiment_has_its_ten_steps():
    settings = load_config(CHECKOUT / "configs" / "seed_foodpo_qwen.yaml", [])
    assert settings.max_samples == 20 and settings.num_train_epochs == 1
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 2
    assert (settings.stage, settings.lora_rank, settings.alpha, settings.cutoff_len) == ("foodpo", 8, 16, 1024)
    assert (settings.learning_rate, settings.warmup_ratio, settings.logging_steps) == (5e-5, 0.03, 5)
