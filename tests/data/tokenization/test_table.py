"""Rows of a table behave like a list, and are made when they are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.chat_templates import build
from support.data_rows import encode, read_examples, read_pairs, take, tokenize_pairs
from support.tiny_tokenizer import TEMPLATES, write_tiny_model
from support.toy_backend import write_pairs, write_rows

from macft.data.kinds import DPO, SFT
from macft.data.tokenization.table import Examples, Pairs, fingerprints
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer

CHATML = build(TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model"), eos="</s>"))


def test_rows_are_a_list_that_is_read_as_it_is_asked(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", 12)
    table = encode(SFT, read_examples(str(path), ".", None), tokenizer, CHATML, cutoff_len=40)
    rows, _ = take(SFT, table, tokenizer, CHATML, cutoff_len=40, indices=np.array([7, 3, 9]))
    assert isinstance(rows, Examples) and len(rows) == 3 and rows
    whole = [table.row(i) for i in range(12)]
    for found, expected in zip(rows, (whole[7], whole[3], whole[9]), strict=True):
        assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.loss_mask, expected.loss_mask)
    assert np.array_equal(rows[-1].tokens, whole[9].tokens) and len(rows[1:]) == 2
    assert np.array_equal(rows[1:][0].tokens, whole[3].tokens)
    assert rows.lengths.tolist() == [len(row.tokens) for row in rows]
    assert fingerprints(rows).tolist() == fingerprints(list(rows)).tolist()
    with pytest.raises(IndexError):
        rows[3]


def test_pairs_carry_the_references_they_are_given(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 6)
    pairs, _ = tokenize_pairs(read_pairs(str(path), ".", None), tokenizer, CHATML, cutoff_len=99)
    assert isinstance(pairs, Pairs) and all(pair.reference is None for pair in pairs)
    columns = np.arange(18.0).reshape(6, 3)
    columns[2] = np.nan
    given = replace(pairs, references=columns)
    assert [pair.reference is None for pair in given] == [False, False, True, False, False, False]
    reference = given[1:][0].reference
    assert reference is not None
    assert (reference.chosen_logp, reference.rejected_logp, reference.log_perplexity) == (3.0, 4.0, 5.0)
    assert given.lengths.tolist() == [max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in pairs]
    assert given.prompt_lengths.tolist() == [pair.prompt_length for pair in pairs]
    assert fingerprints(pairs).tolist() == fingerprints(list(pairs)).tolist()
    kept, _ = take(DPO, pairs.table, tokenizer, CHATML, cutoff_len=99, indices=np.array([4]))
    assert np.array_equal(kept[0].rejected.tokens, pairs[4].rejected.tokens)
