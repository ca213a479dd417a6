"""A text that is the whole input begins with what the tokenizer begins inputs with, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_rows import tokenize, tokenize_texts
from support.parrot import make_model
from support.tiny_tokenizer import CHATML, surround, write_tiny_model, write_word_model

from macft.data.formats.conversations import Example
from macft.data.formats.feedback import FeedbackExample
from macft.data.formats.pairs import PairExample
from macft.data.formats.texts import PlainText
from macft.data.kinds import DPO, KTO, SFT
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.row_preview import preview_text
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.inference.answer import encode_prompt

TEXTS = ("the quick brown fox", "你好. one", " two", "numbers 0\n")
QUESTION, ANSWER = "what is the capital?", " Paris"


@pytest.fixture(params=["<s> $A", "<|im_start|> $A </s>", "words"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Llama 3's kind, one that also ends texts, and Mistral's kind."""
    if request.param == "words":
        return write_word_model(tmp_path)
    return surround(write_tiny_model(tmp_path, eos="</s>"), request.param)


def theirs(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids


def closed(folder: Path, text: str) -> list[int]:
    """`theirs`, closed once by the end token."""
    ids, [end] = theirs(folder, text), load_tokenizer(folder).encode("</s>").ids
    return ids if ids[-1] == end else [*ids, end]


def texts_of(*contents: str) -> list[PlainText]:
    return [PlainText(content, f"texts.jsonl:{i}") for i, content in enumerate(contents, 1)]


def empty(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    return load_template(folder, tokenizer.special_map, "empty", opening=tokenizer.opening)


def turns(*contents: str) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))


def test_texts_are_those_of_transformers_and_all_but_the_first_token_is_trained(folder: Path) -> None:
    rows, _ = tokenize_texts(texts_of(*TEXTS), load_tokenizer(folder), cutoff_len=99)
    assert [row.tokens.tolist() for row in rows] == [closed(folder, text) for text in TEXTS]
    assert all(row.loss_mask.tolist() == [False] + [True] * (len(row.tokens) - 1) for row in rows)


def test_packed_texts_each_begin_anew(folder: Path) -> None:
    [row], _ = tokenize_texts(texts_of(*TEXTS), load_tokenizer(folder), cutoff_len=999, packing=True)
    assert [part.tokens.tolist() for part in row.parts] == [closed(folder, text) for text in TEXTS]


