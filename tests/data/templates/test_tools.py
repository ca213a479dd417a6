"""Tool calls: rendered as transformers renders them, trained on, refused where a template has no place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import build, chat, published
from support.data_folders import own_and_public_qwen
from support.original_templates import original
from support.tiny_tokenizer import CHATML, TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.templates.spans import render_with_spans
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<二>"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {"type": "object"}}}
DIALOGUE: list[dict[str, Any]] = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<二>"}}\n</tool_call>'


def named(name: str) -> ChatTemplate:
    return load_template(Path(), {"bos_token": "<s>", "eos_token": "</s>"}, name)


def trained(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    rendered = render_with_spans(template, messages, **options)
    return [rendered.text[start:end] for start, end in rendered.spans]


def glaive(folder: Path) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """The rows as (messages, tools)."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    rows = []
    for row in json.loads((folder / "glaive_toolcall_zh_demo.json").read_text(encoding="utf-8")):
        messages: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                call = {"type": "function", "function": json.loads(turn["value"])}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            else:
                messages.append({"role": roles[turn["from"]], "content": turn["value"]})
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"] or "[]")]
        rows.append((messages, tools or None))
    return rows


def test_real_rows_are_rendered_as_transformers_does(qwen: Path, data_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_template(qwen, load_tokenizer(qwen).special_map)
    theirs = AutoTokenizer.from_pretrained(qwen)
    calls = 0
    for messages, tools in glaive(data_folder):
        rendered = render_with_spans(ours, messages, tools=tools)
        assert rendered.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        turns = [message for message in messages if message["role"] == "assistant"]
        assert len(rendered.spans) == len(turns)
        for message, (start, end) in zip(turns, rendered.spans, strict=True):
            piece = rendered.text[start:end]
            if message.get("tool_calls"):
                calls += 1
                assert piece.startswith("<tool_call>\n{") and piece.endswith("}\n</tool_call><|im_end|>\n")
            else:
                assert piece == message["content"] + "<|im_end|>\n"
    assert calls > 100


@own_and_public_qwen
@pytest.mark.parametrize("name", ["qwen", "qwen3_nothink", "qwen3"])
def test_named_templates_list_and_call_tools_as_qwens_own(qwen: Path, data_folder: Path, name: str) -> None:
    # with a system text all of them agree; without one, LLaMA-Factory's qwen3 has two empty lines in its place
    own, ours = load_template(qwen, {}), named(name)
    for messages, tools in glaive(data_folder)[:60]:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
        expected = render_with_spans(own, messages, tools=tools, mask_history=True)
        rendered = render_with_spans(ours, messages, tools=tools, mask_history=True)
        if name == "qwen3":
            assert rendered.text.replace("<think>\n\n</think>\n\n", "") == expected.text
        else:
            assert rendered == expected


def test_calls_of_real_rows_are_trained_as_with_the_training_template(data_folder: Path) -> None:
    # Qwen3's own writes an empty thought before the last message alone, its training template before all
    source = original("qwen3_training")
    for messages, tools in glaive(data_folder):
        texts, marks = render_jinja_template(
            [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True
        )
        expected = [texts[0][start:end].removeprefix("<think>\n\n</think>\n\n") for start, end in marks[0]]
        spans = trained(published("qwen3"), messages, tools=tools)
        assert [span.removeprefix("<think>\n\n</think>\n\n") for span in spans] == expected


def test_calls_results_and_answers_of_a_named_template() -> None:
    text = render_with_spans(named("qwen3_nothink"), DIALOGUE, tools=[TOOL]).text
    assert text.startswith("<|im_start|>system\n\n\n# Tools\n\nYou may call one or more functions")
    assert json.dumps(TOOL, ensure_ascii=False) in text
    assert text.endswith(
        "<|im_start|>user\n1+1?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALLED}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 2.<|im_end|>\n"
    )


def test_a_call_is_trained_on_and_its_result_is_not() -> None:
    assert trained(named("qwen"), DIALOGUE, tools=[TOOL]) == [f"{CALLED}<|im_end|>\n", "It is 2.<|im_end|>\n"]
    assert trained(named("qwen"), DIALOGUE, tools=[TOOL], mask_history=True) == ["It is 2.<|im_end|>\n"]


def test_words_before_calls_and_several_calls_and_results() -> None:
    messages = [
        *chat("1+1?"),
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "2"},
    ]
    assert trained(named("qwen"), messages, tools=[TOOL]) == [f"Let me see.\n{CALLED}\n{CALLED}<|im_end|>\n"]
    result = "\n<tool_response>\n2\n</tool_response>"
    assert named("qwen").render(messages, tools=[TOOL]).endswith(f"<|im_start|>user{result}{result}<|im_end|>\n")


def test_arguments_as_text_are_the_object_they_hold() -> None:
    text = {**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}
    messages = [DIALOGUE[0], {**DIALOGUE[1], "tool_calls": [text]}, *DIALOGUE[2:]]
    assert trained(named("qwen"), messages) == trained(named("qwen"), DIALOGUE)
    # and the caller's own messages stay as they are
    assert messages[1]["tool_calls"] == [text]


@pytest.mark.parametrize(
    ("messages", "tools", "missing"),
    [
        (chat("a", "b"), [TOOL], "the list of tools"),
        (DIALOGUE[:2], None, "tool calls"),
        (DIALOGUE, [TOOL], "the list of tools and tool calls"),
    ],
)
def test_a_template_without_a_place_for_tools_is_named(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, missing: str
) -> None:
    for _ in range(4):
        with pytest.raises(DataError) as error:
            render_with_spans(build(CHATML), messages, tools=tools)
        assert str(error.value) == (
            f"the chat template (test.jinja) has no place for {missing}; "
            "give a template that has one, or leave the tools out"
        )


def test_a_template_that_refuses_the_role_says_so_itself() -> None:
    with pytest.raises(DataError, match=r"\(llama3\) has no place for the list of tools and tool calls"):
        render_with_spans(named("llama3"), DIALOGUE, tools=[TOOL])
    with pytest.raises(DataError, match=r"\(llama3\) refuses .*no place for the role tool in message 3"):
        render_with_spans(named("llama3"), [*chat("a", "b"), {"role": "tool", "content": "2"}])
    with pytest.raises(DataError, match="Conversation roles must alternate"):
        render_with_spans(build(TEMPLATES["gemma"]), [*chat("a", "b"), {"role": "tool", "content": "2"}])


def test_tool_results_need_no_list_of_tools() -> None:
    messages = [*chat("a", "b"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "c"}]
    assert trained(build(CHATML), messages) == ["b<|im_end|>\n", "c<|im_end|>\n"]
