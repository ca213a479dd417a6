"""What a run warns about: its rate, rows seen twice, an end token not learned, bad curves; and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_tokenizer import CHATML, LLAMA3, write_tiny_model

from macft.config.settings import Settings
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.tokenization.table import Reference, TokenizedExample, TokenizedPair
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import MacftError
from macft.models.locate import resolve_model
from macft.training.checks.alarms import CurveAlarms, balance_alarm, learning_rate_alarm, overlap_alarm
from macft.training.checks.end_token import untrained_end_token_alarm

# ---- learning rate


@pytest.mark.parametrize(
    ("method", "calm", "loud"),
    [("lora", (1e-7, 5e-6, 1e-4), (0.99e-7, 1.01e-4)), ("full", (1e-8, 5e-7, 5e-6), (0.99e-8, 5.1e-6))],
)
def test_preference_training_has_a_range_of_rates_and_its_ends_belong_to_it(method, calm, loud):
    def alarm(rate: float, stage: str) -> str | None:
        keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "finetuning_type": method}
        return learning_rate_alarm(Settings(**keys, stage=stage, learning_rate=rate))

    for stage in ("dpo", "foodpo", "kto"):
        assert [alarm(rate, stage) for rate in calm] == [None] * 3
        low, high = (alarm(rate, stage) for rate in loud)
        assert low is not None and "will hardly change" in low and f"between {calm[0]:g} and {calm[2]:g}" in low
        assert high is not None and f"learning_rate {loud[1]:g}: the model is likely to break" in high
    assert [alarm(rate, "sft") for rate in loud] == [None] * 2


# ---- balance of ratings


def balance(desirable: int, others: int, **weights: float) -> str | None:
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "stage": "kto"}
    return balance_alarm(Settings(**keys, **weights), np.arange(desirable + others) < desirable)


def test_ratings_whose_weights_are_in_the_papers_range_give_no_alarm():
    for desirable, others in ((10, 10), (13, 10), (40, 30)):
        assert balance(desirable, others) is None
    assert balance(10, 30, kto_chosen_weight=3.0) is None
    assert balance(30, 10, kto_rejected_weight=2.5) is None
    assert balance(10, 10, kto_rejected_weight=0.0) is None


def test_ratings_out_of_balance_are_told_with_weights_that_balance_them():
    assert balance(10, 40) == (
        "10 desirable and 40 undesirable rows, weighted 1 and 1: 0.25 to 1, and KTO's authors take 1 to 1.33; set "
        "kto_chosen_weight between 4 and 5.33, or kto_rejected_weight between 0.188 and 0.25"
    )
    assert balance(10, 40, kto_chosen_weight=4.0) is None and balance(10, 40, kto_chosen_weight=5.33) is None
    assert balance(10, 40, kto_rejected_weight=0.188) is None and balance(10, 40, kto_rejected_weight=0.25) is None
    assert balance(9, 10) is not None and balance(14, 10) is not None


def test_ratings_that_are_all_alike_are_told():
    assert balance(5, 0) == (
        "all 5 rows are rated desirable: KTO learns from both ratings; add undesirable rows, or set stage: sft"
    )
    assert balance(0, 5) == "all 5 rows are rated undesirable: KTO learns from both ratings; add desirable rows"


# ---- overlap


def example(*tokens: int) -> TokenizedExample:
    return TokenizedExample(np.array(tokens, dtype=np.int32), np.ones(len(tokens), dtype=bool))


def pair(chosen: list[int], rejected: list[int], reference: Reference | None = None) -> TokenizedPair:
    return TokenizedPair(example(*chosen), example(*rejected), 1, reference)


def test_evaluation_rows_that_are_trained_on_are_counted():
    train = [example(1, 2, 3), example(4, 5), example(4, 5)]
    alarm = overlap_alarm(train, [example(1, 2, 3), example(1, 2), example(4, 5), example(5, 4), example(6)])
    assert alarm is not None and alarm.startswith("evaluation: 2 of 5 rows (40 %) are also training rows")
    assert "\n" not in alarm
    assert overlap_alarm(train, [example(1, 2), example(2, 3)]) is None
    assert overlap_alarm(train, []) is None


def test_a_pair_is_the_same_only_if_both_answers_are():
    train = [pair([1, 2], [3, 4, 5])]
    assert overlap_alarm(train, [pair([1, 2], [3, 4]), pair([3, 4, 5], [1, 2]), pair([1, 2, 3], [4, 5])]) is None
    # what the reference said of it does not make it another pair
    alarm = overlap_alarm(train, [pair([1, 2], [3, 4, 5], Reference(-1.0, -2.0, 0.5))])
    assert alarm is not None and "1 of 1 rows (100 %)" in alarm


# ---- end token

WIDTH = 32
UNUSED = 40  # rows past the tokenizer's vocabulary


def write_base(folder: Path, eos: str = "<|endoftext|>", template: str = CHATML) -> Path:
    """A folder whose template ends turns with <|im_end|> and whose eos is another token."""
    return write_tiny_model(folder, template, eos=eos)


def output_rows(folder: Path, *, spread: float = 1e-3, learned: tuple[str, ...] = ()) -> np.ndarray:
    """float32 [vocabulary + UNUSED, WIDTH]: ordinary rows apart, special and unused ones `spread` apart."""
    tokenizer = load_tokenizer(folder)
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (tokenizer.vocab_size + UNUSED, WIDTH)).astype(np.float32)
    untouched = [*sorted(tokenizer.special_ids), *range(tokenizer.vocab_size, len(rows))]
    kept = {tokenizer.encode(text).ids[0] for text in learned}
    untouched = [id_ for id_ in untouched if id_ not in kept]
    rows[untouched] = 0.3 + spread * rng.normal(0, 1, (len(untouched), WIDTH))
    return rows


def alarm_of(folder: Path) -> str | None:
    tokenizer = load_tokenizer(folder)
    return untrained_end_token_alarm(load_template(folder, tokenizer.special_map), tokenizer, folder)


def test_a_model_that_names_the_templates_end_raises_no_alarm(tmp_path):
    folder = write_base(tmp_path, eos="<|im_end|>")
    save_file({"model.embed_tokens.weight": output_rows(folder)}, folder / "model.safetensors")
    assert alarm_of(folder) is None


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_instruct_model_may_name_its_end_in_either_config(file, tmp_path):
    folder = write_base(tmp_path)
    assert alarm_of(folder) is not None
    end = load_tokenizer(folder).encode("<|im_end|>").ids[0]
    (folder / file).write_text(json.dumps({"eos_token_id": [end, 0]}))
    assert alarm_of(folder) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_end_token_among_unused_rows_was_never_learned(dtype, tmp_path):
    folder = write_base(tmp_path)
    save_file({"model.embed_tokens.weight": output_rows(folder).astype(dtype)}, folder / "model.safetensors")
    alarm = alarm_of(folder)
    assert alarm is not None and "\n" not in alarm
    assert alarm.startswith("the chat template ends answers with <|im_end|>, the model with <|endoftext|>; ")
    assert "this base model never learned it" in alarm and "finetuning_type: full" in alarm


def test_an_end_token_that_left_the_unused_rows_was_learned(tmp_path):
    folder = write_base(tmp_path)
    rows = output_rows(folder, learned=("<|im_end|>", "<|endoftext|>"))
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    assert alarm_of(folder) is None


def test_the_head_decides_where_a_model_has_one(tmp_path):
    folder = write_base(tmp_path)
    learned = output_rows(folder, learned=("<|im_end|>",))
    save_file({"model.embed_tokens.weight": learned}, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": output_rows(folder)}, folder / "model-00002-of-00002.safetensors")
    assert "never learned it" in str(alarm_of(folder))
    save_file({"model.embed_tokens.weight": output_rows(folder)}, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": learned}, folder / "model-00002-of-00002.safetensors")
    assert alarm_of(folder) is None


@pytest.mark.parametrize("kind", ["random", "quantized", "none"])
def test_rows_that_say_nothing_leave_it_at_the_names(kind, tmp_path):
    folder = write_base(tmp_path)
    # unused rows as far apart as ordinary ones, as a random start leaves them
    rows = {"random": output_rows(folder, spread=1.0), "quantized": np.zeros((600, 8), dtype=np.uint32)}.get(kind)
    if rows is not None:
        save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    assert "a base model has rarely learned it" in str(alarm_of(folder))


def test_a_template_without_a_special_end_raises_no_alarm(tmp_path):
    assert alarm_of(write_base(tmp_path / "plain", template=CHATML.replace("<|im_end|>", "."))) is None
    assert "with <|eot_id|>, the model with </s>" in str(alarm_of(write_base(tmp_path / "l", "</s>", template=LLAMA3)))


def test_a_template_that_ends_with_the_models_own_end_raises_no_alarm(tmp_path):
    folder = write_base(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert untrained_end_token_alarm(load_template(folder, tokenizer.special_map, "empty"), tokenizer, folder) is None


@pytest.mark.slow
def test_real_weights_tell_used_special_tokens_from_unused_ones():
    try:
        folder = resolve_model("smollm2-135m").path
    except MacftError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(folder)

    def alarm(end: str) -> str | None:
        source = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end + "' }}{% endfor %}"
        template = ChatTemplate(source, name="test", special_map=tokenizer.special_map)
        return untrained_end_token_alarm(template, tokenizer, folder)

    # <|im_end|> is its eos; <|im_start|> is not, but was trained on; nothing in the training data held the others
    assert alarm("<|im_end|>") is None and alarm("<|im_start|>") is None
    assert "never learned it" in str(alarm("<jupyter_code>")) and "never learned it" in str(alarm("<empty_output>"))


# ---- curves


def said(alarms: CurveAlarms, chosen: list[float], margins: list[float], key: str = "rewards/chosen") -> list[int]:
    """The steps, from 1, at which an alarm was given."""
    rows = enumerate(zip(chosen, margins, strict=True), start=1)
    return [number for number, (c, m) in rows if alarms.step({key: c, "rewards/margins": m})]


def test_chosen_that_falls_while_margins_rise_is_said_once():
    # chosen falls by 0.05 a step: the mean of steps n-19 to n is -0.05 (n - 9.5) and passes -0.5 at n = 20
    chosen = [-0.05 * step for step in range(1, 61)]
    margins = [0.1 * step for step in range(1, 61)]
    assert said(CurveAlarms(has_reference=True), chosen, margins) == [20]
    # at half the speed: -0.025 (n - 9.5) < -0.5 from n = 30 on
    assert said(CurveAlarms(has_reference=True), [value / 2 for value in chosen], margins) == [30]


def test_the_alarm_says_by_how_much_and_what_to_do():
    alarms = CurveAlarms(has_reference=True)
    texts = [
        text
        for step in range(1, 21)
        for text in alarms.step({"rewards/chosen": -0.06 * step, "rewards/margins": 0.2 * step})
    ]
    # means by hand: chosen of steps 1 to 20 is -0.63, margin of steps 11 to 20 is 3.1
    assert len(texts) == 1 and "\n" not in texts[0] and "pref_ftx" in texts[0]
    assert texts[0].startswith("rewards/chosen has fallen by 0.63 while the margin rises (now +3.10)")


def test_healthy_curves_raise_no_alarm():
    def quiet(chosen: list[float], margins: list[float]) -> bool:
        return said(CurveAlarms(has_reference=True), chosen, margins) == []

    rise = [0.1 * row for row in range(40)]
    down = [-value for value in rise]
    assert quiet(rise, rise)
    assert quiet([-0.04] * 40, rise)  # does not fall far
    assert quiet([-2.0 + value / 10 for value in rise], rise)  # low, but on its way up
    assert quiet(down, down)  # margins fall too: another trouble, which loss and accuracy show
    assert quiet(down, [float("nan")] * 40)


def test_nineteen_steps_are_too_few_and_one_bad_step_is_none():
    assert (
        said(CurveAlarms(has_reference=True), [-9.0 * step for step in range(19)], [float(step) for step in range(19)])
        == []
    )
    chosen = [0.0] * 40
    chosen[22] = -8.0  # a mean of -0.4
    assert said(CurveAlarms(has_reference=True), chosen, [0.1 * step for step in range(40)]) == []


def test_without_a_reference_the_fall_is_counted_per_token_from_the_first_steps():
    # 0.02 nats a token a step from -2 on; the first ten steps have the mean -2.09,
    # steps n-19 to n the mean -2 - 0.02 (n - 10.5): 0.25 below at n > 27.5
    chosen = [-2 - 0.02 * step for step in range(60)]
    margins = [0.1 * step for step in range(60)]
    assert said(CurveAlarms(has_reference=False), chosen, margins, "logps/chosen_avg") == [28]
    assert said(CurveAlarms(has_reference=False), [-3.0] * 60, margins, "logps/chosen_avg") == []


def watched(*margins: float) -> CurveAlarms:
    alarms = CurveAlarms(has_reference=True)
    for margin in margins:
        assert alarms.step({"rewards/chosen": 0.0, "rewards/margins": margin}) == []
    return alarms


def test_an_evaluation_far_below_training_is_said_once():
    alarms = watched(0.4, 0.6, 0.8, 0.5, 0.7)
    (text,) = alarms.evaluation({"eval_rewards/margins": 0.29})
    assert (
        text.startswith("the evaluation's margin is +0.29, that of the last training steps +0.60") and "\n" not in text
    )
    assert "early_stopping_steps" in text
    assert alarms.evaluation({"eval_rewards/margins": -1.0}) == []


@pytest.mark.parametrize(
    ("margins", "held_out"),
    [
        ((0.4, 0.6, 0.8, 0.5, 0.7), 0.31),  # above half of 0.6
        ((0.3,) * 5, 0.11),  # below half, but near
        ((0.1,) * 5, -0.5),  # the training steps have hardly learned anything yet
        ((9.0,) * 4, 0.0),  # four steps only
        ((0.4, 0.6, 0.8, 0.5, 0.7), float("nan")),
        ((9.0, 9.0, *[0.1] * 20), 0.0),  # the last twenty steps count
    ],
)
def test_an_evaluation_near_training_raises_no_alarm(margins, held_out):
    assert watched(*margins).evaluation({"eval_rewards/margins": held_out}) == []


def test_steps_of_supervised_training_raise_no_alarm():
    alarms = CurveAlarms(has_reference=False)
    assert [alarms.step({"loss": 1.0, "lr": 1e-4}) for _ in range(30)] == [[]] * 30
    assert alarms.step({}) == [] and alarms.evaluation({"eval_loss": 1.0}) == []
