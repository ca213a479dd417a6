"""The padding of a chat template: nothing is rendered differently, and no template of Ollama's comes near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import FIXTURES
from support.tiny_gguf import CONTROL, TinyGguf, byte_level, hf_weights, write_gguf

from macft.data.templates.chat_template import ChatTemplate
from macft.errors import DataError, ModelError
from macft.ollama.detection import pad_template
from macft.verify import llama_cpp

FOLDER = FIXTURES / "ollama_templates"
PUBLISHED = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": " a\n"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
# what a comment before it could change: white space and block tags at the start
EDGES = {
    "space": "  {{ messages[0].content }}",
    "block_after_space": "  {% if true %}x{% endif %}\n",
    "lines": "\n\n{% if true %}\n  x\n{% endif %}\n\n",
    "newline_then_block": "\n  {% if true %}x{% endif %}",
    "stripping": "\n  {%- if true %}\n  x\n{% endif -%}\n ",
    "comment": " {# c #}\nx",
    "text": "x\n {% if true %}y{% endif %}\n",
}
# Ollama takes a template for one it knows when fewer edits than this lead from one to the other
NEAR = 100


def distance(a: str, b: str) -> int:
    """The least number of insertions, removals and replacements of characters that turn a into b."""
    codes = np.array([ord(c) for c in b], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, character in enumerate(a, 1):
        candidates = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(character)))
        # an insertion costs one more than the cell to the left: a running minimum of what is left of `steps`
        row = np.minimum.accumulate(np.concatenate([[i], candidates]) - steps) + steps
    return int(row[-1])


def test_the_distance_is_levenshteins():
    pairs = [("kitten", "sitting"), ("", "abc"), ("abc", ""), ("flaw", "lawn"), ("a", "a")]
    assert [distance(a, b) for a, b in pairs] == [3, 3, 3, 2, 0]


def rendered(source: str, chat: list[dict[str, str]], *, prompt: bool) -> str:
    template = ChatTemplate(source, name="test", special_map={"bos_token": "<s>", "eos_token": "</s>"})
    try:
        return template.render(chat, add_generation_prompt=prompt)
    except DataError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("source", [*PUBLISHED.values(), *EDGES.values()], ids=[*PUBLISHED, *EDGES])
def test_a_padded_template_renders_the_same(source: str):
    for chat in (CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]):
        for prompt in (False, True):
            assert rendered(pad_template(source), chat, prompt=prompt) == rendered(source, chat, prompt=prompt)


@given(st.text("{}%#- \n\tx", max_size=12))
def test_a_comment_before_any_start_changes_nothing(start: str):
    source = start + "{% if true %}\n x{% endif %}\n"
    try:
        want = rendered(source, CHAT, prompt=True)
    except ModelError:  # no Jinja at all
        return
    assert rendered(pad_template(source), CHAT, prompt=True) == want


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_padded_template_is_far_from_itself_and_from_every_other(name: str):
    padded = pad_template(PUBLISHED[name])
    for other in PUBLISHED.values():
        assert distance(padded, other) >= NEAR


def test_before_it_is_padded_a_template_can_be_near_another():
    assert distance(PUBLISHED["chatml"], PUBLISHED["chatml"].replace("'\\n'", "'\n'")) < NEAR


@given(st.text("a~{", max_size=300), st.text("~a", max_size=60))
def test_only_a_hundred_and_fifty_six_tildes_could_come_near(known: str, source: str):
    found = distance(pad_template(source), known)
    assert found >= 256 + source.count("~") - known.count("~")
    assert found >= NEAR or known.count("~") > 156


def test_padding_twice_is_padding_once():
    assert pad_template(pad_template("x")) == pad_template("x")


IN_LLAMA_CPP = {name: PUBLISHED[name] for name in ("chatml", "gemma", "qwen2.5", "llama3")} | EDGES


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_renders_a_padded_template_as_the_one_trained_with(tmp_path: Path, name: str):
    if not llama_cpp.is_installed():
        pytest.skip("xllamacpp is not installed (pip install xllamacpp)")
    chat = CHAT[1:] if name == "gemma" else CHAT
    model = byte_level(TinyGguf(layers=1, fields={"tokenizer.chat_template": pad_template(IN_LLAMA_CPP[name])}))
    path = write_gguf(tmp_path / "m.gguf", model, hf_weights(model))
    with llama_cpp.llama_cpp(path, threads=1) as server:
        got = server.apply_template(chat)
    # bos and eos are the tokens 1 and 2 of the tiny model
    assert got == rendered(IN_LLAMA_CPP[name], chat, prompt=True).replace("<s>", CONTROL[1]).replace("</s>", CONTROL[2])
