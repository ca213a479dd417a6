"""Trained character spans, written out by hand for each kind of template."""

from __future__ import annotations

from typing import Any

import pytest
from support.chat_templates import build, chat
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


def test_two_answers_in_a_row_are_two_spans() -> None:
    messages = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    assert trained("chatml", messages) == ["b<|im_end|>\n", "c<|im_end|>\n"]


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
