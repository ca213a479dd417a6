"""Chat templates: the rendered text equals transformers', and every failure is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chat_templates import CHATS, build, chat
from support.data_folders import own_and_public_qwen
from support.tiny_tokenizer import CHATML, TEMPLATES, write_tiny_model

from macft.data.templates.chat_template import load_template, template_end_ids
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError, ModelError


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_equals_transformers(tmp_path: Path, name: str, add_generation_prompt: bool) -> None:
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path, TEMPLATES[name])
    ours = load_template(folder, load_tokenizer(folder).special_map)
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in CHATS:
        if name == "gemma" and messages[0]["role"] == "system":
            continue
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert ours.render(messages, add_generation_prompt=add_generation_prompt) == expected


@own_and_public_qwen
def test_qwen_text_equals_transformers(qwen: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_template(qwen, load_tokenizer(qwen).special_map)
    theirs = AutoTokenizer.from_pretrained(qwen)
    tool = {"type": "function", "function": {"name": "f", "description": "<天气> & 'x'", "parameters": {}}}
    for messages in CHATS:
        for tools in (None, [tool]):
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
            assert ours.render(messages, tools=tools) == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=True) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
    ],
)
def test_helpers_of_hugging_face_templates_work(source: str, text: str) -> None:
    assert build(source).render([]) == text


def test_strftime_now_gives_this_year() -> None:
    from datetime import datetime

    before = datetime.now().year
    assert before <= int(build("{{ strftime_now('%Y') }}").render([])) <= datetime.now().year


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(DataError, match="is unsafe"):
        build(source).render([])


def test_a_refusal_gives_the_templates_own_words() -> None:
    with pytest.raises(DataError) as error:
        build(TEMPLATES["gemma"]).render(chat("a", system="s"))
    assert str(error.value) == ("the chat template (test.jinja) refuses this conversation: System role not supported")


def test_a_failure_inside_a_template_is_one_line() -> None:
    with pytest.raises(DataError) as error:
        build("{{ 'a' + 1 }}").render([])
    assert "can only concatenate str" in str(error.value) and "\n" not in str(error.value)


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("a\n{% if %}")
    with pytest.raises(ModelError, match=r"broken.jinja line 2: Expected an expression"):
        load_template(tmp_path, {}, str(path))


def test_the_models_own_template_is_found_in_each_place(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "config {{ bos_token }}")
    assert load_template(folder, {"bos_token": "<s>"}).render([]) == "config <s>"

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "default"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_template(folder, {}).render([]) == "default"

    (folder / "chat_template.jinja").write_text("file 你好", encoding="utf-8")
    assert load_template(folder, {}).render([]) == "file 你好"
    assert load_template(folder, {}).source == "file 你好"

    (tmp_path / "own.jinja").write_text("own")
    assert load_template(folder, {}, str(tmp_path / "own.jinja")).render([]) == "own"


def test_the_file_of_older_processors_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor {{ bos_token }}"}))
    assert load_template(folder, {"bos_token": "<s>"}).render([]) == "processor <s>"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "tokenizer"}))
    assert load_template(folder, {}).render([]) == "tokenizer"


def test_a_missing_template_says_where_it_was_looked_for(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, template=None)
    with pytest.raises(ModelError) as error:
        load_template(folder, {})
    assert str(folder) in str(error.value) and "chat_template.jinja" in str(error.value)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with pytest.raises(ModelError, match=r"chatlm.jinja: no such template file; did you mean .*chatml.jinja"):
        load_template(folder, {}, str(tmp_path / "chatlm.jinja"))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *[("chatml", "<|im_end|>"), ("default_system", "<|im_end|>"), ("qwen3", "<|im_end|>")],
        *[("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>")],
    ],
)
def test_the_end_id_is_the_token_after_an_answer(tmp_path: Path, name: str, end: str) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path, eos="</s>"))
    assert template_end_ids(build(TEMPLATES[name]), tokenizer) == set(tokenizer.encode(end).ids)


def test_a_template_without_end_token_has_no_end_id(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path))
    template = build("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert template_end_ids(template, tokenizer) == frozenset()


def test_the_empty_template_is_the_texts_with_an_end_after_each_answer(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "the model's own", eos="</s>")
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer.special_map, "empty")
    text = template.render(chat(" a\n", "b", "c", "d</s>", system="s {{ x }}"))
    assert text == "s {{ x }} a\nb</s>cd</s>" and template.name == "empty"
    assert template.render(chat("a"), add_generation_prompt=True) == "a"
    assert template_end_ids(template, tokenizer) == set(tokenizer.encode("</s>").ids)
    with pytest.raises(ModelError, match="no eos_token, which template: empty needs to end an answer"):
        load_template(folder, {}, "empty")
