"""Token ids of llama.cpp against the tokenizer's: what the comparison finds, and what it lets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.gguf_vocabularies import fields_of, write_byte_fallback, write_byte_level, written
from tokenizers import AddedToken, Tokenizer, normalizers

from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.gguf.vocabulary.split_patterns import PUBLISHED_CASES, gpt4o
from macft.verify.llama_cpp_compare import GgufCheck, verify_gguf
from macft.verify.llama_cpp_tokens import MARKED_TEXT
from macft.verify.logits import VerifyError


def verified(folder: Path, core: Tokenizer, template: str | None = None) -> GgufCheck:
    """The comparison of a tokenizer's ids with those in a file made of it."""
    core.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    chat = ChatTemplate(template, name="test", special_map=tokenizer.special_map) if template is not None else None
    path = written(folder / "m.gguf", fields_of(folder, template=template))
    return verify_gguf(path, None, quant="f32", tokenizer=tokenizer, template=chat, threads=1)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (
            AddedToken("cat", single_word=True),
            "around the added token 'cat' (single_word, normalized) token 1 after 'x' ",
        ),
        (AddedToken("cat", single_word=True), "the text is 'xcatx'"),
        (AddedToken("<|cat|>", single_word=True, special=True), "the text is 'x<|cat|>x'"),
        (AddedToken("cat", lstrip=True), None),
        (AddedToken("<|cat|>", rstrip=True, special=True), None),
        (AddedToken("cat"), None),
        (AddedToken("▁cat ▁"), None),
        (AddedToken("▁"), None),
        (AddedToken("\r\n"), None),
        (AddedToken("好的", normalized=False), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_byte_level_token_that_llama_cpp_cuts_out_elsewhere_is_an_error(
    token: Any, said: str, tmp_path: Path
) -> None:
    core = write_byte_level(tmp_path, ["gpt2"], False)
    (core.add_special_tokens if token.special else core.add_tokens)([token])
    if said is None:
        assert verified(tmp_path, core).texts == 16
        return
    with pytest.raises(VerifyError) as caught:
        verified(tmp_path, core)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_matched_on_composed_text_is_an_error(tmp_path: Path) -> None:
    """The tokenizer composes the token as it does the text; llama.cpp looks for it as it is written."""
    core = write_byte_level(tmp_path, ["gpt2"], False)
    core.normalizer = normalizers.NFC()
    core.add_tokens([AddedToken("cafe\u0301", normalized=True)])
    with pytest.raises(VerifyError, match=r"around the added token 'cafe\u0301' [(]normalized[)] "):
        verified(tmp_path, core)


def test_a_token_matched_after_a_space_alone_is_an_error(tmp_path: Path) -> None:
    """Before it looks for the token, the tokenizer puts a space before it, as before a text."""
    core = write_byte_fallback(tmp_path, prefix=True)
    core.add_tokens([AddedToken("<tool>", normalized=True)])
    with pytest.raises(VerifyError, match=r"around the added token '<tool>' [(]normalized[)] "):
        verified(tmp_path, core)


def test_white_space_that_the_tokenizer_drops_is_a_warning_that_names_the_tokens(tmp_path: Path) -> None:
    core = write_byte_level(tmp_path, ["gpt2"], False)
    core.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|mask|>", lstrip=True)])
    found = verified(tmp_path, core)
    assert found.warnings == (
        "llama.cpp keeps the white space beside <|user|>, <|mask|>, which the tokenizer drops: contents that begin "
        "or end with some there are read with tokens that training did not have",
    )
    assert found.added == len(core.get_added_tokens_decoder()) - 2
    writes = "{% for m in messages %}<|user|>{{ m.content }}<|mask|>{% endfor %}"
    assert verified(tmp_path, core, writes).warnings == found.warnings


def test_texts_are_compared_as_they_come_in_a_chat(tmp_path: Path) -> None:
    """A space goes before a text, but not behind the BOS that every chat begins with (Mistral)."""
    core = write_byte_fallback(tmp_path, prefix="metaspace")
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    assert verified(tmp_path, core, template).texts == 16


def test_words_with_marks_are_a_warning_where_llama_cpp_knows_no_marks(tmp_path: Path) -> None:
    """gpt-oss: nothing that an export could write makes llama.cpp cut Hindi as its tokenizer does."""
    core = write_byte_level(tmp_path, [gpt4o(*PUBLISHED_CASES)], False, text=MARKED_TEXT)
    found = verified(tmp_path, core)
    assert found.texts == 15 and found.note.startswith("llama.cpp loads it; token ids of 15 texts and around ")
    assert [warning.partition(" differently")[0] for warning in found.warnings] == [
        "llama.cpp cuts words with marks (Hindi, Thai, Bengali, Tamil)"
    ]


def test_one_wrong_token_among_many_is_the_one_named(tmp_path: Path) -> None:
    core = write_byte_level(tmp_path, ["gpt2"], False)
    core.add_special_tokens(
        [AddedToken(f"<|reserved_{i}|>", normalized=False, single_word=i == 357) for i in range(500)]
    )
    with pytest.raises(VerifyError, match=r"around the added token '<\|reserved_357\|>' [(]single_word, special[)]"):
        verified(tmp_path, core)
