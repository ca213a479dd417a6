"""Loss masks and shortening: by hand, against transformers, and as properties of random chats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import build, chat
from support.data_rows import encode, fit_examples, read_examples, tokenize_examples
from support.own_qwen import write_own_qwen
from support.tiny_tokenizer import CHATML_GENERATION, TEMPLATES, write_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from macft.data.formats.conversations import Example
from macft.data.kinds import SFT
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.table import TokenizedExample
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError
from macft.models.locate import resolve_model

CHATML = build(TEMPLATES["chatml"])


def example(*contents: str, system: str | None = None) -> Example:
    return Example(tuple(chat(*contents, system=system)), "chat.jsonl:7")


def one(tokenizer: Tokenizer, given: Example, **options: Any) -> TokenizedExample:
    [tokenized], _ = tokenize_examples([given], tokenizer, CHATML, **{"cutoff_len": 4096, **options})
    return tokenized


def trained_text(tokenizer: Tokenizer, tokenized: TokenizedExample) -> str:
    return tokenizer.decode(tokenized.tokens[tokenized.loss_mask], skip_special=False)


# --- masks


def test_the_mask_by_hand(tokenizer: Tokenizer) -> None:
    tokenized = one(tokenizer, example("a", "bc"))
    pieces = [tokenizer.decode([id_], skip_special=False) for id_ in tokenized.tokens]
    assert pieces == [
        *["<|im_start|>", "user", "\n", "a", "<|im_end|>", "\n"],
        *["<|im_start|>", "assistant", "\n", "b", "c", "<|im_end|>", "\n"],
    ]
    assert tokenized.loss_mask.tolist() == [False] * 9 + [True] * 4
    assert tokenized.tokens.dtype == np.int32 and tokenized.loss_mask.dtype == bool


def test_the_text_is_encoded_once_without_added_tokens(tokenizer: Tokenizer) -> None:
    given = example("q", "the quick", "brown", "fox", system="s")
    assert one(tokenizer, given).tokens.tolist() == tokenizer.encode(CHATML.render(given.messages)).ids


def test_train_on_prompt_trains_all_but_token_0(tokenizer: Tokenizer) -> None:
    mask = one(tokenizer, example("a", "b"), train_on_prompt=True).loss_mask
    assert not mask[0] and mask[1:].all()


def test_mask_history_trains_the_last_answer(tokenizer: Tokenizer) -> None:
    tokenized = one(tokenizer, example("a", "b", "c", "d"), mask_history=True)
    assert trained_text(tokenizer, tokenized) == "d<|im_end|>\n"


def test_of_an_answer_that_opens_a_conversation_neither_system_text_nor_header_is_trained() -> None:
    folder = resolve_model("smollm2-135m").path
    own = load_tokenizer(folder)
    messages = [{"role": "assistant", "content": "Welcome!"}, *chat("Q1", "A2")]
    [tokenized], _ = tokenize_examples(
        [Example(tuple(messages), "x:1")], own, load_template(folder, own.special_map), cutoff_len=64
    )
    assert trained_text(own, tokenized) == "Welcome!<|im_end|>\nA2<|im_end|>\n"
    assert tokenized.loss_mask.sum() == 8
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.from_numpy(tokenized.tokens.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(tokenized.loss_mask)[None], ids, -100)
    # float32 sums of another machine may part in the seventh digit
    assert model(ids, labels=labels).loss.item() == pytest.approx(10.73971, abs=2e-5)


def test_token_0_is_never_trained(tokenizer: Tokenizer) -> None:
    plain = build("{% for m in messages %}{{ m.content }}{% endfor %}")
    given = Example(({"role": "assistant", "content": "abc"},), "x:1")
    [tokenized], _ = tokenize_examples([given], tokenizer, plain, cutoff_len=9)
    # "a", "b", "c", and the end token, which the template leaves out
    assert tokenized.loss_mask.tolist() == [False, True, True, True]


def test_straddling_tokens_are_counted_and_belong_to_where_they_end(tokenizer: Tokenizer) -> None:
    # "\n" of the header and "\n" of the answer are one token
    [tokenized], report = tokenize_examples([example("a", "\n\nb")], tokenizer, CHATML, cutoff_len=99)
    assert report.boundary_tokens == 1
    assert trained_text(tokenizer, tokenized) == "\n\n\nb<|im_end|>\n"
    assert tokenize_examples([example("a", "b")], tokenizer, CHATML, cutoff_len=99)[1].boundary_tokens == 0


def test_special_tokens_in_content_stay_special_and_are_said(tokenizer: Tokenizer) -> None:
    given = [example("what is <|im_end|>?", "an end"), example("q", "a"), example("q", "</s>")]
    kept, report = tokenize_examples(given, tokenizer, CHATML, cutoff_len=99)
    [im_end] = tokenizer.encode("<|im_end|>").ids
    assert kept[0].tokens.tolist().count(im_end) == 3 and kept[1].tokens.tolist().count(im_end) == 2
    assert report.special_in_content == 2
    assert list(report.warnings) == [
        "2 of 3 examples hold special tokens in their text, which stay special (first: <|im_end|> in chat.jsonl:7)"
    ]


def test_masks_equal_those_of_generation_tags_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path, CHATML_GENERATION)
    ours = load_tokenizer(folder)
    template = load_template(folder, ours.special_map)
    theirs = AutoTokenizer.from_pretrained(folder)
    # transformers leaves out the later bytes of a character that ends an answer, so none does here
    for chat_example in (
        example("hello", "how are you today?", "你好", "今天👋天气怎么样?", system="be terse"),
        example("a", "assistant user <b>", "a", "一.", "two", "three  four\n\nfive"),
    ):
        output = theirs.apply_chat_template(
            list(chat_example.messages), return_assistant_tokens_mask=True, return_dict=True
        )
        expected = list(output["assistant_masks"])
        # theirs marks the content alone; the end token and the newline after it are ours too
        for i in range(len(expected) - 3, 0, -1):
            if expected[i] and not expected[i + 1]:
                expected[i + 1] = expected[i + 2] = 1
        [tokenized], _ = tokenize_examples([chat_example], ours, template, cutoff_len=999)
        assert tokenized.tokens.tolist() == output["input_ids"]
        assert tokenized.loss_mask.astype(int).tolist() == expected


def test_real_rows_are_trained_from_the_generation_prompt_on(qwen: Path, data_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(qwen), AutoTokenizer.from_pretrained(qwen)
    template = load_template(qwen, ours.special_map)
    examples = read_examples("alpaca_zh_demo,identity", str(data_folder), 50)
    kept, report = tokenize_examples(examples, ours, template, cutoff_len=4096)
    assert (report.kept, report.boundary_tokens, report.shortened) == (100, 0, 0)
    for chat_example, tokenized in zip(examples, kept, strict=True):
        messages = list(chat_example.messages)
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert tokenized.tokens.tolist() == theirs.apply_chat_template(messages)["input_ids"]
        assert np.flatnonzero(tokenized.loss_mask).tolist() == list(range(len(prompt), len(tokenized.tokens)))


def test_many_examples_come_in_order_each_as_if_alone(tokenizer: Tokenizer) -> None:
    # more than are encoded at once
    many = [example("q", f"answer {i}") for i in range(2100)]
    kept, report = tokenize_examples(many, tokenizer, CHATML, cutoff_len=99)
    texts = [trained_text(tokenizer, tokenized) for tokenized in kept]
    assert texts == [f"answer {i}<|im_end|>\n" for i in range(2100)]
    assert report.tokens == sum(len(tokenized.tokens) for tokenized in kept)


def test_the_empty_template_trains_the_answer_and_the_end_token(tokenizer: Tokenizer) -> None:
    raw = load_template(Path(), {"eos_token": "</s>"}, "empty")
    [tokenized], report = tokenize_examples([example("one two", " three")], tokenizer, raw, cutoff_len=99)
    assert tokenized.tokens.tolist() == tokenizer.encode("one two three</s>").ids
    assert trained_text(tokenizer, tokenized) == " three</s>" and report.boundary_tokens == 0


# --- what cannot be trained on


def test_rows_without_an_answer_are_counted_and_left_out(tokenizer: Tokenizer) -> None:
    kept, report = tokenize_examples([example("q"), example("q", "a")], tokenizer, CHATML, cutoff_len=99)
    assert (report.examples, report.kept, report.without_target, len(kept)) == (2, 1, 1, 1)
    assert report.tokens == len(kept[0].tokens) and report.trained_tokens == kept[0].loss_mask.sum() == 3
    assert list(report.warnings) == ["1 of 2 examples have nothing to train on and are left out (first: chat.jsonl:7)"]


def test_nothing_left_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="none of the 2 examples has a token to train on"):
        tokenize_examples([example("q"), example("q")], tokenizer, CHATML, cutoff_len=99)
    with pytest.raises(DataError, match="cutoff_len 5"):
        tokenize_examples([example("q", "a")], tokenizer, CHATML, cutoff_len=5)


def test_a_refused_conversation_is_named_with_the_templates_words(tokenizer: Tokenizer) -> None:
    gemma = build(TEMPLATES["gemma"])
    bad = example("q", "a", system="s")
    with pytest.raises(DataError) as error:
        tokenize_examples([example("q", "a"), bad], tokenizer, gemma, cutoff_len=99)
    assert str(error.value) == (
        "chat.jsonl:7: the chat template (test.jinja) refuses this conversation: System role not supported"
    )
    with pytest.raises(DataError, match=r"^chat.jsonl:7 and 1 more: the chat template"):
        tokenize_examples([bad, bad], tokenizer, gemma, cutoff_len=99)


# --- cutoff_len


def test_the_start_of_the_oldest_question_goes_first(tokenizer: Tokenizer) -> None:
    given = example("one two three four", "b", "the six", "d", system="sys")
    full = len(one(tokenizer, given).tokens)
    [fitted] = fit_examples([given], tokenizer, CHATML, cutoff_len=full - 2)
    assert fitted.rendered.text == CHATML.render(chat(" three four", "b", "the six", "d", system="sys"))
    assert fitted.shortened and not fitted.answer_cut and len(fitted.encoded.ids) == full - 2
    all_of_first = len(tokenizer.encode("one two three four").ids)
    [fitted] = fit_examples([given], tokenizer, CHATML, cutoff_len=full - all_of_first - 1)
    assert fitted.rendered.text == CHATML.render(chat("", "b", " six", "d", system="sys"))


def test_an_example_that_fits_exactly_is_left_alone(tokenizer: Tokenizer) -> None:
    given = example("one two", "three")
    full = one(tokenizer, given)
    _, report = tokenize_examples([given], tokenizer, CHATML, cutoff_len=len(full.tokens))
    assert report.shortened == report.answer_cut == 0


def test_an_answer_too_long_loses_its_end_and_its_end_token(tokenizer: Tokenizer) -> None:
    given = example("one two", "three four five six", system="sys")
    emptied = one(tokenizer, example("", "three four five six", system="sys"))
    cutoff = len(emptied.tokens) - 4
    [tokenized], report = tokenize_examples([given], tokenizer, CHATML, cutoff_len=cutoff)
    assert tokenized.tokens.tolist() == emptied.tokens[:cutoff].tolist()
    assert tokenized.loss_mask.tolist() == emptied.loss_mask[:cutoff].tolist()
    text = trained_text(tokenizer, tokenized)
    assert "three four five six".startswith(text) and text and "<|im_end|>" not in text
    assert (report.shortened, report.answer_cut, report.kept) == (1, 1, 1)


def test_a_cut_behind_the_last_answer_is_no_cut_answer(tokenizer: Tokenizer) -> None:
    given = example("q", "a", "an unanswered question")
    answered = len(one(tokenizer, example("", "a")).tokens)
    [tokenized], report = tokenize_examples([given], tokenizer, CHATML, cutoff_len=answered)
    assert trained_text(tokenizer, tokenized) == "a<|im_end|>\n"
    assert (report.shortened, report.answer_cut) == (1, 0)


def test_shortening_never_halves_a_character(tokenizer: Tokenizer) -> None:
    question = "𠮷野家で👩‍👩‍👧食べる" * 4
    full = len(one(tokenizer, example(question, "ok")).tokens)
    for cutoff in range(20, full):
        [fitted] = fit_examples([example(question, "ok")], tokenizer, CHATML, cutoff_len=cutoff)
        content = fitted.rendered.text.split("user\n")[1].split("<|im_end|>")[0]
        assert question.endswith(content)
        assert tokenizer.decode(fitted.encoded.ids, skip_special=False) == fitted.rendered.text
        # four bytes a character: no more than its tokens can be lost beyond need
        assert cutoff - 4 < len(fitted.encoded.ids) <= cutoff


def test_shortening_keeps_accents_with_their_letters(qwen: Path) -> None:
    # Qwen composes "e" with its accents before it encodes, so a token ends between the two
    ours = load_tokenizer(qwen)
    question = "e\u0301u\u0308" * 20
    full = len(one(ours, example(question, "ok")).tokens)
    for cutoff in range(full - 18, full):
        [fitted] = fit_examples([example(question, "ok")], ours, CHATML, cutoff_len=cutoff)
        content = fitted.rendered.text.split("user\n")[1].split("<|im_end|>")[0]
        assert content[:1] in ("e", "u", "") and question.endswith(content)


def test_a_template_that_refuses_the_shortened_chat_is_named(tokenizer: Tokenizer) -> None:
    picky = build("{% if not messages[0].content %}{{ raise_exception('empty') }}{% endif %}" + CHATML.source)
    with pytest.raises(DataError, match=r"chat.jsonl:7, shortened to cutoff_len 9: .*: empty$"):
        tokenize_examples([example("one two", "three")], tokenizer, picky, cutoff_len=9)


# --- properties of random chats

WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(
    lambda text: not re.search(r"<\||</?s>|<end", text)
)
ANSWERS = WORDS.filter(lambda text: not text[:1].isspace())
CHATS = st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(turns=CHATS, system=st.none() | WORDS)
def test_the_trained_tokens_are_the_answers_and_their_ends(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    contents = [content for turn in turns for content in turn]
    tokenized = one(tokenizer, example(*contents, system=system), cutoff_len=10_000)
    assert trained_text(tokenizer, tokenized) == "".join(answer + "<|im_end|>\n" for _, answer in turns)


@settings(max_examples=150, deadline=None)
@given(turns=CHATS, system=st.none() | WORDS, cutoff=st.integers(4, 200))
def test_shortening_takes_only_user_text(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None, cutoff: int
) -> None:
    given = example(*(content for turn in turns for content in turn), system=system)
    [fitted] = fit_examples([given], tokenizer, CHATML, cutoff_len=cutoff)
    [whole] = fit_examples([given], tokenizer, CHATML, cutoff_len=100_000)
    assert len(fitted.encoded.ids) == len(fitted.loss_mask) <= cutoff
    if not fitted.shortened and not fitted.answer_cut:
        assert fitted.encoded == whole.encoded
        return
    # headers, system and answers stand as they were; user texts are ends of what they were
    pattern = "".join(
        re.escape(f"<|im_start|>{m['role']}\n")
        + ("(.*)" if m["role"] == "user" else re.escape(m["content"]))
        + re.escape("<|im_end|>\n")
        for m in given.messages
    )
    found = re.fullmatch(pattern, fitted.rendered.text, re.DOTALL)
    assert found
    left = list(found.groups())
    assert all(question.endswith(rest) for (question, _), rest in zip(turns, left, strict=True))
    changed = [i for i, (question, _) in enumerate(turns) if left[i] != question]
    assert all(left[i] == "" for i in range(max(changed, default=0)))
    if fitted.answer_cut:
        assert left == [""] * len(turns) and len(fitted.encoded.ids) == cutoff
    elif any(left):
        assert len(fitted.encoded.ids) > cutoff - 6


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    ["", "  ", "e\u0301u\u0308", "👩‍👩‍👧 a", "</s>one</s>", "\u1112\u1161\u11ab", "ﬁ ½ ①", "a\r\n\u200b b", "\u2581x"]
)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_borders_are_placed_as_the_places_of_all_tokens_say(
    tokenizer: Tokenizer, others: list[Tokenizer], texts: list[str]
) -> None:
    borders = [list(range(len(text) + 1)) for text in texts]
    for each in [tokenizer, *others]:
        for text, placed, expected in zip(texts, each.place_batch(texts, borders), borders, strict=True):
            encoded = each.encode(text)
            assert placed.ids == encoded.ids
            assert placed.borders == [encoded.token_after(border) for border in expected]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Tokenizers that compose letters, drop blanks, and mark words: characters with no token, or with several."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    pieces = [*"abcdefghijklmnopqrstuvwxyz▁é", "<unk>"]
    words = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marked = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    marked.normalizer = normalizers.NFC()
    marked.pre_tokenizer = pre_tokenizers.Metaspace()
    found = [Tokenizer(core, special_map={}, eos_ids=frozenset(), files={}) for core in (words, marked)]
    return [*found, load_tokenizer(write_own_qwen(tmp_path_factory.mktemp("qwen")))]


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    cutoff=st.integers(4, 120),
    keys=st.sampled_from([{}, {"train_on_prompt": True}, {"mask_history": True}]),
)
def test_many_rows_are_masked_as_each_alone(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], cutoff: int, keys: dict[str, bool]
) -> None:
    rows = [example(*turn) for turn in turns] + [example(*(text for turn in turns for text in turn))]
    table = encode(SFT, rows, tokenizer, CHATML, cutoff_len=cutoff, **keys)
    slow = list(fit_examples(rows, tokenizer, CHATML, cutoff_len=cutoff, **keys))
    for i, fitted in enumerate(slow):
        is_kept = bool(fitted.loss_mask.any())
        assert (table.columns["skip_reason"][i] == 0) == is_kept
        if is_kept:
            assert table.row(i).tokens.tolist() == fitted.encoded.ids
            assert table.row(i).loss_mask.tolist() == fitted.loss_mask.tolist()
            assert table.columns["boundary_tokens"][i] == fitted.boundary_tokens
        flags = (fitted.shortened, fitted.emptied, fitted.answer_cut)
        assert table.columns["flags"][i] == sum(flag << bit for bit, flag in enumerate(flags))
