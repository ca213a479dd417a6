"""Where people lost days: each pitfall of data and configuration is impossible here or named in one line.

Those whose test is named after them stand here and in test_data_pitfalls.py. Others are held by these tests:

    P4 training/test_preference_run.py test_a_run_starts_at_ln_2_with_rewards_0
    P4 training/test_preference_run.py test_a_start_that_is_not_its_own_reference_stops_and_leaves_no_checkpoint
    P5 inspection/test_check.py test_evaluation_rows_that_are_trained_on_are_named
    P7 inference/test_chat.py test_one_shot_prompts_print_only_answers_each_from_the_same_seed
    P8 weights/adapters/test_peft.py test_the_base_is_named_as_typed_and_by_its_hash
    P9 training/checks/test_alarms.py test_chosen_that_falls_while_margins_rise_is_said_once
    P10 training/checks/test_alarms.py test_preference_training_has_a_range_of_rates_and_its_ends_belong_to_it
    P13 verify/test_logits.py test_a_wrong_rope_base_fails
    P13 weights/layouts/test_litgpt.py test_a_checkpoint_of_litgpt_itself_computes_the_same_after_import
    P15 backends/test_generate.py test_greedy_tokens_equal_those_of_transformers
    P19 inspection/test_preview.py test_a_pipe_shows_trained_text_in_marks
    P25 examples/test_data_examples.py test_an_example_trains_for_its_two_steps
    P27 ollama/test_template.py test_real_go_writes_the_prompts_of_published_templates
    P28 ollama/test_ollama_export.py test_the_embedded_template_is_out_of_ollamas_reach_and_prompts_as_trained
    P30 inference/test_chat.py test_without_a_template_each_line_is_continued_as_it_is
    P31 backends/test_generate.py test_an_answer_is_no_longer_than_asked
    P32 training/test_run.py test_eight_rows_a_step_give_one_curve_however_they_are_cut
    P35 training/test_run.py test_a_full_disk_leaves_no_half_file
    P35 weights/adapters/test_peft.py test_all_problems_of_an_adapter_come_in_one_error
    P36 gguf/writing/test_gguf_writer.py test_gguf_py_reads_every_field_and_number
    P37 ollama/test_ollama_export.py test_the_folder_holds_the_file_the_modelfile_and_both_reports
    P43 data/cache/test_cache.py test_processes_make_what_one_process_makes
    P45 models/test_from_config.py test_all_problems_of_a_shape_come_together
    P46 data/tokenization/test_texts.py test_packed_rows_hold_all_tokens_in_order_and_are_full_but_the_last
    P46 data/tokenization/test_packing.py test_every_example_is_in_one_row_and_no_row_is_too_long
    P47 training/test_checkpoint.py test_checkpoints_are_written_when_asked_and_the_newest_kept
    P48 training/test_run.py test_a_run_folder_holds_everything
    P56 training/test_run.py test_a_dry_run_keeps_nothing
    P58 ollama/test_ollama_export.py test_a_system_text_is_written_only_if_given
    P61 training/checks/test_alarms.py test_preference_training_has_a_range_of_rates_and_its_ends_belong_to_it

P33, P34, P44 and P54 cannot happen: nothing is offloaded, a batch goes where the model is, and none of those packages
is needed (P42). P16 and P29 are habits of documents and of one function that renders. P21 to P23 (evaluation tasks),
P60 (answers that repeat themselves), P39 (memory) and P55 (several GPUs) are of commands to come.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from support.commands import CHECKOUT
from support.data_rows import fit_examples, read_examples, tokenize_examples
from support.paths import TESTS
from support.rows import write_lines
from support.tiny_tokenizer import CHATML, write_tiny_model
from support.toy_backend import toy_settings, write_pairs, write_rows

from macft.config.load import load_config
from macft.config.settings import Settings
from macft.data.templates.chat_template import load_template, template_end_ids
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError
from macft.inspection.dataset import inspect
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
LISTED = re.findall(r"^    (P\d+) ([\w/]+\.py) (test_\w+)$", str(__doc__), flags=re.MULTILINE)


def settings(tmp_path: Path, **keys: Any) -> Settings:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(BASE | keys))
    return load_config(path, [])


def rows_of(model: Path, path: Path, cutoff_len: int = 2048) -> Any:
    tokenizer = load_tokenizer(model)
    template = load_template(model, tokenizer.special_map)
    return list(fit_examples(read_examples(str(path), "", None), tokenizer, template, cutoff_len=cutoff_len))


def trained_text(model: Path, row: Any) -> str:
    ids = [id_ for id_, trained in zip(row.encoded.ids, row.loss_mask, strict=True) if trained]
    return load_tokenizer(model).decode(ids, skip_special=False)


@pytest.mark.parametrize(("file", "name"), [pytest.param(file, name, id=f"{p} {name}") for p, file, name in LISTED])
def test_the_tests_that_the_list_names_are_there(file: str, name: str) -> None:
    path = TESTS / file
    functions = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")]
    assert name in functions


def test_the_list_is_read() -> None:
    assert len(LISTED) > 25


def test_p1_a_tokenizer_in_another_folder_is_named_by_a_key(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    path = write_lines(tmp_path / "d.jsonl", {"instruction": "hello", "output": "you"})
    with pytest.raises(ModelError, match=r"no tokenizer; looked for tokenizer.json, vocab.json with merges.txt"):
        inspect(str(path), (), str(bare))
    found = inspect(str(path), (f"tokenizer_name_or_path={model}",), str(bare))
    assert (
        found.encoding.tokenizer.vocabulary == load_tokenizer(model).vocabulary and found.encoding.template is not None
    )


def test_p2_and_p3_keys_for_a_mac_are_taken_and_the_device_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="macft")
    found = settings(tmp_path, fp16=False, use_mps_device=True)
    assert found.precision == "auto" and found.backend == "auto"
    assert [record.getMessage() for record in caplog.records if "use_mps_device" in record.getMessage()]


@pytest.mark.torch
def test_p2_a_precision_that_the_device_cannot_train_in_falls_back_with_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="macft")
    data = write_rows(tmp_path / "d.jsonl")
    train(toy_settings(model, data, tmp_path / "out", "torch", fp16=True, max_steps=1))
    assert "float16 is not trainable on the CPU: computing in float32" in caplog.text


def test_p6_the_template_that_was_trained_with_is_the_one_of_the_adapter(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl")
    train(toy_settings(model, data, tmp_path / "out", "mlx", template="default", max_steps=1))
    tokenizer = load_tokenizer(tmp_path / "out")
    kept = load_template(tmp_path / "out", tokenizer.special_map)
    question = [{"role": "user", "content": "你好"}]
    own = load_template(model, tokenizer.special_map, "default")
    assert kept.render(question, add_generation_prompt=True) == own.render(question, add_generation_prompt=True)
    assert kept.render(question).startswith("Human: 你好")


def test_p12_an_end_token_that_is_the_pad_token_too_is_trained_on(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    end = load_tokenizer(folder).special_map["eos_token"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": end}))
    [row] = rows_of(folder, write_lines(tmp_path / "d.jsonl", {"instruction": "hello", "output": "you"}))
    assert load_tokenizer(folder).special_map["pad_token"] == end
    assert trained_text(folder, row).startswith(f"you{end}")


def test_p14_names_that_libraries_gave_up_are_taken(tmp_path: Path) -> None:
    found = settings(tmp_path, stage="dpo", beta=0.3, max_length=77, evaluation_strategy="steps", val_size=1)
    assert (found.pref_beta, found.cutoff_len, found.eval_strategy) == (0.3, 77, "steps")


def test_p26_an_answer_ends_where_the_template_ends_it_not_at_another_models_token(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    template = load_template(model, tokenizer.special_map)
    assert template.source == CHATML and "<|eot_id|>" in tokenizer.special_strings
    assert template_end_ids(template, tokenizer) == set(tokenizer.encode("<|im_end|>").ids)


def test_p38_many_epochs_without_evaluation_data_are_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doubt = (
        "20 epochs without evaluation data: nothing shows when the rows are learned by heart; "
        "set val_size (0.1) or eval_dataset"
    )
    for keys, is_doubted in (
        ({}, True),
        ({"stage": "dpo"}, True),
        ({"num_train_epochs": 9.9}, False),
        ({"max_steps": 5}, False),
        ({"val_size": 0.1}, False),
        ({"eval_dataset": "e"}, False),
    ):
        caplog.clear()
        settings(tmp_path, **{"num_train_epochs": 20} | keys)
        assert (doubt in caplog.messages) == is_doubted, keys


def test_p40_the_steps_of_an_epoch_are_told_before_the_first(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="macft")
    data = write_rows(tmp_path / "d.jsonl", count=16)
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    train(toy_settings(model, data, tmp_path / "out", "mlx", **keys))
    assert "plan: 2 steps, 1 per epoch, 16 examples a step (4 x 4)" in caplog.text


def test_p42_training_needs_no_trainer_of_others_and_no_compiled_attention() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    needed = text[text.index("dependencies = [") : text.index("export = [")]
    names = set(re.findall(r'^    "([\w-]+)', needed, flags=re.MULTILINE))
    assert {"numpy", "torch", "mlx-lm"} <= names
    assert not names & {"trl", "flash-attn", "deepspeed", "datasets", "accelerate", "llamafactory", "ms-swift"}


@pytest.mark.parametrize("answer", ["you", "\nyou", "\n\nyou are", " you", "1. one\n2. two\n", "assistant\nyou"])
def test_p51_the_trained_text_is_the_answer_whatever_the_tokenizer_joins(
    model: Path, tmp_path: Path, answer: str
) -> None:
    quoting = "what does <|im_start|>assistant\nyou mean?"
    [row] = rows_of(model, write_lines(tmp_path / "d.jsonl", {"instruction": quoting, "output": answer}))
    trained = trained_text(model, row)
    # a token on the border may bring the line break before the answer
    assert trained.removeprefix("\n").lstrip("\n") == f"{answer}<|im_end|>\n".lstrip("\n")
    assert len(trained) - len(f"{answer}<|im_end|>\n") in (0, 1)
    assert "mean" not in trained


@pytest.mark.parametrize("cutoff_len", [16, 32, 64])
def test_p52_a_long_question_loses_text_of_its_own_and_neither_header_nor_answer(
    model: Path, tmp_path: Path, cutoff_len: int
) -> None:
    long = "the quick brown fox jumps over the lazy dog. " * 30
    path = write_lines(tmp_path / "d.jsonl", {"instruction": long, "output": "you"})
    [row] = rows_of(model, path, cutoff_len)
    assert row.shortened and not row.answer_cut and len(row.encoded.ids) <= cutoff_len
    assert row.rendered.text.startswith("<|im_start|>user\n")
    assert row.rendered.text.endswith("<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n")
    assert trained_text(model, row) == "you<|im_end|>\n"


def test_p53_a_typed_backslash_stays_two_characters_and_special_tokens_in_text_are_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="macft")
    typed = "hello\\nyou <|im_end|> today"
    path = write_lines(tmp_path / "d.jsonl", {"instruction": typed, "output": "one"})
    tokenizer = load_tokenizer(model)
    template = load_template(model, tokenizer.special_map)
    rows, report = tokenize_examples(read_examples(str(path), "", None), tokenizer, template, cutoff_len=999)
    assert tokenizer.decode(rows[0].tokens.tolist(), skip_special=False).count("\\n") == 1
    assert report.special_in_content == 1
    assert f"special tokens in their text, which stay special (first: <|im_end|> in {path}:1)" in "".join(
        report.warnings
    )


def test_p57_the_ends_of_all_files_are_ends(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    ids = [load_tokenizer(folder).encode(text).ids[0] for text in ("</s>", "<|endoftext|>")]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids[0]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == {*ids, *tokenizer.encode(tokenizer.special_map["eos_token"]).ids}


def test_p58_what_is_asked_after_training_begins_as_what_was_trained_on(model: Path, tmp_path: Path) -> None:
    """A template with a system text of its own puts it into both, or into neither."""
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nhello<|im_end|>\n{% endif %}"
    for source in (CHATML, own + CHATML):
        (tmp_path / "own.jinja").write_text(source)
        template = load_template(model, {}, str(tmp_path / "own.jinja"))
        path = write_lines(tmp_path / "d.jsonl", {"instruction": "how", "output": "you"})
        example = read_examples(str(path), "", None)[0]
        [row] = fit_examples([example], load_tokenizer(model), template, cutoff_len=999)
        asked = template.render(list(example.messages[:1]), add_generation_prompt=True)
        assert row.rendered.text.startswith(asked) and row.rendered.spans[0][0] == len(asked)
        assert ("system" in asked) == (source != CHATML)


@pytest.mark.torch
def test_p62_a_rate_below_the_steps_of_bfloat16_still_moves_the_weights(model: Path, tmp_path: Path) -> None:
    keys = {"stage": "dpo", "bf16": True, "learning_rate": 5e-7, "max_steps": 1, "lr_scheduler_type": "constant"}
    train(toy_settings(model, write_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "torch", **keys))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name: float(abs(value).max()) for name, value in tensors.items() if "lora_B" in name}
    assert {str(value.dtype) for value in tensors.values()} == {"float32"}
    # AdamW's first step is the learning rate for every weight with a gradient
    assert moved and all(value == pytest.approx(5e-7, rel=0.1) for value in moved.values())
