"""Preference rows of every known format become the same pair, and each problem is named."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from support.data_rows import holds_pairs, read_examples, read_pairs, to_examples, to_pairs
from support.paths import CHECKOUT

from macft.data.formats.dataset import split_examples
from macft.data.formats.pairs import PairExample
from macft.errors import DataError


def said(*contents: str, start: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test writes its rows into a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any]) -> Path:
    path = Path("p.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(**row: Any) -> PairExample:
    [found] = to_pairs(write(row))
    return found


def problems(*rows: dict[str, Any]) -> list[str]:
    """The listed problems of these rows of one file."""
    with pytest.raises(DataError) as error:
        list(to_pairs(write(*rows)))
    headline, *listed = str(error.value).split("\n")
    assert headline.startswith(f"p.jsonl: {len(listed)} problem")
    return [line.strip() for line in listed]


SYSTEM = {"role": "system", "content": "s"}
PROMPT = [SYSTEM, *said("q1", "a1", "q2")]
GOOD, BAD = said("good", start="assistant"), said("bad", start="assistant")
EXPECTED = PairExample(tuple(PROMPT), tuple(GOOD), tuple(BAD), "p.jsonl:1")


# --- formats


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q2", "history": [["q1", "a1"]], "system": "s", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [
                *[{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}],
                {"from": "human", "value": "q2"},
            ],
            "system": "s",
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "conversations": [
                *[{"from": "system", "value": "s"}, {"from": "human", "value": "q1"}],
                *[{"from": "gpt", "value": "a1"}, {"from": "human", "value": "q2"}],
            ],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": "good", "rejected": BAD},
        {"chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {"prompt": PROMPT, "chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {"prompt": "q2", "chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
        {"prompt": None, "chosen": [*PROMPT, *GOOD], "rejected": [*PROMPT, *BAD]},
    ],
    ids=["alpaca", "sharegpt", "sharegpt system turn", "explicit", "mixed", "implicit", "repeated", "text", "null"],
)
def test_every_format_gives_the_same_pair(row: dict[str, Any]) -> None:
    assert pair(**row) == EXPECTED


def test_strings_are_turns() -> None:
    found = pair(prompt="q", chosen="good", rejected="bad")
    assert (found.prompt, found.chosen, found.rejected) == (tuple(said("q")), tuple(GOOD), tuple(BAD))


def test_alpaca_input_goes_below_the_instruction() -> None:
    assert pair(instruction="do", input="it", chosen="good", rejected="bad").prompt == tuple(said("do\nit"))


def test_answers_may_have_several_turns() -> None:
    long = said("good", "more?", "yes", start="assistant")
    found = pair(prompt="q", chosen=long, rejected="bad")
    assert (found.chosen, found.rejected) == (tuple(long), tuple(BAD))


def test_an_implicit_prompt_ends_before_the_last_message() -> None:
    # TRL's rule, also where one side is the beginning of the other, or the same
    longer = pair(chosen=said("q", "a", "q2", "a2"), rejected=said("q", "a"))
    assert longer.prompt == tuple(said("q")) and longer.chosen == tuple(said("a", "q2", "a2", start="assistant"))
    same = pair(chosen=said("q", "a"), rejected=said("q", "a"))
    assert (same.prompt, same.chosen, same.rejected) == (
        tuple(said("q")),
        *[tuple(said("a", start="assistant"))] * 2,
    )


def test_implicit_prompts_are_split_as_trl_splits_them() -> None:
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    for chosen, rejected in (
        (said("q", "good"), said("q", "bad")),
        ([*PROMPT, *GOOD], [*PROMPT, *BAD]),
        (said("q", "a", "q2", "a2"), said("q", "a")),
        (said("q", "same", "q2", "good"), said("q", "same", "q2", "bad")),
        (said("q", "same"), said("q", "same")),
    ):
        theirs = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
        ours = pair(chosen=chosen, rejected=rejected)
        assert theirs == {key: list(getattr(ours, key)) for key in ("prompt", "chosen", "rejected")}


# --- problems


def test_problems_of_preference_rows_are_all_named() -> None:
    assert problems(
        {"prompt": "q", "chosen": "a"},
        {"prompt": 3, "chosen": [], "rejected": {"role": "assistant", "content": "b"}},
        {"prompt": "q", "chosen": [{"role": "gpt", "content": "a"}], "rejected": ["b"]},
        {"chosen": "a", "rejected": "b"},
        {"chosen": said("q", "a"), "rejected": said("Q", "b")},
        {"chosen": said("q", "a", "x", "b"), "rejected": said("q", "a", "y", "c")},
        {"prompt": "p", "chosen": said("q", "a"), "rejected": said("q", "b")},
        {"prompt": " \n", "chosen": "a", "rejected": "b"},
        {"prompt": said("q", "a"), "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": said("a", "x", start="assistant"), "rejected": " "},
        {"prompt": "q", "chosen": "\ud83d", "rejected": "b", "tools": [{}]},
    ) == [
        'line 1: no "rejected"; a pair needs chosen and rejected, found prompt, chosen',
        'line 2: "chosen": the list is empty, expected at least one message',
        'line 2: "rejected": found an object, expected a string or a list of messages',
        'line 2: "prompt": found a number, expected a string or a list of messages',
        'line 3: "chosen"[0] "role": found \'gpt\', expected one of system, user, assistant, tool, function',
        'line 3: "rejected"[0]: found a string, expected an object with role and content',
        'line 4: no "prompt"; a pair needs prompt, or chosen and rejected that begin with the same messages, '
        "found chosen, rejected",
        "line 5: chosen and rejected answer different prompts: they diverge at message 1",
        "line 6: chosen and rejected answer different prompts: they diverge at message 3",
        'line 7: "prompt": differs from the messages that chosen and rejected begin with; correct or remove it',
        "line 8: the prompt is empty: it holds no user text and no system text",
        "line 9: the prompt ends in an assistant message, expected a user message",
        'line 10: "chosen": ends in a user message, expected an assistant message',
        'line 10: "rejected": the answer is empty',
        'line 11: "tools": tool definitions are not supported in preference pairs; remove them',
        'line 11: "chosen": half a character (\\ud83d) at position 0',
    ]


def test_problems_of_sharegpt_rows_are_all_named() -> None:
    good = {"from": "gpt", "value": "a"}
    asked = [{"from": "human", "value": "q"}]
    assert problems(
        {"conversations": asked, "chosen": good},
        {"conversations": [{"from": "observation", "value": "q"}], "chosen": good, "rejected": good},
        {"conversations": [{"speaker": "user", "text": "q"}], "chosen": good, "rejected": "b"},
        {"conversations": [{"from": "system", "value": "t"}, *asked], "system": "s", "chosen": good, "rejected": good},
        {"conversations": [*asked, good], "chosen": {"from": "human", "value": "a"}, "rejected": good},
        {"conversations": [], "chosen": good, "rejected": good, "tools": "[]"},
        {"conversations": asked, "chosen": good, "rejected": good, "tools": '[{"name": "f"}]'},
        {"conversations": asked, "chosen": {"from": "human", "value": "a"}, "rejected": good},
        {"conversations": [*asked, *asked, good], "chosen": good, "rejected": good},
    ) == [
        'line 1: no "rejected"; a pair needs conversations, chosen and rejected, found conversations, chosen',
        "line 2: tool calls are not supported in preference pairs; write them into the content",
        'line 3: "conversations"[0]: no "from"; found the keys speaker, text',
        'line 3: "conversations"[0]: no "value"; found the keys speaker, text',
        'line 3: "rejected": found a string, expected an object with from and value',
        'line 4: "system": "conversations" also hold a system message; keep one of the two',
        'line 5: "conversations": an even number of turns (2), the last must be human or observation',
        'line 6: "conversations": the list is empty, expected at least one question',
        'line 7: "tools": tool definitions are not supported in preference pairs; remove them',
        'line 8: "chosen": ends in a user message, expected an assistant message',
        'line 9: "conversations"[1] "from": found human, expected gpt or function_call: questions and answers '
        "take turns",
    ]


def test_problems_of_alpaca_rows_are_all_named() -> None:
    assert problems(
        {"instruction": "q", "chosen": "a"},
        {"instruction": "", "input": "", "chosen": "a", "rejected": ""},
        {"instruction": "q", "chosen": {"from": "gpt"}, "rejected": "b", "history": [["q"]]},
    ) == [
        'line 1: no "rejected"; an alpaca row needs instruction, chosen and rejected, found instruction, chosen',
        "line 2: the prompt is empty: it holds no user text and no system text",
        'line 2: "rejected": the answer is empty',
        'line 3: "chosen": found an object, expected a string',
        'line 3: "history"[0]: found a list of 1, expected a list of question and answer',
    ]


def test_rows_of_the_other_stage_name_the_stage_that_fits(tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": said("q", "a")}))
    with pytest.raises(DataError) as error:
        read_pairs("sft", str(tmp_path), None)
    assert str(error.value) == (
        f"{tmp_path / 'sft.jsonl'}: line 1: found the keys messages; a preference stage needs prompt, chosen and "
        "rejected; to train on single answers set stage: sft"
    )
    (tmp_path / "dpo.jsonl").write_text(json.dumps({"instruction": "q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError) as error:
        read_examples("dpo", str(tmp_path), None)
    assert str(error.value) == (
        f"{tmp_path / 'dpo.jsonl'}: line 1: found chosen and rejected: these are preference pairs; set stage: dpo"
    )
    assert holds_pairs("dpo", str(tmp_path)) and not holds_pairs("sft,dpo", str(tmp_path))
    assert not holds_pairs("missing", str(tmp_path))


def test_rows_that_hold_both_serve_both_stages(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": said("q", "a"), "rejected": said("q", "b"), "messages": said("q", "a")}
    (tmp_path / "both.jsonl").write_text(json.dumps(row))
    assert read_examples("both", str(tmp_path), None)[0].messages == tuple(said("q", "a"))
    assert read_pairs("both", str(tmp_path), None)[0].chosen == tuple(said("a", start="assistant"))


# --- warnings


def test_placeholders_and_unused_keys_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "q", "chosen": [{**GOOD[0], "score": 1}], "rejected": "I am {{name}}", "id": 7}
    with caplog.at_level(logging.INFO, logger="macft"):
        list(to_pairs(write(row, row)))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "p.jsonl: 2 preference rows"
    assert messages[1].startswith("p.jsonl: 2 of 2 rows hold the placeholders {{name}} or {{author}} (first: line 1)")
    assert messages[2:] == ["p.jsonl: unused keys: chosen[].score, id"]


# --- whole files


def test_the_split_takes_pairs() -> None:
    pairs = [PairExample((), (), (), f"x:{i}") for i in range(20)]
    train, valid = split_examples(pairs, 0.1, seed=1)
    assert len(valid) == 2 and sorted([*train, *valid], key=pairs.index) == pairs


def test_a_ranking_file_is_read_whole(data_folder: Path) -> None:
    rows = json.loads((data_folder / "dpo_zh_demo.json").read_text(encoding="utf-8"))
    pairs = read_pairs("dpo_zh_demo", str(data_folder), None)
    assert len(pairs) == len(rows) > 50
    for row, found in zip(rows, pairs, strict=True):
        assert [m["content"] for m in found.prompt] == [turn["value"] for turn in row["conversations"]]
        assert found.prompt[-1]["role"] == "user" and found.chosen[0]["content"] == row["chosen"]["value"]
        assert (
            len(found.chosen) == len(found.rejected) == 1 and found.rejected[0]["content"] == row["rejected"]["value"]
        )


def test_rows_whose_answers_repeat_the_prompt_are_read_whole(tmp_path: Path, data_folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = parquet.read_table(data_folder / "mini_qwen" / "dpo_train.parquet").to_pylist()
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    pairs = read_pairs(str(path), "", None)
    assert len(pairs) == len(rows) > 50
    for row, found in zip(rows, pairs, strict=True):
        assert found.prompt == ({"role": "user", "content": row["prompt"]},)
        assert [m["content"] for m in (*found.chosen, *found.rejected)] == [
            row["chosen"][1]["content"],
            row["rejected"][1]["content"],
        ]


def test_no_shipped_question_or_answer_comes_twice() -> None:
    pairs = read_pairs("quickstart_pairs", str(CHECKOUT / "data"), None)
    answers = [[m["content"] for m in (*one.chosen, *one.rejected)] for one in pairs]
    assert len(pairs) == len({one.prompt[0]["content"] for one in pairs}) >= 64
    assert len({text for both in answers for text in both}) == 2 * len(pairs)


# --- the documents


def test_every_pair_in_the_documents_says_the_same() -> None:
    page = (CHECKOUT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    pairs = [pair(**row) for row in rows if "chosen" in row]
    assert len(pairs) == 6
    for found in pairs:
        assert [m["content"] for m in found.messages] == ["Who are you?", "I am Mica.", "Nobody."]
    unrated = [{key: value for key, value in row.items() if key not in ("label", "kto_tag")} for row in rows]
    examples = [next(to_examples(write(row))) for row in unrated if "chosen" not in row and "text" not in row]
    assert [len(example.messages) for example in examples] == [2, 2, 2, 2, 3, 4, 4, 2, 2, 2, 2]
