"""Rows as other programs write them become the same conversations, and every problem is named by file, row and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.data_rows import read_examples, read_pairs, read_texts, to_examples

from macft.data.formats.conversations import Example
from macft.errors import DataError

SAID = (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test writes its rows into a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any]) -> Path:
    path = Path("r.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def example(**row: Any) -> Example:
    [found] = to_examples(write(row))
    return found


def problems(*rows: dict[str, Any]) -> list[str]:
    with pytest.raises(DataError) as error:
        list(to_examples(write(*rows)))
    headline, *listed = str(error.value).split("\n")
    assert headline.startswith(f"r.jsonl: {len(listed)} problem")
    return [line.strip() for line in listed]


def plain(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in turns]


# --- shapes


@pytest.mark.parametrize(
    "row",
    [
        {"messages": plain(*SAID)},
        {"conversations": sharegpt(("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"))},
        {"conversations": plain(*SAID)},
        {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]},
        {"query": "q2", "response": "a2", "history": [["q1", "a1"]]},
        {"prompt": "q2", "response": "a2", "history": [["q1", "a1"]]},
        {"prompt": plain(*SAID[:3]), "completion": plain(SAID[3])},
        {"prompt": plain(*SAID[:3]), "completion": "a2"},
        {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in SAID], "tools": "[]"},
    ],
    ids=["messages", "ShareGPT", "roles", "alpaca", "swift", "response", "TRL", "mixed", "parts"],
)
def test_every_format_gives_the_same_conversation(row: dict[str, Any]) -> None:
    found = example(**row)
    assert [(m["role"], m["content"]) for m in found.messages] == list(SAID) and found.tools is None


def test_a_prompt_and_a_completion_are_a_question_and_an_answer() -> None:
    assert example(prompt="q", completion="a").messages == tuple(plain(("user", "q"), ("assistant", "a")))


@pytest.mark.parametrize("key", ["query", "instruction", "conversations"])
def test_a_system_key_comes_first(key: str) -> None:
    rows = {
        "query": {"query": "q", "response": "a"},
        "instruction": {"instruction": "q", "output": "a"},
        "conversations": {"conversations": sharegpt(("human", "q"), ("gpt", "a"))},
    }
    assert example(**rows[key], system="s").messages[0] == {"role": "system", "content": "s"}


def test_the_format_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="macft"):
        example(conversations=sharegpt(("human", "q"), ("gpt", "a")))
        example(query="q", response="a")
    assert caplog.messages == ["r.jsonl: 1 ShareGPT row", "r.jsonl: 1 query and response row"]


# --- order


def test_problems_of_the_order_of_turns_are_all_named() -> None:
    ask, answer = ("human", "q"), ("gpt", "a")
    assert problems(
        {"conversations": sharegpt(ask, ask, answer)},
        {"conversations": sharegpt(ask, answer, ask)},
        {"conversations": sharegpt(answer, ask)},
        {"conversations": sharegpt(ask, answer, ("system", "s"), answer)},
        {"conversations": []},
        {"conversations": sharegpt(("system", "s"))},
        {"conversations": sharegpt(ask, ("chatgpt", "a"))},
        {"conversations": sharegpt(("system", "s"), ask, answer), "system": "t"},
        {"dialog": []},
    ) == [
        'line 1: "conversations"[1] "from": found human, expected gpt or function_call: questions and answers '
        "take turns",
        'line 2: "conversations": an odd number of turns (3), the last must be gpt or function_call',
        'line 3: "conversations"[0] "from": found gpt, expected human or observation: questions and answers take turns',
        'line 4: "conversations"[2] "from": found system, expected human or observation: questions and answers '
        "take turns",
        'line 5: "conversations": the list is empty, expected at least one question and answer',
        'line 6: "conversations": the list is empty, expected at least one question and answer',
        'line 7: "conversations"[1] "from": found \'chatgpt\', expected one of human, gpt, system, function_call, '
        "observation",
        'line 8: "system": "conversations" also hold a system message; keep one of the two',
        'line 9: no "conversations"; found the keys dialog',
    ]


def test_problems_past_twenty_are_counted() -> None:
    with pytest.raises(DataError) as error:
        list(to_examples(write(*({"conversations": []} for _ in range(250)))))
    lines = str(error.value).split("\n")
    assert lines[0] == "r.jsonl: 250 problems in ShareGPT rows"
    assert lines[20].startswith("  line 20:") and lines[21:] == ["  ... and 230 more"]


def test_nothing_follows_the_first_problem() -> None:
    good = {"conversations": sharegpt(("human", "q"), ("gpt", "a"))}
    stream = to_examples(write(good, {"conversations": []}, good))
    assert next(stream).source == "r.jsonl:1"
    with pytest.raises(DataError):
        next(stream)


def test_a_missing_key_names_the_likely_one() -> None:
    assert problems(
        {"instruction": "q", "output": "a"}, {"instruction": "q", "answer": "a"}, {"instruction": "q", "ouput": "a"}
    ) == [
        'line 2: no "output"; an alpaca row needs instruction and output, found instruction, answer; '
        "if answer is meant, rename it or map it in dataset_info.json",
        'line 3: no "output"; an alpaca row needs instruction and output, found instruction, ouput; '
        "if ouput is meant, rename it or map it in dataset_info.json",
    ]


# --- tools


def test_function_calls_become_tool_calls() -> None:
    calls = json.dumps([{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}])
    found = example(
        conversations=sharegpt(("human", "q"), ("function_call", calls), ("observation", "7"), ("gpt", "a")),
        tools=json.dumps([TOOL]),
    )
    second = {"type": "function", "function": {"name": "g", "arguments": {}}}
    assert found.messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, second]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "a"},
    )
    assert found.tools == ({"type": "function", "function": TOOL},)


def test_a_thought_before_a_function_call_is_kept_as_content() -> None:
    text = '<think>hm</think>\n{"name": "f", "arguments": {"x": 1}}'
    found = example(conversations=sharegpt(("human", "q"), ("function_call", text)))
    assert found.messages[1] == {"role": "assistant", "content": "<think>hm</think>\n", "tool_calls": [CALL]}


def test_openai_tool_rows_keep_their_ids() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "tool", "content": "7", "tool_call_id": "c", "name": "f"}
    asked = {"role": "assistant", "tool_calls": [call]}
    found = example(messages=[{"role": "user", "content": "q"}, asked, answer], tools=[{"function": TOOL}])
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c"}]}
    assert found.messages[2] == answer and found.tools == ({"function": TOOL},)


# --- thoughts in a field of their own


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_read_under_every_name_in_every_form(key: str, caplog: pytest.LogCaptureFixture) -> None:
    thought = {"role": "assistant", "reasoning_content": "hm", "content": "a"}
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", key: "hm", "content": "a"}
    value = {"from": "gpt", "value": "a", key: "hm"}
    for row in (
        {"messages": [question, answer]},
        {"messages": [{**question, key: None}, answer | {"tool_calls": None}]},
        {"conversations": [{"from": "human", "value": "q", key: ""}, value]},
        {"prompt": [question], "completion": [answer]},
    ):
        found = example(**row)
        assert found.messages == (question, thought) and found.texts == ("q", "hm", "a")
    [pair] = read_pairs(str(write({"prompt": [question], "chosen": [answer], "rejected": [answer]})), "", None)
    assert pair.chosen == pair.rejected == (thought,)
    called = example(
        conversations=[*sharegpt(("human", "q")), {**value, "from": "function_call", "value": json.dumps(CALL)}]
    )
    assert called.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}
    assert not [one for one in caplog.messages if "unused keys" in one]


def test_an_empty_thought_is_none_and_two_equal_ones_are_one() -> None:
    def answered(**keys: Any) -> dict[str, Any]:
        return example(
            messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **keys}]
        ).messages[1]

    assert answered(reasoning_content=" \n", thinking=None) == {"role": "assistant", "content": "a"}
    assert answered(reasoning_content="hm", thinking="hm")["reasoning_content"] == "hm"


def test_thoughts_of_a_user_of_two_kinds_and_of_no_text_are_refused() -> None:
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    assert problems(
        {"messages": [{**question, "thinking": "hm"}, answer]},
        {"messages": [question, {**answer, "reasoning_content": "x", "thinking": "y"}]},
        {"messages": [question, {**answer, "reasoning": {"effort": "low"}}]},
    ) == [
        'line 1: "messages"[0] "thinking": found in a user message, expected an assistant message',
        'line 2: "messages"[1]: reasoning_content and thinking hold different thoughts; keep one of them',
        'line 3: "messages"[1] "reasoning": found an object, expected a string',
    ]


def test_problems_of_tool_rows_are_all_named() -> None:
    def called(text: Any) -> dict[str, Any]:
        return {"conversations": sharegpt(("human", "q"), ("function_call", text))}

    assert problems(
        called("f(1)"),
        called('{"name": "f"}'),
        called('{"name": "f", "arguments": "1, 2"}'),
        called('{"name": "f", "arguments": [1]}'),
        called(None),
        {**called('{"name": "f", "arguments": {}}'), "tools": "[{"},
        {**called('{"name": "f", "arguments": {}}'), "tools": {"name": "f"}},
        {**called('{"name": "f", "arguments": {}}'), "tools": [{"title": "f"}, 3]},
    ) == [
        'line 1: "conversations"[1] "value": found \'f(1)\', expected tool calls as JSON (Expecting value: line 1 '
        "column 1 (char 0))",
        'line 2: "conversations"[1] "value"[0]: found the keys name, expected an object with name and arguments',
        'line 3: "conversations"[1] "value"[0] "arguments": found \'1, 2\', expected JSON (Extra data: line 1 column 2 '
        "(char 1))",
        'line 4: "conversations"[1] "value"[0] "arguments": found a list, expected an object',
        'line 5: "conversations"[1] "value": found null, expected a string',
        "line 6: \"tools\": found '[{', expected a list of tools as JSON (Expecting property name enclosed in double "
        "quotes: line 1 column 3 (char 2))",
        'line 7: "tools": found an object, expected a list of tools',
        'line 8: "tools"[0]: found the keys title, expected an object with a name',
        'line 8: "tools"[1]: found a number, expected an object with a name',
    ]


def test_parts_that_are_no_text_and_calls_of_a_user_are_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert problems(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]},
        {"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}]},
    ) == [
        'line 1: "messages"[0] "content"[1]: found a part of type \'image_url\', expected text; only text is '
        "trained on",
        'line 2: "messages"[0] "tool_calls": found in a user message, expected an assistant message',
    ]


# --- other stages


def test_rows_of_another_stage_name_it() -> None:
    def refusal(read: Any, row: dict[str, Any]) -> str:
        with pytest.raises(DataError) as error:
            read(str(write(row)), "", None)
        return str(error.value).removeprefix("r.jsonl: line 1: ")

    assert refusal(read_examples, {"text": "x"}).endswith("set stage: pt to continue pre-training on them")
    assert refusal(read_examples, {"prompt": "x", "chosen": "a", "rejected": "b"}).endswith("set stage: dpo")
    assert refusal(read_pairs, {"prompt": "x", "completion": "a"}).endswith("set stage: sft")
    assert refusal(read_texts, {"messages": []}).endswith("to train on answers set stage: sft")
    assert refusal(read_texts, {"text": None}).endswith('line 1: "text": found null, expected a string')


def test_text_rows_are_texts() -> None:
    texts = read_texts(str(write({"text": "one", "id": 1}, {"text": ""})), "", None)
    assert [(t.text, t.source) for t in texts] == [("one", "r.jsonl:1"), ("", "r.jsonl:2")]
