"""Modelfiles: what is written comes back from a parser of Ollama's grammar, and what cannot be written is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.modelfile_parser import parse_modelfile

from macft.errors import UsageError
from macft.ollama.client import ModelRequest
from macft.ollama.go import quoted
from macft.ollama.modelfile import modelfile

# what is apt to break a value, among any characters
ODD = [
    '"',
    '""',
    '"""',
    "\n",
    "\r\n",
    " ",
    "\t",
    "#",
    "FROM x",
    "\\",
    "{{",
    "}}",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "你好",
    "🎉",
]
texts = st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=8).map("".join)


def written(source: str = "./m.gguf", **given_values) -> list[tuple[str, str]]:
    return parse_modelfile(modelfile(source, ModelRequest("m", **given_values)))


def test_every_part_comes_back_under_its_name():
    request = ModelRequest(
        "m",
        template='{{- "a\\n" }}\n{{- .Content }}',
        system='You say "hi".\n\nAlways.',
        parameters=[("stop", "<|im_end|>"), ("stop", 'a"'), ("temperature", 0.7), ("top_k", 40), ("use_mmap", True)],
        requires="0.30.0",
    )
    assert parse_modelfile(modelfile("./model q4.gguf", request)) == [
        ("model", "./model q4.gguf"),
        ("requires", "0.30.0"),
        ("template", '{{- "a\\n" }}\n{{- .Content }}'),
        ("system", 'You say "hi".\n\nAlways.'),
        ("stop", "<|im_end|>"),
        ("stop", 'a"'),
        ("temperature", "0.7"),
        ("top_k", "40"),
        ("use_mmap", "true"),
    ]


def test_what_is_not_asked_for_is_not_written():
    assert modelfile("m.gguf", ModelRequest("m")) == "FROM m.gguf\n"


@given(texts)
@example('ends with quotes"""')
@example('a line ends with """ \nand a space')
@example("a\x0bb")
@example('"')
@example('""\n""')
@example("  spaces at both ends  ")
@example("\n")
def test_a_system_text_comes_back_or_is_refused(text):
    try:
        found = written(system=text)
    except UsageError:
        assert parse_naively(text) != [("model", "./m.gguf"), ("system", text)]
    else:
        assert found == [("model", "./m.gguf"), ("system", text)]


def parse_naively(text: str) -> list[tuple[str, str]] | None:
    """What the parser makes of the text when it is written all the same; None when it fails."""
    try:
        return parse_modelfile(f'FROM ./m.gguf\nSYSTEM """{text}"""\n'.encode("utf-8", "surrogatepass").decode())
    except ValueError:
        return None


@given(texts)
@example('"')
@example('"""')
@example('a"')
@example(" a ")
def test_a_stop_text_comes_back_or_is_refused(text):
    try:
        found = written(parameters=[("stop", text), ("top_k", 1)])
    except UsageError:
        assert any(not c.isprintable() for c in text)
    else:
        assert found == [("model", "./m.gguf"), ("stop", text), ("top_k", "1")]


@given(st.text())
def test_a_go_literal_survives_whatever_it_holds(text):
    go = f"{{{{- {quoted(text)} }}}}"
    assert written(template=go) == [("model", "./m.gguf"), ("template", go)]


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"system": 'one\nsay """\ntwo'}, 'SYSTEM: line 2 ends with """, which ends the value in a Modelfile'),
        ({"system": "你好\u3000世界"}, "SYSTEM: the character U+3000 (after '你好') does not print"),
        ({"system": "a\udc80"}, "U+DC80"),
        ({"source": '"m"'}, "FROM '\"m\"': expected a name without quotes or spaces around it"),
        ({"source": "a\nb"}, "FROM: the character U+000A (after 'a') does not print"),
        ({"source": ""}, "FROM '': expected a name"),
        ({"requires": "0.30"}, "REQUIRES '0.30': expected a version such as 0.30.0"),
        ({"parameters": [("top k", 1)]}, "PARAMETER 'top k': a name has letters, digits and underscores only"),
        ({"parameters": [("stop", "\x00")]}, "PARAMETER stop: the character U+0000"),
    ],
)
def test_what_the_grammar_cannot_say_is_one_line(invalid, message):
    with pytest.raises(UsageError) as error:
        written(**invalid)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(UsageError) as error:
        written(system="\u00a0", requires="x", source="")
    assert [name in str(error.value) for name in ("SYSTEM", "REQUIRES", "FROM")] == [True] * 3


def test_the_parser_has_the_traps_it_is_there_for():
    assert parse_modelfile('FROM m\nSYSTEM """a"""\nTEMPLATE b\n')[1:] == [("system", "a"), ("template", "b")]
    assert parse_modelfile('# c\nFROM m\nSYSTEM """a\u00a0b\n"""') == [("model", "m"), ("system", "ab\n")]
    assert parse_modelfile("from m  \nPARAMETER top_k 1\n") == [("model", "m"), ("top_k", "1")]
    assert parse_modelfile('FROM m\nPARAMETER stop " a "')[1:] == [("stop", " a ")]
    with pytest.raises(ValueError):
        parse_modelfile('FROM m\nSYSTEM """a')
    with pytest.raises(ValueError):
        parse_modelfile("FROM m\nNONSENSE a\n")
    with pytest.raises(ValueError):
        parse_modelfile("SYSTEM a\n")
