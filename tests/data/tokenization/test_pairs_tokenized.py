"""Pairs share their prompt, token by token: by hand, against TRL, and as properties of random pairs."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import build, chat
from support.data_rows import fit_pairs, read_pairs, tokenize_pairs
from support.paths import CHECKOUT
from support.tiny_tokenizer import QWEN3, TEMPLATES, write_tiny_model

from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import ChatTemplate, Message, load_template
from macft.data.tokenization.pairs import PairReport
from macft.data.tokenization.table import TokenizedPair
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError, MacftError
from macft.models.locate import resolve_model

CHATML_TEMPLATE = build(TEMPLATES["chatml"])
EMPTY = load_template(Path(), {"eos_token": "</s>"}, "empty")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model"), eos="</s>"))


def answer(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},)


def pair(*prompt: str, chosen: str, rejected: str, system: str | None = None, source: str = "p.jsonl:1") -> PairExample:
    return PairExample(tuple(chat(*prompt, system=system)), answer(chosen), answer(rejected), source)


def one(
    tokenizer: Tokenizer, example: PairExample, template: ChatTemplate = CHATML_TEMPLATE, cutoff_len: int = 4096
) -> tuple[TokenizedPair, PairReport]:
    [tokenized], report = tokenize_pairs([example], tokenizer, template, cutoff_len=cutoff_len)
    return tokenized, report


def texts(tokenizer: Tokenizer, tokenized: TokenizedPair) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) as the tokens say."""
    n = tokenized.prompt_length
    parts = (tokenized.chosen.tokens[:n], tokenized.chosen.tokens[n:], tokenized.rejected.tokens[n:])
    prompt, chosen, rejected = (tokenizer.decode(part, skip_special=False) for part in parts)
    return prompt, chosen, rejected


def check(tokenized: TokenizedPair) -> None:
    """What every pair promises."""
    n = tokenized.prompt_length
    assert n >= 1 and tokenized.chosen.tokens[:n].tolist() == tokenized.rejected.tokens[:n].tolist()
    for row in (tokenized.chosen, tokenized.rejected):
        assert row.tokens.dtype == np.int32 and row.loss_mask.dtype == bool
        assert row.loss_mask.tolist() == [False] * n + [True] * (len(row.tokens) - n) and row.loss_mask.any()


# --- by hand


def test_the_pair_by_hand(tokenizer: Tokenizer) -> None:
    tokenized, report = one(tokenizer, pair("a", chosen="bc", rejected="d"))
    check(tokenized)
    pieces = [tokenizer.decode([id_], skip_special=False) for id_ in tokenized.chosen.tokens]
    assert pieces == [
        *["<|im_start|>", "user", "\n", "a", "<|im_end|>", "\n"],
        *["<|im_start|>", "assistant", "\n", "b", "c", "<|im_end|>", "\n"],
    ]
    assert tokenized.prompt_length == 9 and tokenized.reference is None
    assert texts(tokenizer, tokenized)[2] == "d<|im_end|>\n"
    assert report == PairReport(examples=1, kept=1, tokens=13 + 12, trained_tokens=4 + 3)


def test_earlier_answers_belong_to_the_prompt(tokenizer: Tokenizer) -> None:
    tokenized, _ = one(tokenizer, pair("a", "b", "c", chosen="d", rejected="e", system="s"))
    prompt = CHATML_TEMPLATE.render(chat("a", "b", "c", system="s"), add_generation_prompt=True)
    assert texts(tokenizer, tokenized) == (prompt, "d<|im_end|>\n", "e<|im_end|>\n")


def test_answers_of_several_turns_are_trained_from_the_first_on(tokenizer: Tokenizer) -> None:
    sides = [tuple(chat("a", "b", "c", last)[1:]) for last in ("d", "e")]
    tokenized, _ = one(tokenizer, PairExample(tuple(chat("a")), *sides, source="p.jsonl:1"))
    check(tokenized)
    expected = [CHATML_TEMPLATE.render(chat("a", "b", "c", last)).split("assistant\n", 1)[1] for last in ("d", "e")]
    assert list(texts(tokenizer, tokenized)[1:]) == expected


def test_both_rows_start_where_the_earlier_one_does(tokenizer: Tokenizer) -> None:
    # the break of the header and those of the rejected answer are one token; the chosen row has one break alone
    tokenized, report = one(tokenizer, pair("a", chosen="b", rejected="\n\nb"))
    check(tokenized)
    assert texts(tokenizer, tokenized)[1:] == ("\nb<|im_end|>\n", "\n\n\nb<|im_end|>\n")
    assert report.boundary_tokens == 1


