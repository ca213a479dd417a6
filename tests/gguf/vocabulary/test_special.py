"""What exported files say of chat boundaries, added tokens and sampling; what invalid tokenizers give."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_tokenizers import ids
from support.gguf_vocabularies import (
    fields_of,
    plain,
    vocabulary_size,
    write_byte_fallback,
    write_byte_level,
    written,
)
from support.tiny_gguf import llama_cpp
from support.tiny_tokenizer import CHATML, DEFAULT_SYSTEM, LLAMA3, MISTRAL, write_tiny_model
from tokenizers import AddedToken, Tokenizer

from macft.data.templates.chat_template import load_template
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError
from macft.gguf.vocabulary.fields import required_name, sampling_fields
from macft.gguf.vocabulary.files import read_vocabulary
from macft.models.locate import resolve_model

QUESTION = [{"role": "user", "content": "hello there"}]


# --- what a chat begins and ends with


def stops_at(path: Path, candidates: list[int]) -> set[int]:
    """The tokens that end generation in llama.cpp, each made certain in turn."""
    found = set()
    with llama_cpp(path) as oracle:
        for id_ in candidates:
            content = {"prompt": [5], "n_predict": 2, "logit_bias": [[id_, 1e6]], "temperature": 0.0}
            if oracle.post("/completion", content)["stop_type"] == "eos":
                found.add(id_)
    return found


def test_every_end_that_any_file_names_ends_generation(tmp_path: Path) -> None:
    """A base model's own end, ChatML's, and two that llama.cpp does not know by their text."""
    folder = write_tiny_model(tmp_path / "model", CHATML, eos="<|endoftext|>")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|user|>", "<|seen|>", "<|other|>")])
    core.save(str(folder / "tokenizer.json"))
    end, turn, user, seen, other = map(
        core.token_to_id, ("<|endoftext|>", "<|im_end|>", "<|user|>", "<|seen|>", "<|other|>")
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, seen]}))
    fields = fields_of(folder, eos_token_id=[user])
    assert fields["tokenizer.ggml.eos_token_id"] == turn  # a rendered turn ends with it
    assert plain(fields)["tokenizer.ggml.eos_token_ids"] == [turn, user, seen, end]
    path = written(tmp_path / "m.gguf", fields)
    assert stops_at(path, [end, turn, user, seen, other]) == {end, turn, user, seen}


def test_without_a_template_the_end_is_the_tokenizers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, None, eos="<|endoftext|>")
    fields = fields_of(folder)
    core = load_tokenizer(folder)
    assert fields["tokenizer.ggml.eos_token_id"] == core.vocabulary["<|endoftext|>"]
    assert "tokenizer.chat_template" not in fields and "tokenizer.ggml.eot_token_id" not in fields
    given = fields_of(folder, template=CHATML)
    assert given["tokenizer.ggml.eos_token_id"] == core.vocabulary["<|im_end|>"]
    assert given["tokenizer.chat_template"] == CHATML


USES_EOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'user' %}{{ eos_token }}{% else %}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, LLAMA3, MISTRAL, USES_EOS])
@pytest.mark.parametrize("adds_bos", [True, False, None])
def test_a_chat_in_llama_cpp_has_the_ids_it_was_trained_with(
    tmp_path: Path, template: str, adds_bos: bool | None
) -> None:
    """With BOS written by the template or not, added by the tokenizer or not, and eos_token read by the template."""
    folder = write_tiny_model(tmp_path / "model", template, eos="</s>")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": adds_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    text = load_template(folder, tokenizer.special_map).render(QUESTION, add_generation_prompt=True)
    with llama_cpp(written(tmp_path / "m.gguf", fields_of(folder))) as oracle:
        prompt = oracle.post("/apply-template", {"messages": QUESTION})["prompt"]
        assert oracle.tokenize(prompt, add_special=True) == tokenizer.encode(text).ids


def test_only_a_space_at_the_start_is_left_out_where_a_chat_begins_with_a_special_token(tmp_path: Path) -> None:
    core = write_byte_fallback(tmp_path, prefix="metaspace")
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    fields = fields_of(tmp_path, template=template)
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    assert fields_of(tmp_path)["tokenizer.ggml.add_space_prefix"] is True
    with llama_cpp(written(tmp_path / "m.gguf", fields)) as oracle:
        prompt = oracle.post("/apply-template", {"messages": QUESTION})["prompt"]
        assert oracle.tokenize(prompt, add_special=True) == ids(core, "<s>[INST] hello there [/INST]")


def test_added_tokens_keep_their_types_without_tokenizer_config(tmp_path: Path) -> None:
    """transformers 5 saves them in tokenizer.json alone."""
    core = write_byte_level(tmp_path, ["gpt2"], False)
    core.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<|tool|>", normalized=False)])
    core.save(str(tmp_path / "tokenizer.json"))
    fields = plain(fields_of(tmp_path))
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<|im_start|>"] == kinds["<|tool|>"] == gguf.TokenType.CONTROL
    assert kinds["<tool_call>"] == gguf.TokenType.USER_DEFINED and kinds["a"] == gguf.TokenType.NORMAL


@pytest.mark.parametrize("swallows", [True, False])
def test_special_tokens_swallow_white_space_if_the_name_says_so(tmp_path: Path, swallows: bool) -> None:
    core = write_byte_fallback(tmp_path, prefix=True)
    content = json.loads(core.to_str())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": core.get_vocab_size(), "content": "<|end|>"}]
    for token in content["added_tokens"]:
        token["rstrip"] = swallows and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    text = json.dumps(content)
    (tmp_path / "tokenizer.json").write_text(text)
    name = required_name(read_vocabulary(tmp_path, {}))
    assert name == ("phi3" if swallows else None)
    fields = {**fields_of(tmp_path), "general.name": f"my {name}"}
    with llama_cpp(written(tmp_path / "m.gguf", fields)) as oracle:
        chat = "<|end|>\n  hello<|end|>  there <s> x</s> y"
        assert oracle.tokenize(chat) == ids(Tokenizer.from_str(text), chat)


def test_a_folder_that_transformers_saved_again_gives_the_same_fields(tmp_path: Path) -> None:
    """transformers 5 drops add_bos_token and the added tokens from tokenizer_config.json."""
    from transformers import AutoTokenizer

    source = resolve_model("smollm2-135m").path
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    assert "added_tokens_decoder" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    first, second = plain(fields_of(source)), plain(fields_of(tmp_path))
    assert [name for name in {**first, **second} if first.get(name) != second.get(name)] == []


def test_spare_rows_become_unused_tokens_with_names_of_their_own(tmp_path: Path) -> None:
    core = write_byte_level(tmp_path, ["gpt2"], False)
    size = vocabulary_size(tmp_path)
    core.add_tokens([AddedToken(f"[PAD{size + 1}]", normalized=False)])
    core.save(str(tmp_path / "tokenizer.json"))
    fields = plain(fields_of(tmp_path, rows=size + 3))
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + 1}]", f"[[PAD{size + 1}]]", f"[PAD{size + 2}]"]
    assert fields["tokenizer.ggml.token_type"][-2:] == [gguf.TokenType.UNUSED] * 2


# --- other fields and problems


def test_sampling_defaults_are_those_of_generation_config(tmp_path: Path) -> None:
    content = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    fields = sampling_fields(tmp_path)
    assert {name: round(value.item(), 6) for name, value in fields.items()} == {
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.8,
        "general.sampling.temp": 0.7,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.penalty_last_n": -1,
    }
    assert {fields["general.sampling.top_k"].dtype, fields["general.sampling.temp"].dtype} == {
        np.dtype("int32"), np.dtype("float32")
    }  # fmt: skip
    assert sampling_fields(tmp_path / "none") == {}


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt"):
        fields_of(tmp_path, rows=10)


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_byte_level(tmp_path, ["gpt2"], False)
    size = vocabulary_size(tmp_path)
    with pytest.raises(ModelError, match=f"{size} tokens, the embedding {size - 1} rows"):
        fields_of(tmp_path, rows=size - 1)


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, ["gpt2"], False)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="which token ends an answer"):
        fields_of(tmp_path)


def test_files_of_two_models_are_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, ["gpt2"], False)
    core = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|im_end|>", "added_tokens_decoder": {core.vocabulary["<|im_end|>"]: {"content": "x"}}}
        )
    )
    with pytest.raises(ModelError, match="do not belong to one model"):
        fields_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"5000 is .* which is {content['added_tokens'][0]['id']} in the vocabulary"):
        fields_of(tmp_path, rows=6000)
