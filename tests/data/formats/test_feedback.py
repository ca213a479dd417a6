"""Rated answers of every known format become the same row, and each problem is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_rows import iter_rows, read_examples, read_feedback
from support.paths import CHECKOUT

from macft.data.formats.feedback import FeedbackExample
from macft.data.kinds import DPO, KTO, SFT, kind_of_source
from macft.data.sources.resolve import resolve_sources
from macft.errors import DataError

USER, GOOD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test writes its rows into a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any]) -> str:
    Path("k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "k.jsonl"


def declare(**entry: Any) -> None:
    Path("dataset_info.json").write_text(json.dumps({"rated": {"file_name": "k.jsonl", **entry}}))


def problems(*rows: dict[str, Any]) -> list[str]:
    """The listed problems of these rows of one file."""
    with pytest.raises(DataError) as error:
        read_feedback(write(*rows), ".")
    headline, *listed = str(error.value).split("\n")
    assert headline.startswith(f"k.jsonl: {len(listed)} problem")
    return [line.strip() for line in listed]


@pytest.mark.parametrize("rating", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": ...},
        {"prompt": [USER], "completion": [GOOD], "label": ...},
        {"messages": [USER, GOOD], "label": ...},
        {"messages": [USER, GOOD], "kto_tag": ...},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": ...},
        {"instruction": "q", "output": "a", "kto_tag": ...},
        {"instruction": "q", "output": "a", "label": ...},
        {"query": "q", "response": "a", "label": ...},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_format_of_a_conversation_may_be_rated(row, rating):
    [found] = read_feedback(write({key: rating if value is ... else value for key, value in row.items()}), ".")
    assert found == FeedbackExample((USER, GOOD), "k.jsonl:1", None, rating)


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        (  # as kto_en_demo
            {"messages": [USER, GOOD], "label": True},
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "kto_tag": "label"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
        ),
        (  # as ultrafeedback_kto
            {"prompt": "q", "completion": "a", "label": True},
            {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
        ),
        (
            {"instruction": "q", "output": "a", "good": True},
            {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}},
        ),
    ],
    ids=["sharegpt", "alpaca", "another key"],
)
def test_llama_factorys_entries_are_read(row, entry):
    write(row)
    declare(**entry)
    [found] = read_feedback("rated", ".")
    assert found.messages == (USER, GOOD) and found.is_desirable
    [source] = resolve_sources("rated", ".").sources
    assert kind_of_source(source) is KTO
    with pytest.raises(DataError, match="maps kto_tag: these are rated answers; set stage: kto"):
        read_examples("rated", ".")


def test_csv_holds_its_ratings_as_text():
    Path("rated.csv").write_text("prompt,completion,label\nq,good,True\nq,bad,false\n")
    found = read_feedback("rated.csv", ".")
    assert [(row.messages[-1]["content"], row.is_desirable) for row in found] == [("good", True), ("bad", False)]
    with pytest.raises(DataError, match='"label": rates the answer, which would be trained on all the same'):
        read_examples("rated.csv", ".")


def test_a_rating_that_is_missing_or_none_is_named():
    row = {"prompt": "q", "completion": "a", "label": True}
    rest = {"prompt": "q", "completion": "a"}
    assert problems(row, rest, rest | {"label": "yes"}, rest | {"label": 1}, rest | {"label": None}) == [
        'line 2: no "label", the rating; found the keys prompt, completion',
        "line 3: \"label\": found 'yes', expected true (desirable) or false",
        'line 4: "label": found 1, expected true (desirable) or false',
        'line 5: "label": found null, expected true (desirable) or false',
    ]


def test_a_row_without_an_answer_to_rate_is_named():
    assert problems(
        {"messages": [USER, GOOD, USER], "label": True},
        {"messages": [USER, {"role": "assistant", "content": " "}], "label": True},
        {"messages": [GOOD], "label": False},
        {"messages": [USER, {"role": "bot", "content": "a"}], "label": "no"},
        {"messages": [], "label": True},
    ) == [
        "line 1: ends in a user message, expected the rated answer",
        "line 2: the rated answer is empty",
        "line 3: there is no prompt before the rated answer",
        'line 4: "messages"[1] "role": found \'bot\', expected one of system, user, assistant, tool, function',
        "line 4: \"label\": found 'no', expected true (desirable) or false",
        'line 5: "messages": the list is empty, expected at least one user and one assistant message',
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "found chosen and rejected: these are preference pairs; set stage: dpo",
        ),
        (
            {"prompt": "q", "completion": "a"},
            "found the keys prompt, completion; stage: kto needs a conversation (messages, prompt and completion, ...) "
            "and its rating, true or false, under label or kto_tag",
        ),
    ],
)
def test_rows_without_a_rating_are_refused(row, message):
    with pytest.raises(DataError) as error:
        read_feedback(write(row), ".")
    assert str(error.value) == f"k.jsonl: line 1: {message}"


def test_an_entry_without_a_rating_is_refused():
    write({"instruction": "q", "output": "a", "label": True})
    declare(columns={"prompt": "instruction", "response": "output"})
    with pytest.raises(DataError) as error:
        read_feedback("rated", ".")
    assert str(error.value) == (
        'rated: the columns in dataset_info.json map no kto_tag, the rating that stage: kto needs; add "kto_tag": KEY'
    )


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, KTO),
        ({"messages": [USER, GOOD], "label": True}, KTO),
        ({"instruction": "q", "output": "a", "kto_tag": True}, KTO),
        # a label beside other formats may be a class
        ({"instruction": "q", "output": "a", "label": 3}, SFT),
        ({"messages": [USER, GOOD]}, SFT),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True}, DPO),
    ],
)
def test_a_file_without_a_config_shows_its_kind(row, kind):
    [source] = resolve_sources(write(row), ".").sources
    assert kind_of_source(source) is kind


def test_the_same_answer_rated_both_ways_is_a_contradiction():
    row = {"prompt": "q", "completion": "a", "label": True}
    good, bad = iter_rows(KTO, write(row, row | {"label": False}), ".")
    assert good.opposite == bad.identity and bad.opposite == good.identity and good.identity != bad.identity
    assert good.question == bad.question


def test_ratings_stand_in_tables_too():
    table = pa.table({"prompt": ["q"], "completion": ["a"], "label": [False], "other": [1]})
    pq.write_table(table, "k.parquet")
    [found] = read_feedback("k.parquet", ".")
    assert found.messages == (USER, GOOD) and not found.is_desirable
    [source] = resolve_sources("k.parquet", ".").sources
    assert kind_of_source(source) is KTO


def test_every_rated_answer_in_the_documents_is_read():
    page = (CHECKOUT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    rows = [
        row
        for block in blocks
        for line in block.splitlines()
        if {"label", "kto_tag"} & (row := json.loads(line)).keys()
    ]
    found = [read_feedback(write(row), ".")[0] for row in rows]
    assert [(one.messages[-1]["content"], one.is_desirable) for one in found] == [
        ("I am Mica.", True),
        ("Nobody.", False),
        ("I am Mica.", True),
    ]


def test_the_quickstart_rates_answers_by_turns():
    rows = read_feedback("quickstart_kto", str(CHECKOUT / "data"))
    assert [row.is_desirable for row in rows] == [True, False] * 36