def test_both_rows_share_a_straddling_token_as_the_start(tokenizer: Tokenizer) -> None:
    tokenized, report = one(tokenizer, pair("a", chosen="\n\nb", rejected="\n\nc"))
    check(tokenized)
    assert texts(tokenizer, tokenized)[1] == "\n\n\nb<|im_end|>\n" and report.boundary_tokens == 2


def test_a_template_that_writes_thinking_keeps_one_prompt(tokenizer: Tokenizer) -> None:
    prompt = build(QWEN3).render(chat("a", "b", "c"), add_generation_prompt=True)
    for one_thought, other in (("", ""), ("x", "y")):
        chosen, rejected = (f"<think>\n{t}\n</think>\n\n{t}d" for t in (one_thought, other))
        tokenized, _ = one(tokenizer, pair("a", "b", "c", chosen=chosen, rejected=rejected), build(QWEN3))
        check(tokenized)
        assert texts(tokenizer, tokenized) == (prompt, f"{chosen}<|im_end|>\n", f"{rejected}<|im_end|>\n")


def test_the_prompt_ends_where_the_rows_part(tokenizer: Tokenizer) -> None:
    # both answers begin in token 2, but token 1 of one row is " dog", of the other " do"
    rows = [tokenizer.encode(text + "</s>").ids for text in ("one dog.", "one dogh")]
    assert rows[0][0] == rows[1][0] and rows[0][1] != rows[1][1]
    assert [tokenizer.decode(row[:2]) for row in rows] == ["one dog", "one do"]
    tokenized, _ = one(tokenizer, pair("one dog", chosen=".", rejected="h"), EMPTY)
    check(tokenized)
    assert texts(tokenizer, tokenized) == ("one", " dog.</s>", " dogh</s>")


def test_the_empty_template_joins_the_texts_and_ends_the_answers(tokenizer: Tokenizer) -> None:
    tokenized, _ = one(tokenizer, pair("one two", chosen=" three", rejected=" four</s>"), EMPTY)
    check(tokenized)
    assert texts(tokenizer, tokenized) == ("one two", " three</s>", " four</s>")


# --- what is left out, refused or said


def test_many_pairs_come_in_order_each_as_if_alone(tokenizer: Tokenizer) -> None:
    # more than are encoded at once
    many = [pair("q", chosen=f"good {i}", rejected=f"bad {i}") for i in range(1100)]
    kept, report = tokenize_pairs(many, tokenizer, CHATML_TEMPLATE, cutoff_len=99)
    expected = [(f"good {i}<|im_end|>\n", f"bad {i}<|im_end|>\n") for i in range(1100)]
    assert [texts(tokenizer, tokenized)[1:] for tokenized in kept] == expected
    assert report.tokens == sum(len(t.chosen.tokens) + len(t.rejected.tokens) for t in kept)
    assert report.trained_tokens == sum(int(t.chosen.loss_mask.sum() + t.rejected.loss_mask.sum()) for t in kept)


def test_identical_answers_are_kept_counted_and_said_once(tokenizer: Tokenizer) -> None:
    same = pair("q", chosen="a", rejected="a", source="p.jsonl:2")
    kept, report = tokenize_pairs(
        [pair("q", chosen="a", rejected="b"), same, same], tokenizer, CHATML_TEMPLATE, cutoff_len=99
    )
    for tokenized in kept:
        check(tokenized)
    assert (report.kept, report.identical) == (3, 2)
    assert list(report.warnings) == [
        "2 of 3 pairs have the same tokens on both sides, so they show no preference (first: p.jsonl:2)"
    ]


def test_special_tokens_in_any_text_are_said(tokenizer: Tokenizer) -> None:
    given = [pair("q", chosen="a", rejected="b"), pair("q", chosen="a", rejected="<s>")]
    _, report = tokenize_pairs(given, tokenizer, CHATML_TEMPLATE, cutoff_len=99)
    assert report.special_in_content == 1 and "(first: <s> in p.jsonl:1)" in report.warnings[0]


def test_a_refused_prompt_is_named_with_the_templates_words(tokenizer: Tokenizer) -> None:
    bad = pair("q", chosen="a", rejected="b", system="s", source="p.jsonl:4")
    with pytest.raises(DataError, match=r"^p.jsonl:4 and 1 more: the chat template .*System role not supported$"):
        tokenize_pairs([bad, bad], tokenizer, build(TEMPLATES["gemma"]), cutoff_len=99)


def test_a_prompt_without_a_token_of_its_own_is_refused(tokenizer: Tokenizer) -> None:
    # "quick" is one token where "qu" comes before "ick", so no token is the prompt's
    assert len(tokenizer.encode(" quick").ids) == 1
    with pytest.raises(DataError) as error:
        one(tokenizer, pair(" qu", chosen="ick", rejected=" two", source="p.jsonl:9"), EMPTY)
    assert str(error.value) == (
        "p.jsonl:9: the prompt has no token of its own with the template empty; give a longer prompt or a chat template"
    )


