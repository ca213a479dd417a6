"""Rated answers as tokens: only the last answer is a target, and each prompt is matched with another answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.data_rows import tokenize_feedback
from support.tiny_tokenizer import write_tiny_model

from macft.data.batches import collate, lengths_of, row_length
from macft.data.formats.feedback import FeedbackExample
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.feedback import in_blocks, partners
from macft.data.tokenization.table import TokenizedExample, fingerprints, mismatched
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError


@pytest.mark.parametrize(
    ("count", "block", "expected"),
    [
        (4, 4, [3, 0, 1, 2]),
        (6, 3, [2, 0, 1, 5, 3, 4]),
        (5, 3, [2, 0, 1, 4, 3]),
        (4, 3, [3, 0, 1, 2]),  # a row left over joins the block before it
        (7, 3, [2, 0, 1, 6, 3, 4, 5]),
        (4, 1, [1, 0, 3, 2]),
        (5, 1, [1, 0, 4, 2, 3]),
        (2, 8, [1, 0]),
        (3, 8, [2, 0, 1]),
    ],
)
def test_the_answer_is_that_of_the_row_before_in_the_block(count, block, expected):
    assert partners(count, block).tolist() == expected


def row(prompt: list[int], answer: list[int]) -> TokenizedExample:
    tokens = np.array(prompt + answer, dtype=np.int32)
    return TokenizedExample(tokens, np.arange(len(tokens)) >= len(prompt))


def test_a_mismatched_row_is_the_prompt_with_the_other_answer_up_to_the_cutoff():
    found = mismatched(row([1, 2, 3], [4]), row([5], [6, 7, 8]), 99)
    assert found.tokens.tolist() == [1, 2, 3, 6, 7, 8] and found.loss_mask.tolist() == [False] * 3 + [True] * 3
    assert found.tokens.dtype == np.int32
    assert mismatched(row([1, 2, 3], [4]), row([5], [6, 7, 8]), 5).tokens.tolist() == [1, 2, 3, 6, 7]


def example(prompt: str, answer: str, is_desirable: bool, line: int, *before: str) -> FeedbackExample:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate((*before, prompt, answer))]
    return FeedbackExample(tuple(turns), f"k.jsonl:{line}", None, is_desirable)


ROWS = [
    example("the quick brown fox", "hello", True, 1),
    example("one two", "Paris Paris Paris", False, 2, "hello", "Paris"),
    example("three", "four four", True, 3),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_template(folder, tokenizer.special_map)


def test_only_the_last_answer_is_a_target_and_the_rating_is_kept(parts):
    tokenizer, template = parts
    rows, report = tokenize_feedback(ROWS, tokenizer, template, cutoff_len=99)
    assert [one.is_desirable for one in rows] == rows.is_desirable.tolist() == [True, False, True]
    for example_, one in zip(ROWS, rows, strict=True):
        answer = tokenizer.decode(one.row.tokens[one.row.loss_mask].tolist(), skip_special=False)
        assert answer == f"{example_.messages[-1]['content']}<|im_end|>\n"
        text = tokenizer.decode(one.row.tokens.tolist(), skip_special=False)
        assert text == template.render(example_.messages)
        assert one.reference is None
    others = [tokenizer.decode(one.mismatched.tokens[one.mismatched.loss_mask].tolist()).strip() for one in rows]
    assert others == ["four four", "hello", "Paris Paris Paris"]
    assert report.kept == 3
    assert lengths_of(rows).tolist() == [row_length(one) for one in rows]
    assert fingerprints(rows).tolist() == fingerprints(list(rows)).tolist()


def test_blocks_slices_and_references_go_with_the_rows(parts):
    tokenizer, template = parts
    rows, _ = tokenize_feedback([*ROWS, *ROWS[:2]], tokenizer, template, cutoff_len=99)
    rows = replace(in_blocks(rows, 2), references=np.array([[-1.0, -2.0]] * 4 + [[np.nan, np.nan]]))
    assert rows.partners.tolist() == [1, 0, 4, 2, 3]
    assert [one.reference is None for one in rows] == [False] * 4 + [True]
    assert rows[1:3][0].mismatched.tokens.tolist() == rows[1].mismatched.tokens.tolist()
    taken = rows.take(np.array([4, 0]))
    assert taken.partners.tolist() == [3, 1] and taken[0].reference is None


def test_a_batch_holds_the_rows_and_then_the_mismatched_ones(parts):
    tokenizer, template = parts
    rows, _ = tokenize_feedback(ROWS, tokenizer, template, cutoff_len=99)
    batch = collate(list(replace(rows, references=np.array([[-1.0, -4.0], [-2.0, -5.0], [-3.0, -6.0]]))))
    expected = [*(one.row for one in rows), *(one.mismatched for one in rows)]
    for tokens, mask, length, one in zip(batch.tokens, batch.loss_mask, batch.lengths, expected, strict=True):
        assert tokens[:length].tolist() == one.tokens.tolist() and not tokens[length:].any()
        assert mask[:length].tolist() == one.loss_mask.tolist() and not mask[length:].any()
    assert batch.desirable.tolist() == [True, False, True]
    assert batch.reference_logps.tolist() == [-1, -2, -3, -4, -5, -6]


def test_a_row_too_long_loses_user_text_and_its_mismatched_answer_its_end(parts):
    tokenizer, template = parts
    whole, _ = tokenize_feedback(ROWS, tokenizer, template, cutoff_len=99)
    cutoff_len = len(whole[0].row.tokens) - 2
    rows, report = tokenize_feedback(ROWS[:1] + ROWS[2:], tokenizer, template, cutoff_len=cutoff_len)
    assert report.shortened >= 1
    assert all(len(one.row.tokens) <= cutoff_len and len(one.mismatched.tokens) <= cutoff_len for one in rows)
    assert all(one.mismatched.loss_mask.any() for one in rows)
    assert rows.lengths.tolist() == [row_length(one) for one in rows]


def test_a_single_row_is_refused(parts):
    tokenizer, template = parts
    with pytest.raises(DataError, match="a single rated answer cannot be trained on: the KL term of KTO compares it"):
        tokenize_feedback(ROWS[:1], tokenizer, template, cutoff_len=99)
