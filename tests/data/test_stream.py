"""A stream trains on the rows that training in whole epochs has, holds a buffer of them, and resumes where it was."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.generated_texts import generated
from support.paths import TESTS
from support.toy_backend import ENGINES, curve, press_ctrl_c_in_step, toy_settings, write_rows

from macft.config.checks import without_effect
from macft.data.kinds import Streamed
from macft.data.plan import StreamPlan
from macft.data.stream import ROWS_AT_ONCE, Stream
from macft.data.tokenization.packing import PackedExample
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ConfigError, DataError, StoppedError, UsageError
from macft.training.checkpoint import list_checkpoints
from macft.training.dry_run import dry_run
from macft.training.log.report import read_log
from macft.training.prepare import prepare
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

STREAM: dict[str, Any] = {"streaming": True, "max_steps": 12}
STAGES = {
    "sft": {"cutoff_len": 24},
    "pt": {"stage": "pt", "cutoff_len": 9, "packing": False},
    "pt, packed": {"stage": "pt", "cutoff_len": 24},
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="macft")
    return lambda level=logging.INFO: [record.getMessage() for record in caplog.records if record.levelno >= level]


def write_texts(path: Path, count: int = 30) -> Path:
    rng = np.random.default_rng(3)
    words = ("the", "quick", "brown fox", "hello", "one two", "Paris")
    lines = [json.dumps({"text": " ".join(rng.choice(words, int(rng.integers(0, 20))))}) for _ in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def key(example: Streamed) -> tuple[Any, ...]:
    """Everything that training takes of an example."""
    parts = example.parts if isinstance(example, PackedExample) else (example,)
    return tuple((tuple(part.tokens.tolist()), tuple(part.loss_mask.tolist())) for part in parts)


def stream_of(settings) -> Stream:
    plan = prepare(settings).plan
    assert isinstance(plan, StreamPlan)
    return plan.stream


def taken(stream: Stream, count: int) -> list[tuple[Any, ...]]:
    return [key(example) for example in islice(stream, count)]


def weights(output_dir: Path) -> dict[str, np.ndarray]:
    return load_file(output_dir / "adapter_model.safetensors")


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# ---- which examples, in which order


@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_has_the_examples_of_an_epoch(stage, model, tmp_path):
    is_sft = stage == "sft"
    data = write_rows(tmp_path / "d.jsonl", 90) if is_sft else write_texts(tmp_path / "d.jsonl", 90)
    whole = [key(row) for row in prepare(toy_settings(model, data, tmp_path, "mlx", **STAGES[stage])).train]
    count = len(whole)
    settings = toy_settings(model, data, tmp_path, "mlx", **STAGES[stage], **STREAM)
    in_order = [{"buffer_size": 1}, {"disable_shuffling": True, "buffer_size": 7}]
    for keys in in_order:
        stream = stream_of(settings.model_copy(update=keys))
        assert taken(stream, 2 * count) == whole + whole
    for buffer_size in (7, count, 16384):
        found = taken(stream_of(settings.model_copy(update={"buffer_size": buffer_size})), 2 * count)
        first, second = found[:count], found[count:]
        assert Counter(first) == Counter(second) == Counter(whole)
        assert whole not in (first, second) and first != second


def test_the_seed_decides_the_order_and_nothing_is_taken_before_it_is_in_the_buffer(model, tmp_path):
    settings = toy_settings(model, write_rows(tmp_path / "d.jsonl", 200), tmp_path, "mlx", **STREAM)
    place = {row: i for i, row in enumerate(taken(stream_of(settings.model_copy(update={"buffer_size": 1})), 200))}
    assert len(place) == 200
    orders = []
    for keys in ({}, {}, {"data_seed": 42, "seed": 1}, {"seed": 1}):
        found = taken(stream_of(settings.model_copy(update={"buffer_size": 20, **keys})), 200)
        orders.append([place[row] for row in found])
    assert orders[0] == orders[1] == orders[2] != orders[3]
    assert all(at < i + 21 for i, at in enumerate(orders[0]))
    # as far as 20 allow, it is a shuffle: rows of the first half of the buffer are not the first to come
    assert np.mean(np.diff(orders[0]) == 1) < 0.1


def test_every_step_is_full_across_the_end_of_the_data(model, tmp_path, said):
    data = write_rows(tmp_path / "d.jsonl", 10)
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 9}
    prepared = prepare(toy_settings(model, data, tmp_path, "mlx", **STREAM | keys))
    assert isinstance(prepared.plan, StreamPlan)
    told: list[str] = []
    shapes = [[len(batch.lengths) for batch in step] for step in prepared.batches(0, told.append)]
    assert shapes == [[2, 2]] * 9
    assert told == ["streaming: all 10 examples have been seen; the data begin again"]
    assert sum(f"{data}: 10 messages rows" in line for line in said()) == 1


# ---- memory


def test_no_row_is_held_beyond_the_buffer_and_the_first_step_comes_before_the_end(model):
    for buffer_size in (1, 3, 500):
        rows, stream = generated(2000, load_tokenizer(model), buffer_size)
        most = 0
        for number, _ in enumerate(islice(stream, 2000), start=1):
            most = max(most, rows.read - number)
        assert buffer_size <= most <= buffer_size + min(ROWS_AT_ONCE, buffer_size)


_PEAK = """
import resource, sys
from pathlib import Path
from support.generated_texts import generated
from macft.data.tokenization.tokenizer import load_tokenizer

