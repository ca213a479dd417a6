"""Rows that hold several examples: as full as possible, and every number is that of one example per row."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import load_model, train_step
from support.step_numbers import GRADIENT, LORA, Numbers, Squares, assert_same, load
from support.tiny_models import WINDOW, random_examples
from support.toy_backend import ENGINES, curve, toy_settings, write_rows

from macft.backends.base import Model, ModelSpec
from macft.backends.batch_layout import lay_out, pad_batch, quarter_octaves, rope_problem, split_by_tokens
from macft.data.batches import TrainingRow, collate, row_length, unpack
from macft.data.tokenization.packing import PackedExample, PackedRows, best_fit, chain, pack
from macft.data.tokenization.table import TokenizedExample
from macft.errors import UsageError
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Sft
from macft.training.prepare import prepare
from macft.training.run import train as train_run

pytestmark = pytest.mark.usefixtures("small_threads")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
EXAMPLES = random_examples(9, seed=3, shortest=6, longest=40)
ROWS = (PackedExample(tuple(EXAMPLES[:4])), PackedExample(tuple(EXAMPLES[4:6])), PackedExample(tuple(EXAMPLES[6:])))


def lengths_of(examples: list[TokenizedExample]) -> np.ndarray:
    return np.array([row_length(example) for example in examples])


# Which examples share a row


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200), extra=st.integers(0, 60))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths, extra):
    lengths, capacity = np.array(lengths), max(lengths) + extra
    rows = best_fit(lengths, capacity)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert max(int(lengths[row].sum()) for row in rows) <= capacity
    least = -(-int(lengths.sum()) // capacity)
    # no two of these fit into one row
    large = int((2 * lengths > capacity).sum())
    assert max(least, large) <= len(rows) <= len(lengths)
    # no two rows would fit into one
    sums = sorted(int(lengths[row].sum()) for row in rows)
    assert len(sums) == 1 or sums[0] + sums[1] > capacity


def test_the_fullest_row_that_has_room_takes_the_next_example():
    # 6 and 5 begin rows (4 and 5 left); 4 goes to the fuller one, then 3 and 2 fill the other
    assert [row.tolist() for row in best_fit(np.array([2, 3, 4, 5, 6]), 10)] == [[4, 2], [3, 1, 0]]


def test_rows_are_made_when_they_are_asked_for():
    rows = pack(EXAMPLES, lengths_of(EXAMPLES), 64)
    assert rows.lengths.tolist() == [row_length(row) for row in rows]
    assert rows.lengths.sum() == lengths_of(EXAMPLES).sum() and len(rows) < len(EXAMPLES)
    assert [part for i in rows.members[0] for part in EXAMPLES[i].tokens] == collate([rows[0]]).tokens[0].tolist()
    assert [row_length(row) for row in rows[1:]] == rows.lengths[1:].tolist()


def test_a_hundred_thousand_examples_are_packed_in_no_time():
    lengths = np.random.default_rng(0).integers(20, 300, 100_000)
    start = time.process_time()
    rows = best_fit(lengths, 2048)
    assert time.process_time() - start < 2  # 0.13 s measured; 1.1 s for a million
    assert lengths.sum() / (len(rows) * 2048) > 0.999


def test_neighbors_are_chained_until_a_row_is_full():
    pieces = random_examples(5, shortest=6, longest=6)
    lengths = np.array([6, 4, 2, 10, 1])
    pieces = [TokenizedExample(p.tokens[:1].repeat(n), np.arange(n) > 0) for p, n in zip(pieces, lengths, strict=True)]
    rows = chain(pieces, lengths, 10)
    # 6 + 4 fill a row, 2 + 8 would: but the 10 was not cut there, so this is not what tokenize_texts gives
    assert rows.members[0].tolist() == [0, 1]
    assert rows.lengths.sum() == 23


def test_the_first_token_of_an_example_is_no_target_of_the_one_before():
    whole = TokenizedExample(np.arange(4, dtype=np.int32), np.ones(4, dtype=bool))
    batch = collate([PackedExample((whole, whole)), PackedExample((whole,))])
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [8, 4]
    assert batch.segment_ids.dtype == np.int32
    assert [row.tolist() for row in unpack(batch).tokens] == [[0, 1, 2, 3]] * 3


def test_positions_start_again_with_every_example():
    layout = lay_out(collate(ROWS), Sft().positions(collate(ROWS)), share=False)
    for row, positions in zip(ROWS, layout.positions, strict=True):
        expected = np.concatenate([np.arange(row_length(part)) for part in row.parts])
        assert positions[: len(expected)].tolist() == expected[: len(positions)].tolist()


def test_an_example_alone_in_its_row_needs_no_mask():
    batch = collate([PackedExample((example,)) for example in EXAMPLES])
    assert lay_out(batch, batch.loss_mask[:, 1:], share=False).positions is None


# The same numbers


def packed_and_single(backend: Model, rows: tuple[PackedExample, ...] = ROWS) -> tuple[Numbers, Numbers]:
    """Numbers of a step on packed rows, and of the same step on the examples one a row, in the same order."""
    packed, single = collate(rows), collate([part for row in rows for part in row.parts])
    return _numbers(backend, packed), _numbers(backend, single)


def _numbers(backend: Model, batch: NumpyBatch) -> Numbers:
    objective = Targets()
    logps = backend.logps(batch, objective.positions(batch))
    result = train_step(backend, objective, [batch], lr=0.0, step=0)
    gradient = {name: value for name, value in backend.optimizer_state().items() if name.endswith(".exp_avg")}
    return Numbers(logps[objective.positions(batch)], result.loss, gradient)


class Targets(Squares):
    """The sum of squared log-probabilities of all tokens but the first of each example."""

    def positions(self, batch: NumpyBatch) -> np.ndarray:
        return positions_of(batch)


def positions_of(batch: NumpyBatch) -> np.ndarray:
    if batch.segment_ids is None:
        return np.arange(1, batch.tokens.shape[1]) < batch.lengths[:, None]
    return (np.diff(batch.segment_ids, axis=1) == 0) & (batch.segment_ids[:, 1:] > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("engine", ENGINES)
def test_packing_changes_no_log_probability_and_no_gradient(engine, architecture, tiny_model):
    backend = load(engine, tiny_model(architecture), packing=True)
    assert backend._split.packs
    # windows are reached
    assert max(map(row_length, EXAMPLES)) > 2 * WINDOW
    assert_same(*packed_and_single(backend))


@pytest.mark.parametrize("engine", ENGINES)
def test_packing_changes_no_gradient_of_the_whole_model(engine, tiny_model):
    assert_same(*packed_and_single(load(engine, tiny_model("llama"), lora=None, full=True, packing=True)))


@pytest.mark.parametrize("engine", ENGINES)
def test_packing_and_gradient_checkpointing_go_together(engine, tiny_model):
    backend = load(engine, tiny_model("gemma3_text"), packing=True, gradient_checkpointing=True)
    assert backend._split.packs
    assert_same(*packed_and_single(backend))


@pytest.mark.parametrize("engine", ENGINES)
def test_long_rows_are_as_exact_as_short_ones(engine, tiny_model):
    """Angles near 2000 radians are off by up to 6e-5 in float32: positions must start again, not only be relative."""
    examples = random_examples(50, seed=5, shortest=30, longest=50)
    backend = load(engine, tiny_model("llama"), packing=True)
    rows = tuple(pack(examples, lengths_of(examples), 2048))
    assert len(rows) == 1
    order = pack(examples, lengths_of(examples), 2048).members[0]
    packed, single = collate(rows), collate([examples[i] for i in order])
    ours, theirs = (backend.logps(batch, positions_of(batch))[positions_of(batch)] for batch in (packed, single))
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
@pytest.mark.parametrize("engine", ENGINES)
def test_scaled_rotary_embeddings_start_again_too(engine, kind, tiny_model, tmp_path):
    folder = with_rope(tiny_model("llama"), tmp_path / kind, kind)
    backend = load(engine, folder, packing=True)
    assert backend._split.packs
    assert_same(*packed_and_single(backend))


def with_rope(source: Path, folder: Path, kind: str, **keys) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16, **keys}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    return folder


@pytest.mark.mlx
def test_padded_shapes_and_the_compiled_step_change_no_number(tiny_model, request):
    plain = _numbers(load("mlx", tiny_model("llama"), packing=True), collate(ROWS))
    request.getfixturevalue("mac")
    compiled = _numbers(load("mlx", tiny_model("llama"), packing=True), collate(ROWS))
    assert pad_batch(collate(ROWS), quarter_octaves).segment_ids.shape[1] % 32 == 1
    assert_same(plain, compiled)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_packed_step_is_the_step_of_its_examples(engine, tiny_model):
    """Micro-batches and passes weigh by tokens: loss and gradient norm of the supervised step agree."""
    results = []
    for rows in (list(ROWS), list(EXAMPLES)):
        backend = load(engine, tiny_model("qwen3"), packing=True)
        results.append([train(backend, rows, at_once) for at_once in (None, 64)])
    [[whole, parts], [single, single_parts]] = results
    assert whole == pytest.approx(single, rel=1e-5)
    assert parts == pytest.approx(single, rel=1e-5)
    assert single_parts == pytest.approx(single, rel=1e-5)


def train(backend: Model, rows: list[TrainingRow], tokens_at_once: int | None) -> list[float]:
    backend._tokens_at_once = tokens_at_once
    batches = [collate(rows[: len(rows) // 2]), collate(rows[len(rows) // 2 :])]
    result = train_step(backend, Sft(), batches, lr=0.0, step=0)
    return [result.loss, result.grad_norm]


# A run


PACKED = {"packing": True, "cutoff_len": 64}


@pytest.mark.mlx
@pytest.mark.torch
def test_packed_curves_of_both_engines_agree_with_the_unpacked_one(model, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="macft")
    data = write_rows(tmp_path / "rows.jsonl", 30)
    for engine in ("mlx", "torch"):
        train_run(toy_settings(model, data, tmp_path / engine, engine, **PACKED, finetuning_type="full"))
    assert "packing is off" not in caplog.text
    assert "rows of up to 64 tokens" in caplog.text
    monkeypatch.setattr("macft.backends.torch.split._can_pack", lambda *_: False)
    train_run(toy_settings(model, data, tmp_path / "single", "torch", **PACKED, finetuning_type="full"))
    assert "packing is off: in this architecture" in caplog.text
    mlx, torch, single = (np.array(curve(tmp_path / name)) for name in ("mlx", "torch", "single"))
    np.testing.assert_allclose(mlx[:, 1], single[:, 1], rtol=1e-5)
    np.testing.assert_allclose(torch[:, 1], single[:, 1], rtol=1e-5)
    results = [json.loads((tmp_path / name / "train_results.json").read_text()) for name in ("torch", "single")]
    assert results[0]["total_tokens"] == results[1]["total_tokens"]


def test_a_packed_run_trains_on_every_example_and_evaluates_them_one_a_row(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 30)
    keys = {"val_size": 6, "num_train_epochs": 1}
    settings = toy_settings(model, data, tmp_path / "run", "torch", **PACKED, **keys)
    train_run(settings)
    plain = prepare(toy_settings(model, data, tmp_path / "run", "torch", cutoff_len=64, **keys))
    packed = prepare(settings)
    assert isinstance(packed.train, PackedRows) and not isinstance(packed.valid, PackedRows)
    assert len(packed.train) < len(plain.train) == len(packed.examples) == 24
    assert packed.plan.lengths.sum() == plain.plan.lengths.sum()
    assert packed.report == plain.report
    assert packed.data_hash != plain.data_hash
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["total_tokens"] == packed.plan.lengths.sum()


@pytest.mark.parametrize("keys", [{}, {"mask_history": True}, {"train_on_prompt": True}], ids=str)
def test_packed_rows_train_on_what_the_keys_say(model, tmp_path, keys):
    data = tmp_path / "rows.jsonl"
    roles, texts = ("user", "assistant") * 2, [("hello", "you", "how", f"one {n} two") for n in range(20)]
    rows = [[{"role": role, "content": text} for role, text in zip(roles, row, strict=True)] for row in texts]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    prepared = prepare(toy_settings(model, data, tmp_path / "run", "torch", packing=True, cutoff_len=128, **keys))
    assert isinstance(prepared.train, PackedRows) and len(prepared.train) < 20
    batch = unpack(collate([prepared.train[i] for i in range(len(prepared.train))]))
    trained = {
        prepared.tokenizer.decode(tokens[mask].tolist(), skip_special=False)
        for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True)
    }
    last = [f"one {n} two<|im_end|>\n" for n in range(20)]
    whole = "user\nhello<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n<|im_start|>user\nhow<|im_end|>\n"
    before = "" if "mask_history" in keys else "you<|im_end|>\n"
    if "train_on_prompt" in keys:
        before = f"{whole}<|im_start|>assistant\n"
    assert trained == {before + text for text in last}


def test_a_packed_run_goes_on_to_the_bit(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 30)
    keys = {**PACKED, "save_strategy": "steps", "save_steps": 3}
    train_run(toy_settings(model, data, tmp_path / "whole", "torch", **keys))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    last = max((tmp_path / "resumed").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    resumed = toy_settings(model, data, tmp_path / "resumed", "torch", **keys, resume_from_checkpoint=True)
    train_run(resumed)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    with pytest.raises(UsageError, match="written with other data"):
        train_run(resumed.model_copy(update={"packing": False}))


# Where it cannot hold


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_mixes_the_examples_of_a_row_trains_on_them_one_a_row(engine, tiny_model):
    on, off = (load(engine, tiny_model("llama"), packing=packing) for packing in (True, False))
    assert on._split.packs and not off._split.packs
    assert train(off, list(ROWS), None) == pytest.approx(train(on, list(ROWS), None), rel=1e-5)


def test_one_a_row_needs_no_larger_parts_than_packed():
    batch = collate(ROWS)
    parts = split_by_tokens(batch, None, packs=False)
    assert max(part.tokens.size for part in parts) <= batch.tokens.size
    assert sum(int(part.lengths.sum()) for part in parts) == int(batch.lengths.sum())
    assert sum(Sft().weight(part) for part in parts) == Sft().weight(batch)
    assert all(part.segment_ids is None for part in parts)
    small = split_by_tokens(batch, 50, packs=False)
    assert max(part.tokens.size for part in small) <= 50
    assert sum(len(part.tokens) for part in small) == len(EXAMPLES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recurrent_model_says_that_it_does_not_pack(engine, tmp_path):
    folder = write_mamba(tmp_path / "mamba")
    spec = ModelSpec(folder, None, full=True, precision="float32", packing=True)
    backend = load_model(engine, spec, GRADIENT)
    assert not backend._split.packs
    assert [
        note
        for note in backend.info.notes
        if note.startswith("packing is off: in this architecture the examples of one")
    ]
    single = collate([part for row in ROWS for part in row.parts])
    expected = train_step(backend, Sft(), [single], lr=0.0, step=0)
    ours = train_step(backend, Sft(), [collate(ROWS)], lr=0.0, step=0)
    assert ours.loss == pytest.approx(expected.loss, rel=1e-5)
    # asked for nothing, it says nothing
    quiet = load_model(engine, replace(spec, packing=False), GRADIENT)
    assert not [note for note in quiet.info.notes if "packing" in note]


def write_mamba(folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("mamba", **sizes, **ids, time_step_rank=4, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_a_rotary_embedding_that_changes_with_the_longest_row_is_not_packed(tiny_model, tmp_path):
    folder = with_rope(tiny_model("llama"), tmp_path / "dynamic", "dynamic")
    spec = ModelSpec(folder, LORA, precision="float32", packing=True, max_length=40)
    loaded = load_model("torch", spec, GRADIENT)
    said = [note for note in loaded.info.notes if "packing" in note]
    assert said == [
        "packing is off: its dynamic rotary embedding changes for all rows of a pass once one is longer than 16; "
        "the steps are the same, with every example in a row of its own"
    ]
    # short examples never reach the change
    assert not load_model("torch", replace(spec, max_length=16), GRADIENT).info.notes


def test_rope_types_that_look_at_the_longest_row_are_known():
    longrope = {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}
    assert rope_problem(longrope, 4096) is None
    assert "longer than 4096" in rope_problem(longrope, 4097)
    assert "longer than 4096" in rope_problem(longrope, 0)
    nested = {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 100}
    assert "longer than 100" in rope_problem(nested, 101)
    assert rope_problem({"rope_scaling": {"type": "yarn", "factor": 4}}, 10**6) is None
    assert rope_problem({"rope_scaling": None}, 10**6) is None
