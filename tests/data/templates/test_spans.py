"""Trained character spans, written out by hand for each kind of template."""

from __future__ import annotations

from typing import Any

import pytest
from support.chat_templates import build, chat, published
from support.tiny_tokenizer import CHATML, CHATML_GENERATION, TEMPLATES

from macft.data.templates.spans import render_with_spans
from macft.errors import DataError


def trained(name: str, messages: list[dict[str, Any]], **options: bool) -> list[str]:
    """The texts of the trained spans."""
    rendered = render_with_spans(build(TEMPLATES.get(name, name)), messages, **options)
    assert rendered.text == build(TEMPLATES.get(name, name)).render(messages)
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("chatml", ["b<|im_end|>\n", "d<|im_end|>\n"]),
        ("chatml_generation", ["b<|im_end|>\n", "d<|im_end|>\n"]),
        ("default_system", ["b<|im_end|>\n", "d<|im_end|>\n"]),
        ("llama3", ["b<|eot_id|>", "d<|eot_id|>"]),
        ("gemma", ["b<end_of_turn>\n", "d<end_of_turn>\n"]),
        ("mistral", [" b</s>", " d</s>"]),
        # the last answer follows the last question, so its empty thinking is rendered and trained
        ("qwen3", ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"]),
    ],
)
def test_a_span_is_the_answer_with_its_end(name: str, spans: list[str]) -> None:
    assert trained(name, chat("a", "b", "c", "d")) == spans


@pytest.mark.parametrize("name", ["chatml", "default_system", "llama3", "mistral", "qwen3"])
def test_a_system_prompt_is_never_in_a_span(name: str) -> None:
    spans = trained(name, chat("q one", "first", "q two", "second", system="Be brief."))
    assert len(spans) == 2 and "first" in spans[0] and "second" in spans[1]
    assert not any("Be brief" in span or "q " in span or "assistant" in span for span in spans)


def test_a_system_prompt_moved_into_the_last_question_keeps_earlier_answers_whole() -> None:
    # here neither the prompt nor the rendered turn of "b" is a prefix of the full text
    assert trained("mistral", chat("a", "b", "c", "d", system="S")) == [" b</s>", " d</s>"]
    assert trained("mistral", chat("a", "b b", "c", "", "e", "f", system="S")) == [
        " b b</s>",
        " </s>",
        " f</s>",
    ]


def test_thinking_dropped_from_earlier_answers_is_not_in_their_spans() -> None:
    messages = chat("a", "<think>\n\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
    assert trained("qwen3", messages) == ["b<|im_end|>\n", "<think>\ny\n</think>\n\nd<|im_end|>\n"]


def test_an_empty_answer_trains_its_end() -> None:
    assert trained("chatml", chat("a", "", "c", "")) == ["<|im_end|>\n", "<|im_end|>\n"]
    assert trained("llama3", chat("a", "  ")) == ["<|eot_id|>"]
    assert trained("qwen3", chat("a", "", "c", "d"))[0] == "<|im_end|>\n"


def test_stripped_content_leaves_no_blanks_in_the_span() -> None:
    assert trained("llama3", chat(" a ", "\n b \n", "c", " d")) == ["b<|eot_id|>", "d<|eot_id|>"]


def test_chinese_and_wide_characters_are_counted_as_characters() -> None:
    assert trained("chatml", chat("你好👋", "我是𠮷", "再", "见")) == ["我是𠮷<|im_end|>\n", "见<|im_end|>\n"]


def test_an_answer_that_repeats_its_surroundings_is_placed_right() -> None:
    # searching for the answer's text would find it earlier
    assert trained("chatml", chat("user", "user", "assistant", "<|im_end|>\n")) == [
        "user<|im_end|>\n",
        "<|im_end|>\n<|im_end|>\n",
    ]
    assert trained("mistral", chat("b", "b", "b", "b", system="b")) == [" b</s>", " b</s>"]


def test_an_opening_assistant_turn_is_trained_from_its_content_on() -> None:
    opening = [{"role": "assistant", "content": "welcome"}, *chat("a", "b")]
    assert trained("chatml", opening) == ["welcome<|im_end|>\n", "b<|im_end|>\n"]
    # this template cannot render an empty conversation
    assert trained("default_system", opening) == ["welcome<|im_end|>\n", "b<|im_end|>\n"]


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        # a default system text, the first token and the header come before it
        ("qwen2_5_vl", ["welcome<|im_end|>\n", "b<|im_end|>\n"]),
        ("llama3", ["welcome<|eot_id|>", "b<|eot_id|>"]),
        ("gptoss", ["<|channel|>final<|message|>welcome<|return|>"]),
        # refuses a conversation without a question, which the first answer alone is
        ("qwen3_8", ["\n</think>\n\nwelcome<|im_end|>\n", "\n</think>\n\nb<|im_end|>\n"]),
        # what is between the prompt, <think>\n, and the content is written by the model
        ("nemotron_3_nano", ["</think>welcome<|im_end|>\n", "</think>b<|im_end|>\n"]),
        ("glm4moe", ["\n<think></think>\nwelcome", "\n<think></think>\nb"]),
        ("diffusion_gemma", ["welcome<turn|>\n", "b<turn|>\n"]),
    ],
)
def test_an_opening_assistant_turn_is_trained_as_an_answer_to_a_question(name: str, spans: list[str]) -> None:
    opening = [{"role": "assistant", "content": "welcome"}, *chat("a", "b")]
    rendered = render_with_spans(published(name), opening if len(spans) > 1 else opening[:1])
    assert [rendered.text[start:end] for start, end in rendered.spans] == spans


