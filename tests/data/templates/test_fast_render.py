"""Rendering without Jinja: the same text and spans, or Jinja is asked."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import build, chat
from support.tiny_tokenizer import CHATML, MISTRAL, TEMPLATES

from macft.data.templates import spans
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.templates.fast_render import ContentProbe, FastRenderer, Slot, compile_template, skeleton
from macft.data.templates.llamafactory import NAMED
from macft.data.templates.spans import Rendered, render_with_spans
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError
from macft.models.locate import resolve_model

PIECES = ["a", "hello", " ", "\n", "</s>", "<think>", "<think>\n", "\n</think>\n\n", "你好", "<|im_end|>", "'", "{{"]
PIECES += [" \t", "", "\u2003", "<tool_response>", "[INST]", "assistant"]


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Of one to three turns, some with a system text, some cut, opened or closed in an odd way."""
    rng = random.Random(1)

    def text() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 5)))

    made = []
    for _ in range(count):
        messages = chat(*[text() for _ in range(2 * rng.choice([1, 1, 2, 3]))])
        if rng.random() < 0.3:
            messages = [{"role": "system", "content": text()}, *messages]
        if rng.random() < 0.1:
            messages = messages[1:]
        if rng.random() < 0.1:
            messages.append({"role": rng.choice(["user", "assistant", "tool", "system"]), "content": text()})
        made.append(messages)
    return made


def outcome(template: ChatTemplate, messages: list[dict[str, Any]], **options: bool) -> Rendered | str:
    try:
        return render_with_spans(template, messages, **options)
    except DataError as error:
        return str(error)


def check_equal(monkeypatch: pytest.MonkeyPatch, template: ChatTemplate, count: int) -> float:
    """Compare both ways on many conversations; the share of those rendered without Jinja."""
    fast = compile_template(template)
    rows = conversations(count)
    rng = random.Random(2)
    options = [{"mask_history": rng.random() < 0.5, "train_on_prompt": rng.random() < 0.1} for _ in rows]
    quick = [outcome(template, row, **option) for row, option in zip(rows, options, strict=True)]
    used = 0 if fast is None else sum(fast.render(row) is not None for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(spans, "compile_template", lambda _: None)
        slow = [outcome(template, row, **option) for row, option in zip(rows, options, strict=True)]
    for row, one, other in zip(rows, quick, slow, strict=True):
        assert one == other, row
    return used / count


@pytest.mark.parametrize(("name", "share"), [(name, 0.9) for name in TEMPLATES if name not in ("gemma", "mistral")])
def test_templates_of_the_known_kinds_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str, share: float) -> None:
    least = {"qwen3": 0.3}.get(name, share)
    assert check_equal(monkeypatch, build(TEMPLATES[name]), 1000) > least


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_templates_that_refuse_or_compare_messages_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert 0.3 < check_equal(monkeypatch, build(TEMPLATES[name]), 1000) < 0.95


@pytest.mark.parametrize("name", ["empty", *NAMED])
def test_named_templates_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    template = load_template(Path(), {"bos_token": "<s>", "eos_token": "</s>"}, name)
    assert check_equal(monkeypatch, template, 150) > 0.2


def test_the_template_of_smollm2_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("smollm2-135m").path
    template = load_template(folder, load_tokenizer(folder).special_map)
    assert check_equal(monkeypatch, template, 2000) > 0.8


def test_the_template_of_qwen_gives_the_same(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    template = load_template(qwen, load_tokenizer(qwen).special_map)
    assert check_equal(monkeypatch, template, 2000) > 0.8


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("message['content']", "(message['content'] | upper)"),
        CHATML.replace("message['content']", "message['content'][:2]"),
        CHATML.replace("message['content']", "message['content'].replace('a', 'b')"),
        CHATML.replace("message['content']", "(message['content'] | tojson)"),
        CHATML.replace("message['content']", "(message['content'] ~ '') | trim"),
        CHATML.replace("message['content']", "(' ' + message['content']) | trim"),
        CHATML.replace("message['content']", "('%s' % message['content']) | trim"),
        CHATML.replace("message['content']", "([message['content']] | join) | trim"),
        CHATML.replace("message['content']", "'{}'.format(message['content']).strip()"),
        "{% macro say(x) %}{{ x }}{% endmacro %}"
        + CHATML.replace("message['content']", "say(message['content'])|trim"),
        CHATML.replace("message['content']", "(message['content'] if message['content'] != 'ab' else 'c')"),
        CHATML.replace("message['content']", "(message['content'] if message['content'] | length < 3 else 'c')"),
        CHATML.replace("message['content']", "(strftime_now('%Y') + message['content'])"),
        "{% set t %}{{ messages[0].content }}{% endset %}" + CHATML + "{{ t.strip() }}",
    ],
)
def test_a_template_that_does_more_to_a_content_is_left_to_jinja(source: str) -> None:
    assert compile_template(build(source)) is None


def test_a_look_into_a_content_holds_only_where_it_finds_nothing() -> None:
    found = skeleton(build(TEMPLATES["qwen3"]), ("user", "assistant"))
    assert found is not None and found.probes == {ContentProbe(Slot(1, ()), "</think>")}
    fast = FastRenderer(build(TEMPLATES["qwen3"]))
    texts = [fast.render(chat("q", answer)) for answer in ("a", "b", "c", "<think>x</think>d")]
    assert [text is not None for text in texts] == [False, False, True, False]  # the third of a kind is worth it
    assert texts[2] is not None and texts[2].text.endswith("<think>\n\n</think>\n\nc<|im_end|>\n")


def test_what_is_stripped_is_known_with_its_characters() -> None:
    source = "{% for m in messages %}[{{ m.content.lstrip('\\n').rstrip() }}]{% endfor %}"
    found = skeleton(build(source), ("user",))
    assert found is not None
    assert found.items == ("[", Slot(0, (("lstrip", "\n"), ("rstrip", None))), "]")


def test_other_keys_and_contents_that_are_no_text_are_left_to_jinja() -> None:
    fast = compile_template(build(CHATML))
    assert fast is not None
    for _ in range(3):
        assert fast.render([*chat("q"), {"role": "assistant", "content": None}]) is None
        assert fast.render([*chat("q"), {"role": "assistant", "content": "a", "name": "b"}]) is None


def test_a_comparison_of_two_messages_is_left_to_jinja() -> None:
    assert skeleton(build(MISTRAL), ("system", "user", "assistant")) is not None
    assert skeleton(build(MISTRAL), ("system", "user", "assistant", "user", "assistant")) is None


def test_a_template_is_compiled_in_a_moment() -> None:
    template = load_template(Path(), {"eos_token": "</s>"}, "qwen")
    spent = []
    for _ in range(5):
        compile_template.cache_clear()
        start = time.perf_counter()
        assert compile_template(template) is not None
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.05