def test_a_text_that_begins_with_the_opening_gets_no_second_one(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    [row], _ = tokenize_texts(texts_of(f"{tokenizer.opening}{TEXTS[0]}"), tokenizer, cutoff_len=99)
    assert row.tokens.tolist() == closed(folder, TEXTS[0])


def test_an_empty_text_is_left_out_though_it_has_an_opening(folder: Path) -> None:
    _, report = tokenize_texts(texts_of("", TEXTS[0]), load_tokenizer(folder), cutoff_len=99)
    assert (report.kept, report.without_target) == (1, 1)


def test_the_preview_of_a_text_shows_the_opening_untrained(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    shown = preview_text(texts_of(TEXTS[0])[0], Encoding(tokenizer, None, cutoff_len=99)).value
    assert shown["tokens"] == closed(folder, TEXTS[0])
    assert shown["pieces"] == [
        {"text": tokenizer.opening, "trained": False},
        {"text": f"{TEXTS[0]}</s>", "trained": True},
    ]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_rows_of_the_empty_template_are_those_of_transformers(folder: Path, train_on_prompt: bool) -> None:
    tokenizer = load_tokenizer(folder)
    example = Example(turns(QUESTION, ANSWER), "chat.jsonl:1")
    keys = {"cutoff_len": 99, "train_on_prompt": train_on_prompt}
    [row], report = tokenize(SFT, [example], tokenizer, empty(folder, tokenizer), **keys)
    assert row.tokens.tolist() == closed(folder, QUESTION + ANSWER)
    prompt = len(tokenizer.encode(tokenizer.opened(QUESTION), is_input=True).ids)
    first = 1 if train_on_prompt else prompt
    assert row.loss_mask.tolist() == [False] * first + [True] * (len(row.tokens) - first)
    assert report.boundary_tokens == 0


def test_a_row_of_the_empty_template_that_is_too_long_keeps_the_opening(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    whole = closed(folder, QUESTION + ANSWER)
    example = Example(turns(QUESTION, ANSWER), "chat.jsonl:1")
    [row], _ = tokenize(SFT, [example], tokenizer, empty(folder, tokenizer), cutoff_len=len(whole) - 1)
    assert row.tokens[0] == whole[0] and len(row.tokens) == len(whole) - 1
    assert row.tokens.tolist() == closed(folder, tokenizer.decode(row.tokens))


def test_pairs_and_rated_answers_of_the_empty_template_begin_with_the_opening(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    template = empty(folder, tokenizer)
    messages = turns(QUESTION, ANSWER)
    pair = PairExample(messages[:1], messages[1:], turns(QUESTION, " one")[1:], "pairs.jsonl:1")
    [row], _ = tokenize(DPO, [pair], tokenizer, template, cutoff_len=99)
    assert row.chosen.tokens.tolist() == closed(folder, QUESTION + ANSWER)
    assert row.rejected.tokens.tolist() == closed(folder, f"{QUESTION} one")
    rated = [FeedbackExample(messages, f"rated.jsonl:{i}") for i in (1, 2)]
    rows, _ = tokenize(KTO, rated, tokenizer, template, cutoff_len=99)
    assert rows[0].row.tokens.tolist() == closed(folder, QUESTION + ANSWER)


@pytest.mark.parametrize("text", TEXTS)
def test_a_raw_prompt_and_one_of_the_empty_template_begin_as_in_transformers(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    ids = theirs(folder, text)
    # a prompt is to be continued, so it is not closed
    expected = ids[: len(ids) - len(tokenizer.closing_ids)]
    for template in (None, empty(folder, tokenizer)):
        assert encode_prompt(tokenizer, template, turns(text)) == expected
        assert encode_prompt(tokenizer, template, turns(tokenizer.opening + text)) == expected


def test_chat_without_a_template_continues_the_opened_text(tmp_path: Path) -> None:
    folder = surround(write_tiny_model(tmp_path, eos="</s>"), "<s> $A")
    model = make_model(folder, raw=True)
    assert encode_prompt(model.tokenizer, model.template, turns("hello")) == theirs(folder, "hello")


def test_the_template_that_a_run_keeps_writes_the_opening_for_other_programs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = surround(write_tiny_model(tmp_path, template=None, eos="</s>"), "<s> $A")
    tokenizer = load_tokenizer(folder)
    template = empty(folder, tokenizer)
    (folder / "chat_template.jinja").write_text(template.source)
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(list(turns(QUESTION, ANSWER)))["input_ids"]
    assert ids == closed(folder, QUESTION + ANSWER)
    assert load_template(folder, tokenizer.special_map).is_bare


def test_a_chat_template_gets_no_opening(tmp_path: Path) -> None:
    folder = surround(write_tiny_model(tmp_path, CHATML), "<s> $A")
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer.special_map)
    [row], _ = tokenize(SFT, [Example(turns("one", "two"), "a:1")], tokenizer, template, cutoff_len=99)
    assert row.tokens[0] == tokenizer.encode("<|im_start|>").ids[0]


@pytest.mark.parametrize("start", ["", "<s>"])
def test_borders_in_opened_texts_are_placed_as_the_places_of_all_tokens_say(folder: Path, start: str) -> None:
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.opened(start + text) for text in TEXTS]
    borders = [list(range(len(text) + 1)) for text in texts]
    placed = tokenizer.place_batch(texts, borders, is_input=True)
    for text, found, expected in zip(texts, placed, borders, strict=True):
        encoded = tokenizer.encode(text, is_input=True)
        assert found.ids == encoded.ids and np.all(np.diff(encoded.ends) >= 0) and encoded.ends[-1] == len(text)
        assert found.borders == [encoded.token_after(border) for border in expected]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, None])
def test_without_tokenizer_json_the_settings_say_what_is_around_a_text(
    tmp_path: Path, kind: str, bos: bool | None, eos: bool | None
) -> None:
    written = json.loads((write_tiny_model(tmp_path / "written") / "tokenizer.json").read_text(encoding="utf-8"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(written["model"]["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in written["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    settings = {
        "tokenizer_class": kind,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "added_tokens_decoder": {str(token.pop("id")): token for token in written["added_tokens"]},
        **{f"add_{role}_token": value for role, value in {"bos": bos, "eos": eos}.items() if value is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    rows, _ = tokenize_texts(texts_of(*TEXTS), load_tokenizer(folder), cutoff_len=99)
    assert [row.tokens.tolist() for row in rows] == [closed(folder, text) for text in TEXTS]
