"""Variables of a chat template that llama.cpp sets: as in training, or open where they change nothing."""

from __future__ import annotations

from datetime import datetime
from itertools import product
from pathlib import Path

import gguf
import pytest
from support.chat_templates import CHATS, build
from support.paths import FIXTURES
from support.tiny_gguf import TinyGguf, byte_level, hf_weights, write_gguf

from macft.api.exports import export_gguf
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.gguf.template_variables import pin_variables
from macft.verify.llama_cpp import llama_cpp

# the form of Qwen3's: thinking unless it is switched off
_OFF = "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
QWEN3 = (
    (FIXTURES / "ollama_templates" / "qwen3_thinking.jinja")
    .read_text(encoding="utf-8")
    .replace("{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n' }}" + _OFF + "{% endif %}")
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# the form of QwQ and DeepSeek V3.1: thinking only where it is asked for
OFF_UNLESS_ASKED = CHATML + PROMPT + "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
# the form of Llama 3.1 and of Llama 3.2
DATE_1 = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today: {{ date_string }}\n"
DATE_2 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n"
)
DATETIME = "{{ 'It is ' + datetime if datetime is defined else 'No date.' }}\n"
# template -> the variables that are fixed in it
PINNED = {
    "thinking off unless asked": (OFF_UNLESS_ASKED, ["enable_thinking"]),
    "a fixed date": (DATE_1 + CHATML + PROMPT, ["date_string"]),
    "a datetime": (DATETIME + CHATML + PROMPT, ["datetime"]),
    "all of them": (DATE_1 + DATETIME + OFF_UNLESS_ASKED, ["enable_thinking", "date_string", "datetime"]),
    "in a macro": (
        "{% macro head() %}{{ 'T' if enable_thinking else 'N' }}{% endmacro %}{{ head() }}" + CHATML + PROMPT,
        ["enable_thinking"],
    ),
}
OPEN = {
    "thinking on unless told otherwise": QWEN3,
    "today's date by itself": DATE_2 + CHATML + PROMPT,
    "a name that changes nothing": "{# enable_thinking date_string #}" + CHATML + PROMPT,
}


def without_thinking(folder: Path, source: str) -> ChatTemplate:
    """The template as training keeps it with `enable_thinking: false`."""
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_template(folder, {"bos_token": "<s>", "eos_token": "</s>"}, enable_thinking=False)


@pytest.mark.parametrize("name", PINNED)
def test_a_variable_that_would_change_a_prompt_stays_as_in_training_whatever_is_set(name: str):
    source, names = PINNED[name]
    pinned = pin_variables(build(source))
    assert pinned == "".join(f"{{% set {name} = macft_undefined %}}\n" for name in names) + source
    rendered = build(source)._compiled.environment.from_string(pinned).render
    for chat, prompt in product(CHATS, (False, True)):
        told = {"enable_thinking": True, "date_string": "01 Jan 2030", "datetime": "Jan 01 2030"}
        assert rendered(messages=chat, add_generation_prompt=prompt, **told) == build(source).render(
            chat, add_generation_prompt=prompt
        )


@pytest.mark.parametrize("name", OPEN)
def test_a_variable_that_changes_nothing_stays_open(name: str):
    assert pin_variables(build(OPEN[name])) == OPEN[name]


def test_thinking_that_was_switched_off_for_training_stays_off(tmp_path: Path):
    template = without_thinking(tmp_path, QWEN3)
    assert pin_variables(template) == "{% set enable_thinking = macft_undefined %}\n" + template.source


def test_llama_cpp_writes_the_prompts_of_the_training_whatever_it_is_told(tmp_path: Path):
    dated = build(DATE_1 + CHATML + PROMPT)
    chat = [{"role": "user", "content": "hi"}]
    for template in (without_thinking(tmp_path, QWEN3), build(OFF_UNLESS_ASKED), dated):
        model = byte_level(TinyGguf(layers=1, fields={"tokenizer.chat_template": pin_variables(template)}))
        path = write_gguf(tmp_path / "m.gguf", model, hf_weights(model))
        with llama_cpp(path, threads=1) as server:
            found = [server.apply_template(chat, enable_thinking=thinking) for thinking in (None, True, False)]
        assert found == [template.render(chat, add_generation_prompt=True)] * 3
    assert datetime.now().strftime("%d %b %Y") not in found[0] and "26 Jul 2024" in found[0]


def test_where_the_training_had_thinking_the_switch_works(tmp_path: Path):
    model = byte_level(TinyGguf(layers=1, fields={"tokenizer.chat_template": pin_variables(build(QWEN3))}))
    path = write_gguf(tmp_path / "m.gguf", model, hf_weights(model))
    chat = [{"role": "user", "content": "hi"}]
    with llama_cpp(path, threads=1) as server:
        on, off = (server.apply_template(chat, enable_thinking=thinking) for thinking in (True, False))
    assert on == build(QWEN3).render(chat, add_generation_prompt=True)
    assert off == on + "<think>\n\n</think>\n\n"


def test_a_file_for_llama_cpp_has_them_fixed_too(model: Path, tmp_path: Path):
    (tmp_path / "mine.jinja").write_text(DATE_1 + CHATML + PROMPT, encoding="utf-8")
    report = export_gguf(model, tmp_path / "m.gguf", quants="f16", template=tmp_path / "mine.jinja", verify=False)
    embedded = gguf.GGUFReader(report.files[0].path).fields["tokenizer.chat_template"].contents()
    assert embedded == "{% set date_string = macft_undefined %}\n" + DATE_1 + CHATML + PROMPT