rows, stream = generated(200_000, load_tokenizer(Path(sys.argv[1])), 1000)
examples = iter(stream)
peaks = []
for count in (2_000, 198_000):
    for _ in range(count):
        next(examples)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if count == 2_000:
        assert rows.read < 4_000
assert rows.read == stream.per_pass == 200_000
print((peaks[1] - peaks[0]) / (1e3 if sys.platform == "linux" else 1e6))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(model):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", _PEAK, str(model)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    # MB; two arrays a row and what holds them would be 80
    assert float(grown) < 20


# ---- runs


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_both_engines_give_one_curve_and_so_does_every_cut_of_a_step(stage, model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", 11) if stage == "sft" else write_texts(tmp_path / "d.jsonl", 11)
    curves = []
    for name, engine, keys in (
        ("mlx", "mlx", {}),
        ("torch", "torch", {}),
        ("cut", "mlx", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    ):
        keys = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "buffer_size": 5, **keys}
        train(toy_settings(model, data, tmp_path / name, engine, **STAGES[stage], **STREAM, **keys))
        curves.append(np.array(curve(tmp_path / name))[:, 1])
    assert len(curves[0]) == 12
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    np.testing.assert_allclose(curves[0], curves[2], rtol=1e-5)


def test_a_run_keeps_no_rows_and_says_how_far_it_came(model, tmp_path, cache, said, capfd):
    data = write_rows(tmp_path / "d.jsonl", 10)
    settings = toy_settings(model, data, tmp_path / "run", "mlx", **STREAM)
    train(settings)
    assert not (cache.parent / "data").exists()
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == [round(step / 5, 4) for step in range(1, 13)]
    assert (
        "data: a stream, shuffled 16384 examples at a time; rows that are cut or left out are counted at the end"
        in said()
    )
    assert "plan: 12 steps, 2 examples a step (2 x 1)" in said()
    assert capfd.readouterr().err.count("the data begin again") == 1
    # a pass that is not over has no length
    train(settings.model_copy(update={"output_dir": str(tmp_path / "short"), "max_steps": 3, "buffer_size": 2}))
    assert [row["epoch"] for row in read_log(tmp_path / "short")] == [0.0] * 3
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["epoch"] == 2.4
    assert results["train_samples_per_second"] == pytest.approx(24 / results["train_runtime"], rel=0.01)


def test_what_is_lost_is_counted_once_and_told_at_the_end(model, tmp_path, said):
    rows = [{"user": "hello", "assistant": "one two"}] * 6
    rows[2] = {"user": "one " * 60, "assistant": "two"}
    rows[4] = {"user": "hello", "assistant": "three " * 60}
    lines = [{"messages": [{"role": role, "content": text} for role, text in row.items()]} for row in rows]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = prepare(toy_settings(model, data, tmp_path, "mlx", cutoff_len=40)).report
    assert (whole.shortened, whole.emptied, whole.answer_cut) == (2, 1, 1)
    before = len(said(logging.WARNING))
    train(toy_settings(model, data, tmp_path / "run", "mlx", cutoff_len=40, **STREAM))
    assert said(logging.WARNING)[before:] == [
        f"2 of 6 examples lost user text to fit cutoff_len 40, 1 of them all of it (first: {data}:3)",
        f"1 of 6 examples lost the end of an answer to fit cutoff_len 40 (first: {data}:5)",
    ]


def test_held_out_rows_are_the_first_and_are_not_trained_on(model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", 12)
    every = [key(row) for row in prepare(toy_settings(model, data, tmp_path, "mlx")).train]
    settings = toy_settings(model, data, tmp_path / "run", "mlx", **STREAM, val_size=4, eval_steps=5, buffer_size=3)
    settings = settings.model_copy(update={"eval_strategy": "steps"})
    prepared = prepare(settings)
    assert [key(row) for row in prepared.valid] == every[:4]
    assert isinstance(prepared.plan, StreamPlan)
    assert Counter(taken(prepared.plan.stream, 16)) == Counter(every[4:] * 2)
    train(settings)
    assert [row["current_steps"] for row in read_log(tmp_path / "run") if "eval_loss" in row] == [5, 10]
    with pytest.raises(ConfigError, match="val_size: 12 leaves none of 12 examples to train on"):
        prepare(settings.model_copy(update={"val_size": 12.0}))


def test_evaluation_data_are_not_streamed(model, tmp_path, cache):
    held_out = write_rows(tmp_path / "e.jsonl", 3, seed=8)
    data = write_rows(tmp_path / "d.jsonl", 10)
    settings = toy_settings(model, data, tmp_path / "run", "mlx", **STREAM, eval_dataset=str(held_out))
    assert len(prepare(settings).valid) == 3
    assert len(list((cache.parent / "data").iterdir())) == 1


def test_a_dry_run_of_a_stream_works(model, tmp_path):
    settings = toy_settings(model, write_rows(tmp_path / "d.jsonl"), tmp_path / "run", "mlx", **STREAM)
    assert dry_run(settings).startswith("dry run: all of it works; a step takes ")


# ---- going on


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_same_bits(stage, engine, model, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", 7) if stage == "sft" else write_texts(tmp_path / "d.jsonl", 7)
    # the checkpoint of step 8 is in the middle of a later pass, with a buffer half drawn
    keys = {**STAGES[stage], **STREAM, "buffer_size": 4, "save_strategy": "steps", "save_steps": 4}
    keys |= {"lora_dropout": 0.1, "weight_decay": 0.1}
    train(toy_settings(model, data, tmp_path / "whole", engine, **keys))
    broken = toy_settings(model, data, tmp_path / "broken", engine, **keys)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        press_ctrl_c_in_step(patch, 10)
        train(broken)
    assert list_checkpoints(tmp_path / "broken")[-1].name == "checkpoint-8"
    train(broken.model_copy(update={"resume_from_checkpoint": True}))
    assert curve(tmp_path / "whole") == curve(tmp_path / "broken")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    epochs = [[row["epoch"] for row in read_log(tmp_path / name)] for name in ("whole", "broken")]
    assert epochs[0] == epochs[1]


def test_an_invalid_row_stops_the_run_where_it_is_met_and_the_mended_file_goes_on(model, tmp_path):
    lines = write_rows(tmp_path / "d.jsonl", 40).read_text().splitlines(keepends=True)
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(lines))
    keys = {**STREAM, "max_steps": 20, "buffer_size": 2, "save_strategy": "steps", "save_steps": 5}
    train(toy_settings(model, whole, tmp_path / "one", "mlx", **keys))

    data = tmp_path / "d.jsonl"
    data.write_text("".join([*lines[:30], '{"messages": 5}\n', *lines[31:]]))
    settings = toy_settings(model, data, tmp_path / "two", "mlx", **keys)
    with pytest.raises(
        DataError, match=r"d\.jsonl: 1 problem in messages rows\n  line 31: \"messages\": found a number"
    ):
        train(settings)
    # rows 1 to 30, but for those in the buffer
    assert [row[0] for row in curve(tmp_path / "two")] == list(range(1, 15))
    data.write_text("".join(lines))
    resumed = settings.model_copy(update={"resume_from_checkpoint": True})
    train(resumed)
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    # another row where the run has been is another course, and nothing of the run is touched
    before = {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()}
    data.write_text("".join([*lines[:3], lines[0], *lines[4:]]))
    with pytest.raises(UsageError, match="the 40 examples that the checkpoint was trained on have changed since"):
        train(resumed.model_copy(update={"max_steps": 25}))
    with pytest.raises(UsageError, match="written with other data, or with another batch size, seed"):
        train(resumed.model_copy(update={"buffer_size": 3}))
    assert {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()} == before


# ---- refused


def test_problems_before_the_first_example_leave_no_folder(model, tmp_path):
    invalid = tmp_path / "invalid.jsonl"
    invalid.write_text('{"messages": 5}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    for dataset, stage, message in (
        (tmp_path / "none.jsonl", "sft", "none.jsonl"),
        (invalid, "sft", r"invalid\.jsonl: 1 problem in messages rows\n  line 1: "),
        (empty, "pt", "contain no example with anything to train on"),
    ):
        with pytest.raises(DataError, match=message):
            train(toy_settings(model, dataset, tmp_path / "run", "mlx", **STREAM, stage=stage))
    assert not (tmp_path / "run").exists()


def test_what_needs_lengths_is_refused_or_said(model, tmp_path, said):
    data = write_rows(tmp_path / "d.jsonl")
    with pytest.raises(
        ConfigError, match="packing: conversations are packed by their lengths, which are not known in a stream"
    ):
        prepare(toy_settings(model, data, tmp_path, "mlx", **STREAM, packing=True))
    prepare(toy_settings(model, data, tmp_path, "mlx", **STREAM))
    assert not any("group_by_length" in line for line in said())
    prepare(toy_settings(model, data, tmp_path, "mlx", **STREAM, group_by_length=True))
    assert "group_by_length: off, because the lengths in a stream are not known" in said()


def test_keys_of_the_cache_have_an_effect_only_on_evaluation_data(model, tmp_path):
    keys = {**STREAM, "overwrite_cache": True, "preprocessing_num_workers": 2}
    assert without_effect(toy_settings(model, tmp_path, tmp_path, "mlx", **keys)) == [
        "overwrite_cache (streaming caches nothing)",
        "preprocessing_num_workers (streaming tokenizes in one process)",
    ]
    assert without_effect(toy_settings(model, tmp_path, tmp_path, "mlx", **keys, eval_dataset="e")) == []
