"""Pre-training on texts: every token is read once and trained, in rows that are full, and nothing is lost."""

from __future__ import annotations

import json
import logging
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_rows import encode, take, tokenize_texts
from support.rows import WORDS, write_texts
from support.tiny_tokenizer import write_tiny_model
from support.toy_backend import ENGINES, curve, toy_settings

from macft.data.batches import collate, row_length
from macft.data.formats.texts import PlainText
from macft.data.kinds import PT
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.packing import PackedRows
from macft.data.tokenization.row_preview import preview_text
from macft.data.tokenization.texts import end_tokens
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError, ModelError
from macft.training.prepare import prepare
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")


def texts_of(*contents: str) -> list[PlainText]:
    return [PlainText(content, f"texts.jsonl:{i}") for i, content in enumerate(contents, 1)]


def stream(texts: list[PlainText], tokenizer: Tokenizer) -> list[int]:
    """All tokens of all texts, the end token after each, one text at a time."""
    return [id_ for text in texts if text.text for id_ in [*tokenizer.encode(text.text).ids, *end_tokens(tokenizer)]]


some_texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map("".join), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(contents=some_texts, cutoff_len=st.integers(2, 50))
def test_packed_rows_hold_all_tokens_in_order_and_are_full_but_the_last(contents, cutoff_len, tokenizer):
    texts = texts_of(*contents)
    rows, report = tokenize_texts(texts, tokenizer, cutoff_len=cutoff_len, packing=True)
    assert isinstance(rows, PackedRows)
    expected = stream(texts, tokenizer)
    found = [id_ for row in rows for part in row.parts for id_ in part.tokens.tolist()]
    if cutoff_len > 2:
        # a last row of one token has nothing to learn from
        assert found == expected[: len(expected) - (len(expected) % cutoff_len == 1)]
        assert all(length == cutoff_len for length in rows.lengths[:-1])
    assert report.tokens == len(expected) and report.last_row == len(expected) % cutoff_len
    assert report.trained_tokens == len(expected) - report.pieces
    assert collate(list(rows)).loss_mask.sum() == sum(row_length(row) - len(row.parts) for row in rows)


@settings(max_examples=60, deadline=None)
@given(contents=some_texts, cutoff_len=st.integers(2, 50))
def test_unpacked_texts_begin_rows_of_their_own_and_lose_nothing(contents, cutoff_len, tokenizer):
    texts = texts_of(*contents)
    pieces, report = tokenize_texts(texts, tokenizer, cutoff_len=cutoff_len, packing=False)
    expected, divided = [], 0
    for text in texts:
        ids = stream([text], tokenizer)
        parts = [ids[i : i + cutoff_len] for i in range(0, len(ids), cutoff_len)]
        expected += [part for part in parts if len(part) > 1]
        divided += len([part for part in parts if len(part) > 1]) > 1
    assert [piece.tokens.tolist() for piece in pieces] == expected
    assert all(piece.loss_mask.tolist() == [False] + [True] * (row_length(piece) - 1) for piece in pieces)
    assert (report.divided, report.pieces, report.last_row) == (divided, len(expected), 0)


