"""Which of its ways Ollama takes: by the rules, and the texts looked for, of its own server."""

from __future__ import annotations

import pytest
from support.paths import FIXTURES

from macft.ollama.template import Proof
from macft.ollama.ways import GO, HARMONY, JINJA, capabilities, ollama_way, without_harm

TEMPLATE = "{{ range .Messages }}<|start|>{{ .Content }}<|end|>{{ end }}"


@pytest.mark.parametrize(
    ("jinja", "found"),
    [
        ("{{ messages[0].content }}", ()),
        ("{% if tools %}x{% endif %}", ("tools",)),
        ("{{ message.tool_calls }}", ("tools",)),
        ("<think>\n</think>", ("thinking",)),
        ("<think>", ()),
        ("</think>", ()),
        ("{{ content.split('</think>')[-1] }}", ("thinking",)),
        ('{{ content.split("</think>")[-1] }}', ("thinking",)),
        ("{{ content.split('</think>')[-1] }}{{ message.reasoning_content }}", ()),
        ("{{ content.split('</think>')[-1] }}<SPECIAL_12>", ()),
        ("{{ tools }}<think></think>", ("tools", "thinking")),
    ],
)
def test_capabilities_are_texts_in_the_chat_template(jinja: str, found: tuple[str, ...]):
    assert capabilities(jinja) == found
    assert ollama_way("qwen3", jinja, TEMPLATE) == (JINJA if found else GO)


def test_without_a_template_it_is_the_chat_template():
    assert ollama_way("llama", "x", None) == JINJA
    assert ollama_way("gpt-oss", "<|start|><|end|>", None) == JINJA


def test_harmony_is_for_gpt_oss_with_its_tags_in_the_template():
    assert ollama_way("gpt-oss", "{{ tools }}", TEMPLATE) == HARMONY
    assert ollama_way("gpt-oss", "{{ tools }}", TEMPLATE.replace("<|end|>", "")) == JINJA
    assert ollama_way("llama", "{{ tools }}", TEMPLATE) == JINJA


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "gemma", "mistral", "phi3"])
def test_plain_templates_are_rendered_in_go(name: str):
    jinja = (FIXTURES / "ollama_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    assert ollama_way("llama", jinja, TEMPLATE) == GO


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3_instruct", "qwen3_thinking"])
def test_templates_with_tools_or_thoughts_are_rendered_by_llama_cpp(name: str):
    jinja = (FIXTURES / "ollama_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    assert ollama_way("qwen3", jinja, TEMPLATE) == JINJA


def test_no_template_takes_the_place_of_a_chat_template_that_is_exact():
    dated, steady = Proof("x", None, 9, (), (), date="27 Nov 2026"), Proof("x", None, 9, (), ())
    assert without_harm(steady, GO) == steady and without_harm(dated, JINJA) == dated
    assert without_harm(dated, GO).go is None and "today's date" in str(without_harm(dated, GO).reason)
    assert without_harm(steady, HARMONY).go is None and "harmony" in str(without_harm(steady, HARMONY).reason)
