"""What llama.cpp writes where Ollama leaves the prompt to it: published templates, and a text that Go cannot write."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from support.tiny_gguf import CONTROL, TinyGguf, byte_level, hf_weights, write_gguf

from macft.data.templates.chat_template import ChatTemplate
from macft.gguf.template_variables import pin_variables
from macft.ollama.detection import pad_template
from macft.ollama.native import NativeProof, prove_native
from macft.verify.logits import VerifyError

SPECIAL = {"bos_token": CONTROL[1], "eos_token": CONTROL[2]}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def proven(folder: Path, trained: str, embedded: str | None = None) -> NativeProof:
    template = ChatTemplate(trained, "test", SPECIAL)
    text = pad_template(pin_variables(template)) if embedded is None else embedded
    model = byte_level(TinyGguf(layers=1, fields={"tokenizer.chat_template": text}))
    path = write_gguf(folder / "m.gguf", model, hf_weights(model))
    return prove_native(path, template, bos=None, name=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "thinking"),
    [
        *(("llama3_1", True), ("gemma", True), ("deepseekv3", True), ("qwen3_5_nothink", True)),
        *(("qwen3", False), ("glm4moe", False), ("gemma4_v5", False)),
    ],
)
def test_llama_cpp_writes_what_published_templates_do(name: str, thinking: bool, tmp_path: Path):
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl, whose chat templates this reads, is not installed (pip install trl)")
    path = Path(next(iter(spec.submodule_search_locations))) / "chat_templates" / f"{name}.jinja"
    source = path.read_text(encoding="utf-8")
    if not thinking:  # as training keeps it
        source = "{% set enable_thinking = enable_thinking is true %}\n" + source
    found = proven(tmp_path, source)
    assert found.cases > 500
    covered = [limit for limit in found.limits if "begun" not in limit]
    assert all("outer white space beyond ASCII" in limit for limit in covered)


def test_a_difference_in_plain_chat_is_an_error_and_one_in_white_space_beyond_ascii_a_limit(tmp_path: Path):
    with pytest.raises(VerifyError, match=r"with plain text, the template writes '<\|im_start\|>user"):
        proven(tmp_path, CHATML, CHATML.replace("<|im_start|>", "<|user|>"))
    trimming = CHATML.replace("m.content", "m.content | trim")
    [limit] = [limit for limit in proven(tmp_path, trimming).limits if "begun" not in limit]
    assert limit.startswith(
        "Not equal with outer white space beyond ASCII in a user or an assistant or a system message"
    )


def test_begun_answers_are_claimed_only_where_llama_cpp_goes_on_as_the_template_does(tmp_path: Path):
    plain = proven(tmp_path, CHATML)
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    other = proven(tmp_path, thinking)
    assert plain.cases - other.cases > 500
    assert not [limit for limit in plain.limits if "own rules" in limit]
    [limit] = [limit for limit in other.limits if "own rules" in limit]
    assert "An answer that was begun goes on by llama.cpp's own rules: not equal with plain text" in limit


def test_a_template_that_refuses_all_is_no_proof(tmp_path: Path):
    assert proven(tmp_path, "{% for tool in tools %}{% endfor %}" + CHATML) == NativeProof(0, ())
