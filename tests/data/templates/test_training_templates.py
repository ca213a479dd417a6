"""Trained texts of published templates, held against the {% generation %} marks of TRL's training templates.

The header rule: a generation prompt holds the header of an answer, so we never train it, while TRL's marks hold some
headers. Where TRL's text of an answer is ours after a header, and the prompt of that answer holds this header, the two
agree. Every other difference is in a table below, by its reason. An answer whose thought the model's own template
leaves out is refused.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.chat_templates import SPECIAL, published
from support.original_templates import original, original_names
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.spans import render_with_spans
from macft.errors import DataError

Messages = list[dict[str, Any]]


def said(*turns: str) -> Messages:
    """The messages of turns such as "user: hi"."""
    roles = {"S": "system", "Q": "user", "A": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
NUMBER = {"type": "object", "properties": {"a": {"type": "integer", "description": "a number"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": NUMBER}}]
CONVERSATIONS: dict[str, Messages] = {
    "one": said("Q Q0", "A A1"),
    "system": said("S SYS", "Q Q0", "A A1"),
    "two": said("Q Q0", "A A1", "Q Q2", "A A3"),
    "three": said("S SYS", "Q Q0", "A A1", "Q Q2", "A A3", "Q Q4", "A A5"),
    "thought": said("Q Q0", "A <think>\nTHO\n</think>\n\nA1"),
    "thoughts": said("Q Q0", "A <think>\nTHO\n</think>\n\nA1", "Q Q2", "A <think>\nTHP\n</think>\n\nA3"),
    "blanks": said("Q Q0", "A  \nA1 \n", "Q Q2", "A A3 "),
    "empty": said("Q Q0", "A ", "Q Q2", "A A3"),
    "opening": said("A A0", "Q Q1", "A A2"),
    "twin": said("Q Q0", "A A1", "A A2"),
    "call": [
        {"role": "user", "content": "Q0"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "R2"},
        {"role": "assistant", "content": "A3"},
    ],
    "field": [*said("Q Q0"), {"role": "assistant", "content": "A1", "reasoning_content": "THO", "thinking": "THO"}],
}
SEVERAL = ("two", "three", "thoughts", "blanks", "empty", "opening", "twin")
FAMILIES = sorted(name.removesuffix("_training") for name in original_names() if has_generation_markers(original(name)))
# how they differ, why, and in which conversations of which families
DIFFERENCES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "refused": {
        "the training template drops the call without a word": {
            name: ("call",)
            for name in ("deepseek_r1_distill", "deepseekv3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl")
        },
        "an earlier answer ends in <|end|>, at which generation does not stop": {"gptoss": SEVERAL},
        "the first of two answers in a row has no end of its own": {"diffusion_gemma": ("twin",)},
        "only contents in parts, as of images, are rendered; the training template leaves texts out": {
            name: ("one", "system", "two", "three", "blanks", "opening", "twin") for name in ("idefics3", "smolvlm")
        },
    },
    "other text": {
        "the training template gives earlier answers the empty thought that only the last one has": {
            "qwen3": ("two", "three", "blanks", "empty", "opening", "twin", "call"),
            "qwen3_5_think": ("two", "three", "blanks", "empty", "opening"),
            "qwen3_6": ("two", "three", "blanks", "empty", "opening"),
        },
    },
    "other spans": {
        "the template writes no end of an answer: where the spans are tokenized, one is added (test_ends.py)": {
            "glm4moe": tuple(CONVERSATIONS)
        },
        "the call ends in <|tool_response>, at which generation stops; and the prompt after a result is empty, so that "
        "the header of the next answer is to be learned": {"diffusion_gemma": ("call",)},
    },
}


def theirs(name: str, messages: Messages, tools: list[dict[str, Any]] | None) -> list[str]:
    """The texts inside the marks of the training template, or of the model's own, one for each answer."""
    training = f"{name}_training"
    source = original(training if training in original_names() else name)
    texts, marks = render_jinja_template(
        [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **SPECIAL
    )
    places = list(marks[0])
    if len(places) > sum(message["role"] == "assistant" for message in messages):
        # an answer in several marks, one after the other
        places = []
        for start, end in marks[0]:
            before = places.pop() if places and places[-1][1] == start else (start, end)
            places.append((before[0], end))
    return [texts[0][start:end] for start, end in places if start < end]


def header(template: ChatTemplate, messages: Messages, turn: int, tools: list[dict[str, Any]] | None) -> str:
    """What the generation prompt of an answer writes after the text before it."""
    history = messages[:turn] or said("Q Q0")
    prompt = template.render(history, add_generation_prompt=True, tools=tools)
    return prompt.rpartition(history[-1]["content"].strip())[2]


def loses_thought(template: ChatTemplate, messages: Messages) -> bool:
    """Whether the model's own template leaves out a thought of CONVERSATIONS."""
    thoughts = [thought for thought in ("THO", "THP") if thought in str(messages)]
    try:
        text = template.render(messages) if thoughts else ""
    except DataError:
        return False
    return any(thought not in text for thought in thoughts)


def without_thought(text: str) -> str:
    return re.sub(r"^(.*<think>)?.*</think>", "", text, flags=re.DOTALL).lstrip("\n")


def agree(ours: list[str], marked: list[str], heads: list[str]) -> bool:
    """The header rule."""
    rows = zip(ours, marked, heads, strict=True)
    return all(their.endswith(our) and their.removesuffix(our) in head for our, their, head in rows)


def difference(family: str, name: str) -> str | None:
    """How our trained texts of a conversation differ from TRL's; None if they agree or both refuse it."""
    template, messages, tools = published(family), CONVERSATIONS[name], TOOLS if name == "call" else None
    try:
        marked = theirs(family, messages, tools)
    except Exception:  # a template is foreign code
        with pytest.raises(DataError):
            render_with_spans(template, messages, tools=tools)
        return None
    try:
        rendered = render_with_spans(template, messages, tools=tools)
    except DataError:
        return "refused"
    ours = [rendered.text[start:end] for start, end in rendered.spans]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    heads = [header(template, messages, turn, tools) for turn in turns]
    if agree(ours, marked, heads):
        return None
    bare = agree([without_thought(text) for text in ours], [without_thought(text) for text in marked], heads)
    return "other text" if bare else "other spans"


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_texts_are_those_of_the_training_template(family: str) -> None:
    expected = {
        name: kind
        for kind, reasons in DIFFERENCES.items()
        for families in reasons.values()
        for name in families.get(family, ())
    }
    for name, messages in CONVERSATIONS.items():
        found = difference(family, name)
        if loses_thought(published(family), messages):
            assert found == "refused", name
        else:
            assert found == expected.get(name), name


def test_all_families_are_compared() -> None:
    assert len(FAMILIES) >= 34
    for reasons in DIFFERENCES.values():
        for families in reasons.values():
            assert set(families) <= set(FAMILIES)
