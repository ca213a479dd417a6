"""LLaMA-Factory's template names: the texts and trained segments are the ones its own code makes.

`fixtures/template_texts.json` holds, for each name, the [prompt, trained] segments that LLaMA-Factory's
template.py gave with the tokens <s> and </s>: one turn without a system text, three turns with one,
and for templates with thoughts a conversation that has them, with thinking on and off.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import CHATS, chat
from support.paths import FIXTURES
from support.tiny_tokenizer import GEMMA, write_tiny_model

from macft.backends.base import LoraSpec
from macft.data.templates.chat_template import ChatTemplate, load_template, marker_notes, template_end_ids
from macft.data.templates.llamafactory import NAMED, REFUSED
from macft.data.templates.spans import render_turn, render_with_spans
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError, ModelError
from macft.training.model_files import ModelFiles
from macft.weights.folder import ModelFolder

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS: dict[str, dict[str, list[list[str]]]] = json.loads(
    (FIXTURES / "template_texts.json").read_text(encoding="utf-8")
)
THINKING = [name for name in NAMED if NAMED[name].thought is not None]
# the eos token follows the last answer alone; after earlier ones stands nothing, or another token
UNENDED = [
    *("aeva", "bailing", "breeze", "falcon", "fewshot", "glm4", "glm4_7", "glm4_moe", "glmz1", "gpt_oss"),
    *("hy_dense_1_8b", "hy_dense_7b", "index", "solar"),
]
ONE = chat(" Who's there?\n", " Me.\n")
THREE = chat("q1\n", "\na1", "q2", " a2 ", "q3", "\na3", system="Be brief.")
each_name = pytest.mark.parametrize("name", NAMED)


def named(name: str, **options: Any) -> ChatTemplate:
    return load_template(Path("no-folder"), TOKENS, name, **options)


def segments(template: ChatTemplate, messages: list[dict[str, Any]], **options: bool) -> tuple[str, list[str]]:
    """The whole text, and its trained pieces."""
    rendered = render_with_spans(template, messages, **options)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.spans]


def test_the_fixture_holds_every_name() -> None:
    assert set(TEXTS) == set(NAMED) and len(NAMED) > 80 and not set(NAMED) & set(REFUSED)


@each_name
def test_one_turn_is_rendered_and_trained_as_in_llama_factory(name: str) -> None:
    [[prompt, trained]] = TEXTS[name]["one"]
    template = named(name)
    assert segments(template, ONE) == (prompt + trained, [trained])
    assert template.render(ONE[:1], add_generation_prompt=True) == prompt


@each_name
def test_three_turns_after_a_system_text_are_rendered_and_trained_as_in_llama_factory(name: str) -> None:
    expected = TEXTS[name]["three"]
    text = "".join(prompt + trained for prompt, trained in expected)
    trained = [each for _, each in expected]
    template = named(name)
    assert segments(template, THREE, mask_history=True) == (text, trained[-1:])
    if name not in UNENDED:
        assert segments(template, THREE) == (text, trained)
    assert template.render(THREE[:-1], add_generation_prompt=True) == text.removesuffix(trained[-1])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_kept_dropped_and_emptied_as_in_llama_factory(name: str, thinking: bool) -> None:
    opening, closing = NAMED[name].thought or ("", "")
    messages = chat("q1", f"{opening}hm{closing}a1", "q2", f"{opening}ah{closing}a2", system="Be brief.")
    expected = TEXTS[name]["thought" if thinking else "off"]
    text = "".join(prompt + trained for prompt, trained in expected)
    template = named(name, enable_thinking=thinking)
    assert segments(template, messages, mask_history=True) == (text, [expected[-1][1]])
    # a chosen or rejected answer of a preference pair
    pair = render_turn(template, messages, len(messages) - 1)
    assert (pair.text, pair.text[slice(*pair.spans[0])]) == (text, expected[-1][1])


@pytest.mark.parametrize("name", UNENDED)
def test_earlier_answers_that_would_be_trained_without_an_end_are_refused(name: str) -> None:
    assert NAMED[name].eos_once
    for options in ({}, {"train_on_prompt": True}):
        with pytest.raises(
            DataError,
            match=r"can be trained on only one answer per conversation, found 3: the eos token follows the last one "
            r"alone; use mask_history, split the conversation, or give another template$",
        ):
            render_with_spans(named(name), THREE, **options)


def test_a_thought_inside_a_thought_ends_at_the_first_close() -> None:
    odd = "x<think>\na<think>\nb\n</think>\n\n\n</think>\n\ny<think>\nopen"
    text = named("qwen3").render(chat("q", odd, "q2", "a2"))
    assert "assistant\nx\n</think>\n\ny<think>\nopen<|im_end|>" in text


def test_half_a_thought_is_refused_where_thinking_is_off() -> None:
    with pytest.raises(DataError, match=r"\(qwen3\) refuses .*half a thought in message 2"):
        named("qwen3", enable_thinking=False).render(chat("q", "<think>\nhm"))


@each_name
def test_a_given_default_system_replaces_the_templates_own(name: str) -> None:
    text = 'It\'s "a"\\n\n{{ b }} {% 你 %}'
    given_text = named(name, default_system=text)
    assert given_text.render(ONE) == named(name).render([{"role": "system", "content": text}, *ONE])
    assert given_text.render(THREE) == named(name).render(THREE)
    own = NAMED[name].default_system
    assert not own or own not in named(name, default_system="").render(ONE)


def test_an_empty_system_message_means_the_default_one() -> None:
    template = named("qwen")
    assert template.render([{"role": "system", "content": ""}, *ONE]) == template.render(ONE)


def test_the_models_own_template_takes_a_default_system_and_no_thinking(tmp_path: Path) -> None:
    source = (
        "\n  {% if enable_thinking is defined and not enable_thinking %}off{% endif %}\n"
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    folder = write_tiny_model(tmp_path, source)
    plain = load_template(folder, TOKENS)
    changed = load_template(folder, TOKENS, default_system="It's\n{{ x }}", enable_thinking=False)
    assert plain.render(ONE[:1]) == "\n[user: Who's there?\n]"
    assert changed.render(ONE[:1]) == "\noff[system:It's\n{{ x }}][user: Who's there?\n]"
    assert changed.render(THREE[:2]) == "\noff[system:Be brief.][user:q1\n]"


def test_a_default_system_that_the_models_own_template_refuses_or_leaves_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_model(tmp_path, GEMMA)
    with pytest.raises(ModelError, match=r"^default_system: .*System role not supported; remove it, or give another"):
        load_template(folder, TOKENS, default_system="hello")
    write_tiny_model(tmp_path, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    for text in ("hello", ""):
        caplog.clear()
        load_template(folder, TOKENS, default_system=text)
        assert ("writes no system text: default_system has no effect" in caplog.text) == bool(text)


def test_a_template_of_another_model_is_said_once_by_its_first_marker(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    foreign = named("llama3")
    assert [str(note) for note in marker_notes(foreign, tokenizer)] == [
        "template llama3 writes <|start_header_id|>, for which this tokenizer has no token: it becomes plain text, in "
        "several tokens; leave template out for the model's own"
    ]
    (tmp_path / "chat_template.jinja").write_text(foreign.source)
    for fitting in (named("qwen"), named("vicuna"), named("alpaca"), load_template(tmp_path, TOKENS)):
        assert not marker_notes(fitting, tokenizer)


def test_thinking_switched_off_where_there_is_none_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "macft"):
        named("llama3", enable_thinking=False)
    assert "(llama3) does not use enable_thinking: it has no effect" in caplog.text


def test_a_file_of_the_working_folder_comes_before_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    assert named("qwen").name == "qwen"  # a folder is no template
    (tmp_path / "yi").write_text("own")
    with caplog.at_level(logging.WARNING, "macft"):
        assert named("yi").render([]) == "own"
    assert "the file yi in this folder, not the template of that name" in caplog.text


def test_an_unknown_name_gets_the_nearest_one_and_the_list() -> None:
    with pytest.raises(ModelError) as error:
        named("qwen3_notink")
    message = str(error.value)
    assert "qwen3_notink is neither a file nor a name; did you mean qwen3_nothink" in message
    assert "aeva, alpaca" in message and "empty" in message and "\n" not in message


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_be_the_same_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match=f"template: LLaMA-Factory's {name} is not supported: it"):
        named(name)


def test_a_template_that_ends_answers_with_eos_wants_one() -> None:
    with pytest.raises(ModelError, match="no eos_token, which template: vicuna needs to end an answer"):
        load_template(Path(), {"bos_token": "<s>"}, "vicuna")
    # a model without bos has none in front, as in LLaMA-Factory
    assert load_template(Path(), {}, "llama3").render(ONE[:1]).startswith("<|start_header_id|>user")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tokenizer"), None, eos="</s>"))


@pytest.mark.parametrize(("name", "end"), [("qwen", "<|im_end|>"), ("gemma2", "<end_of_turn>"), ("alpaca", "</s>")])
def test_the_end_id_of_a_named_template(tokenizer: Tokenizer, name: str, end: str) -> None:
    assert template_end_ids(named(name), tokenizer) == set(tokenizer.encode(end).ids)


TEXT = st.text(alphabet="ab Q.,'\n你好{}%\\<>|", max_size=12)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@given(turns=TURNS, system=st.none() | TEXT, name=st.sampled_from(sorted({*NAMED} - {*UNENDED, *THINKING})))
@settings(max_examples=150, deadline=None)
def test_spans_decode_to_the_answers_and_their_ends(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None, name: str
) -> None:
    before, after = NAMED[name].answer.replace("{eos}", "</s>").split("{content}")
    answers = [before + answer + after for _, answer in turns]
    if NAMED[name].eos_once:
        answers[-1] += "</s>"
    rendered = render_with_spans(named(name), chat(*[text for turn in turns for text in turn], system=system))
    assert [rendered.text[start:end] for start, end in rendered.spans] == answers
    encoded = tokenizer.encode(rendered.text)
    begins = [0, *encoded.ends[:-1]]
    for (start, end), answer in zip(rendered.spans, answers, strict=True):
        ids = [id_ for id_, stop in zip(encoded.ids, encoded.ends, strict=True) if start < stop <= end]
        inside = [begin >= start for begin, stop in zip(begins, encoded.ends, strict=True) if start < stop <= end]
        if all(inside) and (end == len(rendered.text) or end in encoded.ends):
            assert tokenizer.decode(ids, skip_special=False) == answer


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama3", "default", "glm4", "mistral", "gemma2"])
def test_an_adapter_folder_renders_the_same_in_transformers(tmp_path: Path, model: Path, name: str) -> None:
    from transformers import AutoTokenizer

    # the base's own template, which is in its tokenizer_config.json, must not win
    base = write_tiny_model(tmp_path / "base", "the base's own", eos="</s>")
    tokenizer = load_tokenizer(base)
    template = load_template(base, tokenizer.special_map, name, default_system="It's here.", enable_thinking=False)
    files = ModelFiles(
        base=ModelFolder("base", model),
        lora=LoraSpec(rank=2, alpha=4.0),
        target_modules=("q_proj",),
        merged_adapter=None,
        tokenizer=tokenizer,
        template=template,
    )
    files.write(tmp_path / "adapter", {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for messages in CHATS:
        for add in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            assert template.render(messages, add_generation_prompt=add) == expected
    again = load_template(tmp_path / "adapter", load_tokenizer(tmp_path / "adapter").special_map)
    assert again.render(THREE) == template.render(THREE) and again.one_answer == template.one_answer
