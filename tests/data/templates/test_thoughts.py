"""The thought of an answer is rendered as transformers renders it, and no answer is trained on without its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import chat
from support.data_rows import read_examples, read_feedback, read_pairs, tokenize_feedback, tokenize_pairs
from support.original_templates import original
from support.tiny_tokenizer import write_tiny_model

from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.templates.llamafactory import NAMED
from macft.data.templates.spans import render_turn, render_with_spans
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
THINKING = [name for name in NAMED if NAMED[name].thought is not None]
QUESTION = {"role": "user", "content": "Q0"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def own(name: str) -> ChatTemplate:
    return ChatTemplate(original(name), name=name, special_map=TOKENS)


def named(name: str, **options: Any) -> ChatTemplate:
    return load_template(Path("no-folder"), TOKENS, name, **options)


def read(folder: Path, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    (folder / "r.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    [example] = read_examples(str(folder / "r.jsonl"), str(folder))
    return list(example.messages)


def trained(template: ChatTemplate, messages: list[dict[str, Any]], **options: bool) -> list[str]:
    rendered = render_with_spans(template, messages, **options)
    return [rendered.text[start:end] for start, end in rendered.spans]


def thinking(*answers: str) -> list[dict[str, Any]]:
    """A question and an answer with a thought, once for each answer."""
    return [
        message
        for i, answer in enumerate(answers)
        for message in (
            {"role": "user", "content": f"Q{i}"},
            {"role": "assistant", "reasoning_content": f"THO{i}", "content": answer},
        )
    ]


# --- a thought in a field of its own


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3", "<think>\nTHO\n</think>\n\nA1<|im_end|>\n"),
        ("qwen3_8", "THO\n</think>\n\nA1<|im_end|>\n"),
        ("nemotron_3_nano", "THO\n</think>\nA1<|im_end|>\n"),
        ("lfm2_2_5", "<think>THO</think>A1<|im_end|>\n"),
        (
            "gptoss",
            "<|channel|>analysis<|message|>THO<|end|><|start|>assistant<|channel|>final<|message|>A1<|return|>",
        ),
        ("diffusion_gemma", "<|channel>thought\nTHO\n<channel|>A1<turn|>\n"),
        ("muse_glimmer", " to=self<|message|>THO<|eom|><|start|>assistant to=user<|message|>A1<|eot|>"),
    ],
)
def test_a_thought_under_any_key_is_trained_where_the_template_writes_it(
    name: str, key: str, text: str, tmp_path: Path
) -> None:
    messages = read(tmp_path, QUESTION, {"role": "assistant", key: "THO", "content": "A1"})
    assert trained(own(name), messages) == [text]


@pytest.mark.parametrize(("name", "key"), [("qwen3", "reasoning_content"), ("gptoss", "thinking")])
def test_the_text_is_the_one_that_transformers_renders(name: str, key: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    given = [QUESTION, {"role": "assistant", key: "THO", "content": "A1"}]
    theirs = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    text = theirs.apply_chat_template(given, chat_template=original(name), tokenize=False)
    rendered = render_with_spans(own(name), read(tmp_path, *given))
    [(start, _)] = rendered.spans
    assert rendered.text == text
    assert text[:start] == theirs.apply_chat_template(
        given[:1], chat_template=original(name), tokenize=False, add_generation_prompt=True
    )


def test_the_thoughts_between_tool_calls_are_trained_as_transformers_renders_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    given = [
        QUESTION,
        {"role": "assistant", "reasoning_content": "I call.", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "reasoning_content": "I see.", "content": "It is 2."},
    ]
    theirs = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    rendered = render_with_spans(own("qwen3"), read(tmp_path, *given))
    assert rendered.text == theirs.apply_chat_template(given, chat_template=original("qwen3"), tokenize=False)
    assert [rendered.text[start:end] for start, end in rendered.spans] == [
        '<think>\nI call.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n',
        "<think>\nI see.\n</think>\n\nIt is 2.<|im_end|>\n",
    ]


@pytest.mark.parametrize("name", THINKING)
def test_a_named_template_writes_the_thought_as_one_in_the_content(name: str) -> None:
    opening, closing = NAMED[name].thought or ("", "")
    for on in (True, False):
        template = named(name, enable_thinking=on)
        written = chat("Q0", f"{opening}THO0{closing}A0")
        assert render_with_spans(template, thinking("A0")) == render_with_spans(template, written)
    # switched off, thoughts are left out by intent
    assert "THO0" not in template.render(thinking("A0"))


def test_a_named_template_that_an_adapter_kept_writes_it_too(tmp_path: Path) -> None:
    kept = ChatTemplate(named("qwen3").source, name="out/chat_template.jinja", special_map=TOKENS)
    assert trained(kept, thinking("A0")) == ["<think>\nTHO0\n</think>\n\nA0<|im_end|>\n"]
    (tmp_path / "chat_template.jinja").write_text(kept.source)
    off = load_template(tmp_path, TOKENS, default_system="S", enable_thinking=False)
    assert trained(off, thinking("A0", "A1")) == ["A0<|im_end|>\n", "A1<|im_end|>\n"]


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "deepseek_r1_distill", "cohere2"])
def test_a_template_without_a_place_for_the_thought_is_refused(name: str) -> None:
    for messages, place in ((thinking("A0"), 2), (thinking("A0", "A1"), 4)):
        with pytest.raises(DataError, match=rf"has no place for the thought of message {place} \(assistant\) \(reason"):
            render_with_spans(own(name), messages, mask_history=True)


def test_a_thought_in_the_content_that_the_template_cuts_off_is_refused() -> None:
    with pytest.raises(DataError, match=r"leaves out the thought in the content of message 2 \(assistant\); give a"):
        render_with_spans(own("deepseek_r1_distill"), chat("Q0", "<think>\nTHO\n</think>\n\nA1"))


# --- several answers: one rule for a model's own template and for a named one

HISTORY = chat("Q0", "<think>\nTHO\n</think>\n\nA1", "Q2", "<think>\nTHP\n</think>\n\nA3")


@pytest.mark.parametrize("messages", [HISTORY, thinking("A1", "A3")], ids=["content", "field"])
@pytest.mark.parametrize("options", [{}, {"train_on_prompt": True}], ids=["answers", "all"])
def test_an_earlier_answer_that_loses_its_thought_is_refused(
    messages: list[dict[str, Any]], options: dict[str, bool]
) -> None:
    for template in (own("qwen3"), named("qwen3")):
        with pytest.raises(
            DataError,
            match=r"\(qwen3\) leaves out the thought of message 2 \(assistant\) because other turns follow, and the "
            r"answer would be trained without it; use mask_history, split the conversation, or ",
        ):
            render_with_spans(template, messages, **options)


def test_the_ways_out_of_the_refusal_keep_each_trained_thought() -> None:
    for template in (own("qwen3"), named("qwen3")):
        assert trained(template, HISTORY, mask_history=True) == ["<think>\nTHP\n</think>\n\nA3<|im_end|>\n"]
        with pytest.raises(DataError, match=r"or write template: qwen3_nothink$"):
            render_with_spans(template, HISTORY)
    whole = ["<think>\nTHO\n</think>\n\nA1<|im_end|>\n", "<think>\nTHP\n</think>\n\nA3<|im_end|>\n"]
    assert trained(named("qwen3_nothink"), HISTORY) == trained(own("qwen3_training"), HISTORY) == whole


def test_a_models_own_template_has_the_way_out_whatever_its_file_is_called() -> None:
    template = ChatTemplate(own("qwen3").source, name="model/chat_template.jinja", special_map=TOKENS)
    with pytest.raises(DataError, match=r"or write template: qwen3_nothink$"):
        render_with_spans(template, HISTORY)


def test_an_earlier_answer_that_is_marked_off_may_lose_its_thought() -> None:
    marked = [dict(message) for message in HISTORY]
    marked[1]["weight"] = 0
    for template in (own("qwen3"), named("qwen3")):
        assert trained(template, marked) == ["<think>\nTHP\n</think>\n\nA3<|im_end|>\n"]


def test_answers_without_thoughts_are_trained_as_rendered_where_they_stand() -> None:
    for template in (own("qwen3"), named("qwen3")):
        assert trained(template, chat("Q0", "A1", "Q2", "A3")) == [
            "A1<|im_end|>\n",
            "<think>\n\n</think>\n\nA3<|im_end|>\n",
        ]
        # an empty thought says nothing that could be lost
        emptied = chat("Q0", "<think>\n\n</think>\n\nA1", "Q2", "A3")
        assert trained(template, emptied)[0] == "A1<|im_end|>\n"


def test_an_answer_that_only_speaks_of_the_tag_is_refused_too_where_it_would_be_cut() -> None:
    spoken = chat("Q0", "a thought ends in </think>, always", "Q2", "A3")
    with pytest.raises(DataError, match=r"leaves out the thought of message 2"):
        render_with_spans(own("qwen3"), spoken)
    assert trained(named("qwen3"), spoken)[0] == "a thought ends in </think>, always<|im_end|>\n"


# --- pairs and rated answers


@pytest.fixture
def qwen3(tmp_path: Path) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path))
    return tokenizer, ChatTemplate(original("qwen3"), name="qwen3", special_map=tokenizer.special_map)


def test_both_answers_of_a_pair_are_trained_with_their_thoughts(
    qwen3: tuple[Tokenizer, ChatTemplate], tmp_path: Path
) -> None:
    row = {
        "prompt": [QUESTION],
        "chosen": [{"role": "assistant", "thinking": "good", "content": "A"}],
        "rejected": [{"role": "assistant", "thinking": "bad", "content": "B"}],
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    tokenizer, template = qwen3
    [pair], _ = tokenize_pairs(read_pairs(str(tmp_path / "r.jsonl"), "."), tokenizer, template, cutoff_len=200)
    answers = [
        tokenizer.decode(side.tokens[side.loss_mask], skip_special=False) for side in (pair.chosen, pair.rejected)
    ]
    assert answers == ["<think>\ngood\n</think>\n\nA<|im_end|>\n", "<think>\nbad\n</think>\n\nB<|im_end|>\n"]


def test_a_rated_answer_is_trained_with_its_thought(qwen3: tuple[Tokenizer, ChatTemplate], tmp_path: Path) -> None:
    answers = [{"role": "assistant", "reasoning": text, "content": "A"} for text in ("good", "bad")]
    rows = [{"messages": [QUESTION, answer], "label": True} for answer in answers]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, template = qwen3
    feedback, _ = tokenize_feedback(read_feedback(str(tmp_path / "r.jsonl"), "."), tokenizer, template, cutoff_len=200)
    first = feedback.table.row(0)
    text = tokenizer.decode(first.tokens[first.loss_mask], skip_special=False)
    assert text == "<think>\ngood\n</think>\n\nA<|im_end|>\n"


def test_a_pair_whose_earlier_answer_has_a_thought_trains_only_the_last() -> None:
    rendered = render_turn(own("qwen3"), HISTORY, 3)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["<think>\nTHP\n</think>\n\nA3<|im_end|>\n"]
    with pytest.raises(DataError, match=r"leaves out the thought of message 2"):
        render_turn(own("qwen3"), HISTORY, 1)
