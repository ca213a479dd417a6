"""White space that special tokens swallow: the prompts of the exported templates have the tokenizer's token ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.go_templates import go_render

from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.gguf.swallowed_space import without_swallowed_space
from macft.ollama.export import export_ollama
from macft.verify.llama_cpp import llama_cpp
from macft.verify.llama_cpp_compare import verify_gguf
from macft.weights.folder import ModelFolder

# the form of Phi's, with Jinja's own white space at every place where wrapping could lose some
TURNS = (
    "\n  {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>\n{% endif %}\n"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " two\n\nlines"},
    {"role": "user", "content": "and you?"},
]


def swallowing(model: Path, folder: Path, side: str, *tokens: str) -> Path:
    """The model with special tokens that swallow the white space on one side of them, and without </s>."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token[side] = token["content"] in tokens
        token["content"] = "<|other|>" if token["content"] == "</s>" else token["content"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def template_of(folder: Path, source: str = TURNS) -> ChatTemplate:
    return ChatTemplate(source, "test", load_tokenizer(folder).special_map)


@pytest.mark.parametrize("side", ["rstrip", "lstrip"])
def test_the_prompts_in_llama_cpp_and_in_go_have_the_token_ids_of_the_training(side: str, model: Path, tmp_path: Path):
    folder = swallowing(model, tmp_path / "model", side, "<|im_end|>", "<|im_start|>")
    tokenizer, template = load_tokenizer(folder), template_of(folder)
    trained = tokenizer.encode(template.render(CHAT, add_generation_prompt=True)).ids
    out = tmp_path / "out"
    report = export_ollama(
        ModelFolder("tiny", folder), (), out, name="tiny", quant="f16", template=template, in_llama_cpp=True
    )
    with llama_cpp(report.gguf.path, threads=1) as server:
        assert server.tokenize(server.apply_template(CHAT), add_special=True) == trained
        [go] = go_render([(str(report.proof.go), CHAT)])
        assert server.tokenize(go, add_special=True) == trained
        kept = server.tokenize(template.render(CHAT, add_generation_prompt=True), add_special=True)
        # tokens in a content swallow too
        chat = [{"role": "user", "content": "one <|im_end|>  two "}]
        ids = tokenizer.encode(template.render(chat, add_generation_prompt=True)).ids
        assert server.tokenize(server.apply_template(chat), add_special=True) == ids
    assert kept != trained
    # the white space at the end of a content is before <|im_end|>, none at its start is after a token
    assert any("Go cannot trim" in limit for limit in report.proof.limits) == (side == "lstrip")
    found = verify_gguf(report.gguf.path, None, quant="f16", tokenizer=tokenizer, template=template, threads=1)
    assert found.prompts == 4 and found.warnings == ()


def test_the_text_is_the_one_without_what_the_tokenizer_swallows(model: Path, tmp_path: Path):
    folder = swallowing(model, tmp_path / "model", "rstrip", "<|im_end|>")
    stripping = without_swallowed_space(template_of(folder), folder)
    start = "\n<|im_start|>"
    assert (
        template_of(folder).render(CHAT[:2])
        == f"{start}system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    )
    assert stripping.render(CHAT[:2]) == f"{start}system\nbe brief<|im_end|><|im_start|>user\nhello<|im_end|>"


def test_a_template_stays_as_it_is_where_nothing_is_swallowed_or_llama_cpp_does_it_too(model: Path, tmp_path: Path):
    template = template_of(model)
    assert without_swallowed_space(template, model) is template
    folder = swallowing(model, tmp_path / "model", "rstrip", "<|im_end|>")
    tight = template_of(folder, TURNS.replace("<|im_end|>\n", "<|im_end|>"))
    assert without_swallowed_space(tight, folder) is tight
    phi = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    phi["added_tokens"].append({**phi["added_tokens"][0], "content": "</s>"})
    (folder / "tokenizer.json").write_text(json.dumps(phi), encoding="utf-8")
    assert without_swallowed_space(template, folder) is template
