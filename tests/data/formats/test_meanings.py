"""Keys of a row that would change what is trained on are heeded, or refused by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_rows import read_examples, read_feedback, read_pairs, read_texts, tokenize_examples
from support.rows import write_lines
from support.tiny_tokenizer import CHATML, QWEN3

from macft.data.formats.conversations import Example
from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError
from macft.inference.prompts import read_prompts

TEMPLATE = ChatTemplate(CHATML, name="chatml", special_map={})
ASKED = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
TALK = [*ASKED, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]


def read_row(tmp_path: Path, row: dict[str, Any], read: Any = read_examples) -> Any:
    [found] = read(str(write_lines(tmp_path / "rows.jsonl", row)), "", None)
    return found


def problems(tmp_path: Path, *rows: dict[str, Any], read: Any = read_examples) -> list[str]:
    with pytest.raises(DataError) as error:
        read(str(write_lines(tmp_path / "rows.jsonl", *rows)), "", None)
    return [line.strip() for line in str(error.value).split("\n")[1:]]


def contents(example: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.messages]


def trained(tokenizer: Tokenizer, example: Example, template: ChatTemplate = TEMPLATE, **keys: Any) -> str:
    [row], _ = tokenize_examples([example], tokenizer, template, cutoff_len=999, **keys)
    return tokenizer.decode(row.tokens[row.loss_mask], skip_special=False)


def marked(*marks: dict[str, Any], talk: list[dict[str, str]] = TALK) -> dict[str, Any]:
    return {"messages": [{**message, **mark} for message, mark in zip(talk, marks, strict=True)]}


# --- marks of messages


@pytest.mark.parametrize(
    ("off", "on"),
    [
        *(({"weight": 0}, {"weight": 1}), ({"weight": 0.0}, {"weight": 1.0}), ({"train": False}, {"train": True})),
        *(({"loss": False}, {"loss": True}), ({"loss": False}, {}), ({"training": False}, {"training": None})),
        *(({"loss_scale": 0}, {"loss_scale": 1}), ({"loss_weight": 0}, {"loss_weight": 1.0})),
        ({"weight": 0, "train": False}, {"weight": None, "train": True}),
    ],
)
def test_an_answer_marked_so_is_read_and_not_trained_on(
    tmp_path: Path, tokenizer: Tokenizer, off: dict[str, Any], on: dict[str, Any]
) -> None:
    example = read_row(tmp_path, marked({}, off, {}, on))
    assert trained(tokenizer, example) == "four<|im_end|>\n"
    assert trained(tokenizer, read_row(tmp_path, marked({}, on, {}, off))) == "two<|im_end|>\n"
    [row], _ = tokenize_examples([example], tokenizer, TEMPLATE, cutoff_len=999)
    [plain], _ = tokenize_examples([read_row(tmp_path, marked({}, {}, {}, {}))], tokenizer, TEMPLATE, cutoff_len=999)
    assert row.tokens.tolist() == plain.tokens.tolist()


def test_marks_of_sharegpt_messages_count_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = {"user": "human", "assistant": "gpt"}
    talk = [{"from": names[one["role"]], "value": one["content"]} for one in TALK]
    row = marked({}, {"loss": False}, {}, {"loss": True}, talk=talk)
    assert trained(tokenizer, read_row(tmp_path, {"conversations": row["messages"]})) == "four<|im_end|>\n"


def test_with_train_on_prompt_all_but_the_marked_answer_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    example = read_row(tmp_path, marked({}, {"weight": 0}, {}, {}))
    # token 0 is never a target
    assert trained(tokenizer, example, train_on_prompt=True) == (
        "user\none<|im_end|>\n<|im_start|>assistant\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
        "four<|im_end|>\n"
    )


def test_with_mask_history_the_mark_of_the_last_answer_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert trained(tokenizer, read_row(tmp_path, marked({}, {"weight": 0}, {}, {})), mask_history=True).startswith(
        "four"
    )
    last = read_row(tmp_path, marked({}, {}, {}, {"weight": 0}))
    _, report = tokenize_examples([last, read_row(tmp_path, {"messages": ASKED})], tokenizer, TEMPLATE, cutoff_len=99)
    assert report.kept == 2
    keys = {"cutoff_len": 99, "mask_history": True}
    _, report = tokenize_examples([last, read_row(tmp_path, {"messages": ASKED})], tokenizer, TEMPLATE, **keys)
    assert (report.kept, report.without_target) == (1, 1)


def test_a_template_of_one_answer_takes_a_conversation_whose_last_answer_alone_is_trained(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(QWEN3, name="qwen3", special_map={})
    example = read_row(tmp_path, marked({}, {"weight": 0}, {}, {}))
    assert trained(tokenizer, example, template) == trained(tokenizer, example, template, mask_history=True)


def test_a_row_whose_answers_are_all_marked_off_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [read_row(tmp_path, row) for row in (marked({}, {"weight": 0}, talk=ASKED), {"messages": ASKED})]
    _, report = tokenize_examples(rows, tokenizer, TEMPLATE, cutoff_len=99)
    assert report.without_target == 1 and "have nothing to train on" in report.warnings[0]


def test_marks_of_questions_must_say_what_is_done(tmp_path: Path, tokenizer: Tokenizer) -> None:
    off, on = (read_row(tmp_path, marked({"train": value}, {"train": True}, talk=ASKED)) for value in (False, True))
    assert trained(tokenizer, off) == "two<|im_end|>\n"
    assert trained(tokenizer, on, train_on_prompt=True).startswith("user\none")
    with pytest.raises(DataError, match=r"message 1 \(user\) is marked as trained on, but only answers are"):
        trained(tokenizer, on)
    with pytest.raises(DataError, match=r"message 1 \(user\) is marked as not trained on, but train_on_prompt"):
        trained(tokenizer, off, train_on_prompt=True)


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ({"weight": 0.5}, '"weight": found 0.5, expected 0 or 1, or false or true'),
        ({"loss": "no"}, "\"loss\": found 'no', expected 0 or 1, or false or true"),
        ({"train": []}, '"train": found a list, expected 0 or 1, or false or true'),
        ({"train_detail": [{"begin_offset": 0}]}, '"train_detail": parts of an answer cannot be left out of training'),
        ({"images": ["a.png"]}, '"images": only text is trained on; remove it, or the row'),
    ],
)
def test_a_mark_that_cannot_be_heeded_is_named(tmp_path: Path, mark: dict[str, Any], problem: str) -> None:
    [found] = problems(tmp_path, marked({}, mark, talk=ASKED))
    assert found.startswith(f'line 1: "messages"[1] {problem}')


def test_marks_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    assert problems(tmp_path, marked({}, {"weight": 1, "train": False}, talk=ASKED)) == [
        'line 1: "messages"[1]: weight and train contradict each other; keep one of them'
    ]


def test_a_pair_with_an_answer_marked_off_is_refused_and_marks_in_its_prompt_change_nothing(tmp_path: Path) -> None:
    sides = {"chosen": [{**ASKED[1], "weight": 1}], "rejected": [{"role": "assistant", "content": "five"}]}
    pair = read_row(tmp_path, {"prompt": marked({}, {"weight": 0}, {}, {})["messages"][:3], **sides}, read_pairs)
    assert pair.prompt == tuple(TALK[:3]) and pair.chosen == (ASKED[1],)
    bad = {"prompt": "one", **sides, "chosen": [{**ASKED[1], "weight": 0}]}
    assert problems(tmp_path, bad, read=read_pairs) == [
        'line 1: "chosen": an answer is marked as not trained on; remove the mark, or the row'
    ]


# --- beside the messages

SYSTEM, HISTORY = {"system": "be brief"}, {"history": [["q0", "a0"]]}
BEFORE = [("system", "be brief"), ("user", "q0"), ("assistant", "a0")]
ONE = [("user", "one"), ("assistant", "two")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"prompt": "one", "completion": "two"},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"prompt": "one", "response": "two"},
        {"query": "one", "response": "two"},
        {"instruction": "one", "output": "two"},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_system_and_history_are_read_beside_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    assert contents(read_row(tmp_path, {**row, **SYSTEM})) == [*BEFORE[:1], *ONE]
    assert contents(read_row(tmp_path, {**row, **HISTORY})) == [*BEFORE[1:], *ONE]
    assert contents(read_row(tmp_path, {**row, **SYSTEM, **HISTORY})) == [*BEFORE, *ONE]
    assert contents(read_row(tmp_path, {**row, "system": "", "history": None})) == ONE
    rated = read_row(tmp_path, {**row, **SYSTEM, **HISTORY, "label": True}, read_feedback)
    assert contents(rated) == [*BEFORE, *ONE]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "one", "chosen": "two", "rejected": "five"},
        {"chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "five"}]},
        {"instruction": "one", "chosen": "two", "rejected": "five"},
        {
            "conversations": [{"from": "human", "value": "one"}],
            **{side: {"from": "gpt", "value": text} for side, text in (("chosen", "two"), ("rejected", "five"))},
        },
    ],
    ids=lambda row: "+".join(row),
)
def test_system_and_history_are_read_beside_every_kind_of_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = read_row(tmp_path, {**row, **SYSTEM, **HISTORY}, read_pairs)
    assert [(message["role"], message["content"]) for message in pair.prompt] == [*BEFORE, ONE[0]]


def test_history_comes_after_the_system_message_and_two_system_texts_must_agree(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, *ASKED]
    assert contents(read_row(tmp_path, {"messages": messages, **SYSTEM, **HISTORY})) == [*BEFORE, *ONE]
    assert problems(tmp_path, {"messages": messages, "system": "be long"}) == [
        'line 1: "system": "messages" also hold a system message; keep one of the two'
    ]


def test_an_entry_of_dataset_info_without_columns_is_read_as_its_file_is(tmp_path: Path) -> None:
    row = {"instruction": "one", "output": "two", **SYSTEM, **HISTORY}
    write_lines(tmp_path / "rows.jsonl", row)
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "rows.jsonl"}}')
    [found] = read_examples("d", str(tmp_path), None)
    assert contents(found) == contents(read_row(tmp_path, row)) == [*BEFORE, *ONE]


# --- OpenAI's older calls


def test_functions_and_function_calls_are_tools_and_tool_calls(tmp_path: Path) -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call, result = {"name": "f", "arguments": '{"a": 1}'}, {"name": "f", "content": "3"}
    last = {"role": "assistant", "content": "it is 3"}
    old = {
        "messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", **result},
            last,
        ],
        "functions": [function],
    }
    new = {
        "messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", **result},
            last,
        ],
        "tools": [{"type": "function", "function": function}],
    }
    found, expected = read_row(tmp_path, old), read_row(tmp_path, new)
    assert (found.messages, found.tools) == (expected.messages, expected.tools)
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_two_spellings_of_calls_or_tools_are_refused(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": "{}"}
    both = {**ASKED[1], "function_call": call, "tool_calls": [call]}
    assert problems(tmp_path, {"messages": [ASKED[0], both], "tools": [call], "functions": [call]}) == [
        'line 1: "functions": "tools" are given too; keep one of the two',
        'line 1: "messages"[1] "function_call": "tool_calls" are given too; keep one of the two',
    ]


# --- what is refused by name

RATED = '"label": rates the answer, which would be trained on all the same; set stage: kto, or remove it'


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"label": False}, RATED),
        ({"label": True}, RATED),
        ({"label": "False"}, RATED),
        (
            {"weight": "0"},
            "\"weight\": found '0': rows are not weighted, only messages are, by 0 or 1; remove it, or the row",
        ),
        (
            {"train": "false"},
            "\"train\": found 'false': rows are not weighted, only messages are, by 0 or 1; remove it, or the row",
        ),
        ({"images": ["a.png"]}, '"images": only text is trained on; remove it, or the row'),
        ({"audio": {"path": "a.wav"}}, '"audio": only text is trained on; remove it, or the row'),
        ({"videos": "a.mp4"}, '"videos": only text is trained on; remove it, or the row'),
        (
            {"weight": 0},
            '"weight": found 0: rows are not weighted, only messages are, by 0 or 1; remove it, or the row',
        ),
        (
            {"train": False},
            '"train": found False: rows are not weighted, only messages are, by 0 or 1; remove it, or the row',
        ),
        (
            {"system_prompt": "be"},
            '"system_prompt": it is not read; rename it to system, or map it in dataset_info.json',
        ),
        (
            {"reasoning_content": "hm"},
            '"reasoning_content": a thought is read only inside its message; give the answer as one, or remove it',
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            '"chat_template_kwargs": rows have no settings; set enable_thinking in the configuration, and remove it',
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "dataset_info"])
def test_a_key_that_would_change_the_result_is_refused_once_a_file(
    tmp_path: Path, extra: dict[str, Any], problem: str, suffix: str
) -> None:
    rows = [{"messages": ASKED, **row} for row in ({**extra}, {**extra})]
    name = "d" if suffix == "dataset_info" else str(tmp_path / f"rows.{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), name)
    else:
        write_lines(tmp_path / "rows.jsonl", *rows)
    entry = {"file_name": "rows.jsonl", "formatting": "openai", "columns": {"messages": "messages"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    with pytest.raises(DataError) as error:
        read_examples(name, str(tmp_path), None)
    place = "row" if suffix == "parquet" else "line"
    assert str(error.value).split("\n")[1:] == [f"  {place} 1: {problem}"]


@pytest.mark.parametrize(
    "extra",
    [
        {"label": None, "images": [], "weight": 1, "train": True, "chat_template_kwargs": {}, "audio": ""},
        {"label": "positive", "weight": "3 kg", "mood": 0},
        {"label": 1, "loss": None, "system_prompt": ""},
        {"label": "class 1", "weight": "1", "train": "True"},
    ],
)
def test_keys_that_change_nothing_are_only_named(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert contents(read_row(tmp_path, {"messages": ASKED, **extra})) == ONE
    assert read_row(tmp_path, {"text": "one", "weight": 0, "label": True}, read_texts).text == "one"


def test_dataset_info_can_leave_a_rating_and_pictures_out_on_purpose(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", {"messages": ASKED, "label": False, "images": ["a.png"]})
    columns = {"messages": "messages", "kto_tag": None, "images": None}
    entry = {"file_name": "rows.jsonl", "formatting": "openai", "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    [found] = read_examples("d", str(tmp_path), None)
    assert contents(found) == ONE


# --- prompts to answer


def test_prompts_take_system_and_history_and_refuse_tools_and_pictures(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl", {"prompt": "one", **SYSTEM, **HISTORY}, {"messages": ASKED, **SYSTEM, **HISTORY}
    )
    expected = [{"role": role, "content": content} for role, content in [*BEFORE, ONE[0]]]
    assert read_prompts(path) == [expected, expected]
    write_lines(path, {"prompt": "one", "tools": [{"name": "f"}]}, {"messages": ASKED, "images": ["a.png"]})
    with pytest.raises(DataError) as error:
        read_prompts(path)
    assert [line.strip() for line in str(error.value).split("\n")[1:]] == [
        'line 1: "tools": a model that answers prompts here is offered no tools; remove it, or the row',
        'line 2: "images": only text is trained on; remove it, or the row',
    ]