def test_rows_are_cut_by_hand(tokenizer):
    texts = texts_of("the quick brown fox", "the", "the quick")
    lengths = [len(stream([text], tokenizer)) for text in texts]
    assert len(tokenizer.encode("the").ids) == 1
    rows, report = tokenize_texts(texts, tokenizer, cutoff_len=4, packing=True)
    cuts = sorted({0, *accumulate(lengths), *range(0, sum(lengths), 4)})
    assert report.pieces == len(cuts) - 1
    assert [row_length(row) for row in rows] == [4] * (sum(lengths) // 4) + [sum(lengths) % 4] * (sum(lengths) % 4 > 1)
    assert report.examples == report.kept == 3
    assert rows[0].parts[0].tokens.tolist() == stream(texts, tokenizer)[:4]
    # the end token is a target unless it begins a row, and what follows it begins a segment of its own
    batch = collate(list(rows))
    ends = batch.tokens[:, 1:] == end_tokens(tokenizer)[0]
    assert ends.sum() > 1 and batch.loss_mask[:, 1:][ends].all()
    assert (np.diff(batch.segment_ids, axis=1)[:, 1:][ends[:, :-1]] != 0).all()


def test_a_part_of_the_texts_makes_the_rows_of_only_those(tokenizer):
    texts = texts_of("the quick", "one two three", "", "lazy dog")
    rows, _ = tokenize_texts([texts[0], texts[3]], tokenizer, cutoff_len=5, packing=True)
    table = encode(PT, texts, tokenizer, cutoff_len=5)
    some, report = take(PT, table, tokenizer, cutoff_len=5, packing=True, indices=np.array([0, 2, 3]))
    assert [[part.tokens.tolist() for part in row.parts] for row in some] == [
        [part.tokens.tolist() for part in row.parts] for row in rows
    ]
    assert (report.examples, report.kept, report.without_target) == (3, 2, 1)


def test_empty_texts_are_left_out_and_named(tokenizer):
    _, report = tokenize_texts(texts_of("the", "", "<|im_end|> fox"), tokenizer, cutoff_len=9, packing=True)
    assert (report.kept, report.without_target, report.special_in_content) == (2, 1, 1)
    assert "1 of 3 texts are empty and are left out (first: texts.jsonl:2)" in "\n".join(report.warnings)
    assert "1 of 3 texts hold special tokens in their text, which stay special (first: <|im_end|> in" in "\n".join(
        report.warnings
    )
    with pytest.raises(DataError, match="none of the 2 texts has a token to train on"):
        tokenize_texts(texts_of("", ""), tokenizer, cutoff_len=9, packing=True)


def test_a_tokenizer_without_an_end_token_is_an_error(tmp_path):
    folder = write_tiny_model(tmp_path / "bare")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer has no eos_token"):
        tokenize_texts(texts_of("the"), load_tokenizer(folder), cutoff_len=9, packing=True)


def test_a_preview_shows_the_text_and_the_end_token_as_trained(tokenizer):
    shown = preview_text(texts_of("the quick fox")[0], Encoding(tokenizer, None, 4)).value
    assert "".join(piece["text"] for piece in shown["pieces"]) == "the quick fox<|im_end|>"
    assert [piece["trained"] for piece in shown["pieces"]] == [False, True]
    assert shown["num_tokens"] == len(shown["tokens"]) == shown["num_trained"] + 1
    assert shown["rows"] == -(-shown["num_tokens"] // 4)


# A run


RUN_PT = {"stage": "pt", "cutoff_len": 40, "learning_rate": 1e-3}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_reads_every_token_once_an_epoch_in_full_rows(engine, model, tmp_path, caplog):
    settings = toy_settings(model, write_texts(tmp_path / "t.jsonl"), tmp_path / "run", engine, **RUN_PT, val_size=2)
    with caplog.at_level(logging.INFO, logger="macft"):
        train(settings)
    prepared = prepare(settings)
    assert len(prepared.plan.lengths) == -(-prepared.report.tokens // 40)
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["total_tokens"] == 2 * prepared.plan.lengths.sum()
    losses = [loss for _, loss, _, _ in curve(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert "data: 10 texts" in caplog.text and "rows of up to 40 tokens" in caplog.text


@pytest.mark.mlx
@pytest.mark.torch
def test_both_engines_give_one_curve(model, tmp_path):
    data = write_texts(tmp_path / "t.jsonl")
    curves = []
    for engine in ("mlx", "torch"):
        train(toy_settings(model, data, tmp_path / engine, engine, **RUN_PT))
        curves.append(np.array(curve(tmp_path / engine)))
    np.testing.assert_allclose(curves[0][:, 1], curves[1][:, 1], rtol=1e-5)


def test_a_base_model_needs_no_chat_template(model, tmp_path):
    import shutil

    bare = shutil.copytree(model, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    data = write_texts(tmp_path / "t.jsonl")
    train(toy_settings(bare, data, tmp_path / "run", "torch", **RUN_PT, max_steps=1))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