# --- cutoff_len


def test_one_cut_of_the_prompt_serves_both_rows(tokenizer: Tokenizer) -> None:
    example = pair("one two three four", "b", "the six", chosen="five", rejected="five six seven", system="sys")
    full, _ = one(tokenizer, example)
    tokenized, report = one(tokenizer, example, cutoff_len=len(full.rejected.tokens) - 2)
    check(tokenized)
    cut = chat(" three four", "b", "the six", system="sys")
    assert texts(tokenizer, tokenized) == (
        CHATML_TEMPLATE.render(cut, add_generation_prompt=True),
        *("five<|im_end|>\n", "five six seven<|im_end|>\n"),
    )
    assert len(tokenized.rejected.tokens) == len(full.rejected.tokens) - 2
    assert (report.shortened, report.answer_cut, report.without_target) == (1, 0, 0)
    assert list(report.warnings) == [
        f"1 of 1 pairs lost user text to fit cutoff_len {len(tokenized.rejected.tokens)} (first: {example.source})"
    ]


def test_only_a_longer_answer_loses_its_end(tokenizer: Tokenizer) -> None:
    example = pair("one two", chosen="five", rejected="five six seven eight")
    emptied, _ = one(tokenizer, pair("", chosen="five", rejected="five six seven eight"))
    cutoff = len(emptied.chosen.tokens)
    tokenized, report = one(tokenizer, example, cutoff_len=cutoff)
    check(tokenized)
    assert tokenized.chosen.tokens.tolist() == emptied.chosen.tokens.tolist()
    assert tokenized.rejected.tokens.tolist() == emptied.rejected.tokens[:cutoff].tolist()
    assert (report.kept, report.shortened, report.emptied, report.answer_cut) == (1, 1, 1, 1)
    first = f"(first: {example.source})"
    assert list(report.warnings) == [
        f"1 of 1 pairs lost user text to fit cutoff_len {cutoff}, 1 of them all of it {first}",
        f"1 of 1 pairs lost the end of an answer to fit cutoff_len {cutoff} {first}",
    ]


def test_a_pair_that_loses_an_answer_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    lost = pair("q", chosen="a", rejected="b", system="one two three four five six seven eight")
    kept, report = tokenize_pairs(
        [lost, pair("q", chosen="a", rejected="b")], tokenizer, CHATML_TEMPLATE, cutoff_len=12
    )
    assert len(kept) == 1 and report == PairReport(
        examples=2, kept=1, without_target=1, tokens=2 * 12, trained_tokens=2 * 3
    )
    assert list(report.warnings) == [
        f"1 of 2 pairs are left out: cutoff_len 12 leaves no answer on one side (first: {lost.source})"
    ]
    with pytest.raises(DataError, match="none of the 1 pair can be trained on: cutoff_len 12 leaves 1 without an ans"):
        tokenize_pairs([lost], tokenizer, CHATML_TEMPLATE, cutoff_len=12)


def test_a_pair_that_loses_its_whole_prompt_is_dropped(tokenizer: Tokenizer) -> None:
    given = [
        pair("one two", chosen=" three four five six", rejected=" six"),
        pair("one", chosen=" two", rejected=" six"),
    ]
    kept, report = tokenize_pairs(given, tokenizer, EMPTY, cutoff_len=4)
    assert (len(kept), report.without_target) == (1, 1)


# --- properties of random pairs

WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30).filter(
    lambda text: not any(mark in text for mark in ("<", ">"))
)


CUTOFFS = st.integers(2, 120)