def test_an_opening_answer_begins_after_the_blank_that_a_template_writes_before_each() -> None:
    opening = [{"role": "assistant", "content": "welcome"}, *chat("a", "b")]
    assert trained("mistral", opening) == [" welcome</s>", " b</s>"]
    # it writes nothing at all for a prompt after nothing
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if messages and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    for _ in range(4):  # the fourth time without Jinja
        assert trained(source, opening) == ["welcome</s>", "b</s>"]


def test_two_answers_in_a_row_are_two_spans() -> None:
    messages = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    assert trained("chatml", messages) == ["b<|im_end|>\n", "c<|im_end|>\n"]


def test_an_answer_after_one_that_loses_its_empty_thought_has_its_own_span() -> None:
    # the prompt for the second answer renders the first one with the thought, so it is no prefix of the text
    messages = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    rendered = render_with_spans(published("qwen3"), messages)
    assert [rendered.text[start:end] for start, end in rendered.spans] == [
        "b<|im_end|>\n",
        "<think>\n\n</think>\n\nc<|im_end|>\n",
    ]


def test_calls_that_lose_their_empty_thought_are_trained_with_their_end() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How warm is it in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": '{"celsius": 4}'},
        {"role": "assistant", "content": "Once more, in both", "tool_calls": [call, call]},
        {"role": "tool", "name": "weather", "content": '{"celsius": 4}'},
        {"role": "tool", "name": "weather", "content": '{"celsius": 4}'},
        {"role": "assistant", "content": "It is 4 degrees in Oslo."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    rendered = render_with_spans(published("qwen3"), messages, tools=tools)
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert [rendered.text[start:end] for start, end in rendered.spans] == [
        f"{called}<|im_end|>\n",
        f"Once more, in both\n{called}\n{called}<|im_end|>\n",
        "<think>\n\n</think>\n\nIt is 4 degrees in Oslo.<|im_end|>\n",
    ]


@pytest.mark.parametrize("name", ["phi3", "phi3_5"])
def test_an_end_of_text_after_the_last_answer_alone_leaves_earlier_ones_their_end(name: str) -> None:
    for _ in range(4):  # the fourth time without Jinja
        for system in (None, "S"):
            rendered = render_with_spans(published(name), chat("a", "b <", "c", "", "e", "f", system=system))
            assert [rendered.text[start:end] for start, end in rendered.spans] == [
                "b <<|end|>\n",
                "<|end|>\n",
                "f<|end|>\n</s>",
            ]


def test_a_marker_is_never_cut_in_two() -> None:
    # the prompt opens a thought, and the answer begins with another marker
    forced = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    assert trained(forced, chat("a", "<tool_call>b")) == ["<tool_call>b<|im_end|>\n"]
    assert trained(forced, chat("a", "<b>b", "c", "d")) == ["<b>b<|im_end|>\n", "d<|im_end|>\n"]


def test_tool_results_are_prompt() -> None:
    messages = [*chat("a", "b"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "c"}]
    assert trained("chatml", messages) == ["b<|im_end|>\n", "c<|im_end|>\n"]


def test_a_longer_generation_prompt_is_cut_where_the_texts_part() -> None:
    forced = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    assert trained(forced, chat("a", "b")) == ["b<|im_end|>\n"]
    assert trained(forced, chat("a", "<think>b")) == ["b<|im_end|>\n"]


def test_mask_history_trains_only_the_last_answer() -> None:
    assert trained("chatml", chat("a", "b", "c", "d"), mask_history=True) == ["d<|im_end|>\n"]
    assert trained("chatml", chat("a", "b", "c"), mask_history=True) == ["b<|im_end|>\n"]


def test_train_on_prompt_is_the_whole_text() -> None:
    assert trained("chatml", chat("a", "b"), train_on_prompt=True) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    ]


def test_no_assistant_turn_has_no_span() -> None:
    assert trained("chatml", chat("a")) == []


def test_an_end_only_after_the_last_turn_is_refused_by_name() -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '</s>' }}{% else %}{{ '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(DataError) as error:
        trained(source, chat("a", "b", "c", "d"))
    assert "(test.jinja) renders message 2 (assistant) differently" in str(error.value)
    assert trained(source, chat("a", "b", "c", "d"), mask_history=True) == ["d</s>"]


def test_another_end_after_the_last_turn_is_refused_by_name() -> None:
    # generation stops at <|return|>, not at the <|end|> of earlier answers
    with pytest.raises(DataError, match=r"message 2 .assistant. differently once more turns follow"):
        render_with_spans(published("gptoss"), chat("a", "b", "c", "d"))


def test_a_template_that_leaves_out_texts_is_refused() -> None:
    # it reads a content as a list of parts, and rendered only the ends of a text's turns
    with pytest.raises(DataError, match=r"smolvlm.jinja. leaves out the text of an answer"):
        render_with_spans(published("smolvlm"), chat("a", "b"))


def test_a_template_that_hides_earlier_turns_is_refused() -> None:
    source = "{{ messages[-1].role + ':' + messages[-1].content + '</s>' }}"
    with pytest.raises(DataError, match=r"message 2 .assistant. differently"):
        trained(source, chat("a", "b", "c", "d"))


def test_spans_agree_with_generation_tags_up_to_the_end_token() -> None:
    # the tags hold the content alone; ours adds what follows it up to the next turn
    messages = chat("a", "b b", "c", "", "e", "你好\n", system="s")
    inner = CHATML_GENERATION.replace("{% generation %}", "«").replace("{% endgeneration %}", "»")
    tagged = build(inner).render(messages)
    expected = [part.split("»")[0] + "<|im_end|>\n" for part in tagged.split("«")[1:]]
    assert trained("chatml_generation", messages) == expected