@settings(max_examples=150, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS, raw=st.booleans())
def test_the_prompt_is_shared_and_all_else_is_trained(
    tokenizer: Tokenizer, prompt: str, chosen: str, rejected: str, raw: bool
) -> None:
    template = EMPTY if raw else CHATML_TEMPLATE
    example = pair(prompt + "?", chosen=chosen, rejected=rejected)
    [fitted] = fit_pairs([example], tokenizer, template, cutoff_len=9999)
    if fitted.prompt_length == 0:
        assert raw
        return
    tokenized, report = one(tokenizer, example, template, cutoff_len=9999)
    check(tokenized)
    for row, side in ((tokenized.chosen, example.chosen), (tokenized.rejected, example.rejected)):
        assert row.tokens.tolist() == tokenizer.encode(template.render([*example.prompt, *side])).ids
    assert report.shortened == report.answer_cut == report.without_target == 0


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(WORDS, min_size=1, max_size=5), chosen=WORDS, rejected=WORDS, cutoff=CUTOFFS)
def test_shortening_takes_the_same_user_text_from_both_rows(
    tokenizer: Tokenizer, turns: list[str], chosen: str, rejected: str, cutoff: int
) -> None:
    turns = turns if len(turns) % 2 else turns[1:]
    example = pair(*turns, chosen=chosen, rejected=rejected)
    [fitted] = fit_pairs([example], tokenizer, CHATML_TEMPLATE, cutoff_len=cutoff)
    assert max(len(fitted.chosen.encoded.ids), len(fitted.rejected.encoded.ids)) <= cutoff
    left = []
    for row, side in ((fitted.chosen, chosen), (fitted.rejected, rejected)):
        # headers and answers stand as they were; user texts are ends of what they were
        pattern = "".join(
            re.escape(f"<|im_start|>{m['role']}\n")
            + ("(.*)" if m["role"] == "user" else re.escape(m["content"]))
            + re.escape("<|im_end|>\n")
            for m in chat(*turns, side)
        )
        found = re.fullmatch(pattern, row.rendered.text, re.DOTALL)
        assert found
        left.append(found.groups())
    assert left[0] == left[1]
    assert all(question.endswith(rest) for question, rest in zip(turns[::2], left[0], strict=True))
    if fitted.answer_cut:
        assert set(left[0]) == {""}
    if fitted.skip_reason is None:
        check(one(tokenizer, example, cutoff_len=cutoff)[0])


# --- against TRL


@cache
def smollm2() -> Path:
    try:
        return resolve_model("smollm2-135m").path
    except MacftError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["smollm2", "qwen"])
def folder(request: pytest.FixtureRequest, qwen: Path) -> Path:
    """Tokenizers of two kinds."""
    return smollm2() if request.param == "smollm2" else qwen


def trl_rows(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids as TRL's DPOTrainer prepares them; no model is needed for that."""
    reason = "TRL is not installed"
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason=reason).DPOTrainer
    datasets = pytest.importorskip("datasets", reason=reason)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    data = datasets.Dataset.from_list(rows)
    prepared = trainer._prepare_dataset(SimpleNamespace(_tokenizer=theirs), data, theirs, arguments, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared]


def our_rows(
    folder: Path, pairs: list[PairExample], template: str | None = None
) -> list[tuple[list[int], list[int], list[int]]]:
    ours = load_tokenizer(folder)
    kept, _ = tokenize_pairs(pairs, ours, load_template(folder, ours.special_map, template), cutoff_len=100_000)
    for tokenized in kept:
        check(tokenized)
    rows = [(t.prompt_length, t.chosen.tokens.tolist(), t.rejected.tokens.tolist()) for t in kept]
    return [(chosen[:n], chosen[n:], rejected[n:]) for n, chosen, rejected in rows]


def test_ranking_rows_are_the_tokens_that_trl_trains_on(folder: Path, data_folder: Path) -> None:
    rows = json.loads((data_folder / "dpo_zh_demo.json").read_text(encoding="utf-8"))[:60]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def messages(*turns: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]

    given = [
        {
            "prompt": messages(*row["conversations"]),
            "chosen": messages(row["chosen"]),
            "rejected": messages(row["rejected"]),
        }
        for row in rows
    ]
    assert our_rows(folder, read_pairs("dpo_zh_demo", str(data_folder), 60)) == trl_rows(folder, given)


def test_text_pairs_with_the_empty_template_are_the_tokens_that_trl_trains_on(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    end = ours.special_map["eos_token"]
    rows = [
        {"prompt": "The sea is", "chosen": " blue.", "rejected": " bl"},
        {"prompt": "Q: 2+2?\nA:", "chosen": " 4" + end, "rejected": "\n\nfour"},
        {"prompt": "中国的首都是", "chosen": "北京。", "rejected": "上海。"},
        {"prompt": "quick br", "chosen": "own", "rejected": "ead"},
        {"prompt": "line\n", "chosen": "\n  next", "rejected": "next"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs("rows", str(tmp_path), None)
    assert our_rows(folder, pairs, "empty") == trl_rows(folder, rows)


# --- the shipped pairs


def test_the_shipped_pairs_are_short_and_their_sides_alike_in_length() -> None:
    ours = load_tokenizer(smollm2())
    pairs = read_pairs("quickstart_pairs", str(CHECKOUT / "data"), None)
    kept, report = tokenize_pairs(pairs, ours, load_template(smollm2(), ours.special_map), cutoff_len=160)
    assert (report.kept, report.shortened, report.answer_cut, report.identical) == (len(pairs), 0, 0, 0)
    chosen, rejected = (
        sum(len(row.tokens) for row in side) for side in zip(*((t.chosen, t.rejected) for t in kept), strict=True)
    )
    assert abs(chosen - rejected) < 0.02 * chosen
