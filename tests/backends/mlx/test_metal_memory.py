"""How much a step takes on a GPU, on MLX's CPU build with a GPU's settings, and what is said when that is too much."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import peft  # noqa: F401  it replaces the module transformers, which must not happen during a test
import pytest
from support.engines import load_model, train_step
from support.mac import GB
from support.step_numbers import LORA, assert_same, load, supervised_numbers
from support.tiny_models import random_examples, random_pairs, write_model

from macft.backends.base import ModelSpec, OptimizerSpec, Sampling
from macft.backends.batch_layout import exact, plain_layout
from macft.backends.memory import LEVERS
from macft.backends.mlx import memory
from macft.backends.mlx import model as models
from macft.backends.mlx import split as split_model
from macft.backends.mlx import step as steps
from macft.backends.mlx.split import SplitModel, to_device
from macft.data.batches import collate
from macft.errors import ModelError
from macft.objectives.batch import Batch
from macft.objectives.losses import Sft
from macft.objectives.preference import answer_positions

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("small_threads")]

# Memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Little but a head."""
    return write_model(tmp_path_factory.mktemp("wide"), "llama", vocab_size=16384, hidden_size=32, num_hidden_layers=1)


def step_peak(model, batch: Batch, *, compiled: bool = False) -> int:
    """Bytes that loss and gradients of one batch take at the most."""
    step = steps.gradient_step(model._split, None, Sft(), model._dtype)
    columns = to_device(plain_layout(batch, batch.loss_mask[:, 1:], exact).columns)
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    run = mx.compile(step) if compiled else step
    mx.eval(run(model._masters, to_device(batch.columns), columns, None, mx.array(1.0)))
    model._place_masters()
    return mx.get_peak_memory() - start


def rows(count: int, length: int, *, trained: int) -> Batch:
    """Rows of so many tokens, of whose last so many are trained."""
    tokens = np.tile(np.arange(length + 1, dtype=np.int32) % 7, (count, 1))
    mask = np.tile(np.arange(length + 1) > length - trained, (count, 1))
    return Batch(tokens, mask, np.full(count, length + 1, dtype=np.int32))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_logits_of_one_chunk_are_in_memory_however_many_there_are(wide, compiled):
    model = load("mlx", wide)
    model._split._rows_at_once = 32
    peaks = [step_peak(model, rows(chunks, 32, trained=32), compiled=compiled) for chunks in (4, 16)]
    chunk = 32 * 16384 * 4
    assert peaks[0] > 2 * chunk
    # the rest of twelve more rows is small beside a chunk
    assert peaks[1] < peaks[0] + chunk


@pytest.fixture(scope="module")
def tied_or_not(tmp_path_factory):
    """tied_or_not(True) is little but a head that is also the embedding, tied_or_not(False) has two matrices."""
    sizes = {"vocab_size": 16384, "hidden_size": 32, "num_hidden_layers": 1}
    folders = {
        tied: write_model(tmp_path_factory.mktemp(f"tied-{tied}"), "llama", tie_word_embeddings=tied, **sizes)
        for tied in (False, True)
    }
    return folders.__getitem__


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_trained_head_holds_the_logits_of_one_chunk_too(tied_or_not, tied, compiled):
    model = load("mlx", tied_or_not(tied), lora=None, full=True)
    model._split._rows_at_once = 32
    peaks = [step_peak(model, rows(chunks, 32, trained=32), compiled=compiled) for chunks in (4, 16)]
    chunk = 32 * 16384 * 4
    # twelve more chunks of logits and their slopes would be 24; what they keep of the layer was 3 at most
    assert peaks[1] < peaks[0] + 6 * chunk


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_trained_head_in_chunks_has_the_numbers_and_gradients_of_a_whole_one(tied_or_not, tied):
    batch, results = collate(random_examples(3, seed=6)), []
    for rows_at_once in (1000, 7):
        model = load("mlx", tied_or_not(tied), lora=None, full=True, gradient_checkpointing=rows_at_once == 7)
        model._split._rows_at_once = rows_at_once
        results.append(supervised_numbers(model, batch))
    assert_same(*results)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight layers, so that activations outweigh gradients."""
    return write_model(tmp_path_factory.mktemp("deep"), "qwen2", num_hidden_layers=8, max_position_embeddings=1024)


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(("checkpoints", "tolerance"), [(False, 0.12), (True, 0.25)], ids=["all kept", "checkpointing"])
def test_short_rows_say_what_long_ones_take(deep, checkpoints, tolerance):
    """Rows are twice as long as any that was tried.

    How far the host is ahead of the computation, and holds what that still needs, changes from run to run: it shows
    where little else is kept.
    """
    model = load("mlx", deep, gradient_checkpointing=checkpoints)
    peak = step_peak(model, rows(3, 512, trained=1))
    expected = memory.token_bytes(model._split, 512, model._masters, model._dtype, None)
    assert peak / (3 * 512) == pytest.approx(expected, rel=tolerance)


def leave(mac, folder, nbytes: int, monkeypatch) -> None:
    """Make a Mac on which a loaded model leaves so many bytes, without optimizer and head."""
    monkeypatch.setattr(split_model, "GPU_LOGITS_AT_ONCE", 2**16)
    model = load_model("mlx", ModelSpec(folder, LORA, precision="float32", max_length=512))
    taken = mx.get_active_memory() + model._split.head_bytes + 12 * model.info.trainable_parameters
    mac.info["max_recommended_working_set_size"] = taken + nbytes


def test_a_row_that_does_not_fit_switches_checkpointing_on_and_changes_no_number(deep, mac, monkeypatch):
    batch = rows(4, 511, trained=200)
    plenty = load("mlx", deep, max_length=512)
    kept = memory.token_bytes(plenty._split, 512, plenty._masters, plenty._dtype, None)
    assert plenty.info.notes == () and plenty._tokens_at_once > 10**5
    expected = supervised_numbers(plenty, batch)
    del plenty
    for rows_that_fit, note in (
        (3.0, None),
        (0.5, "gradient_checkpointing is on: without it the longest row, 512 tok"),
    ):
        leave(mac, deep, int(rows_that_fit * 512 * kept / 0.85), monkeypatch)
        model = load("mlx", deep, max_length=512)
        if note is None:
            assert model.info.notes == () and model._tokens_at_once == pytest.approx(3 * 512, rel=0.1)
        else:
            assert model.info.notes[0].startswith(note) and 512 <= model._tokens_at_once < 10_000
        assert_same(supervised_numbers(model, batch), expected)
        del model


@pytest.mark.usefixtures("mac")
def test_packed_runs_are_planned_for_their_rows_not_for_their_examples(deep, monkeypatch):
    planned = []
    monkeypatch.setattr(memory, "token_bytes", lambda _split, length, *_rest: planned.append(length) or 1.0)
    for lengths in ({"max_length": 40, "row_length": 512}, {"max_length": 40}):
        load("mlx", deep, packing=True, **lengths)
    assert planned == [512, 40]


@pytest.mark.usefixtures("mac")
def test_scoring_holds_no_more_tokens_at_once_than_a_training_pass_and_keeps_its_order(tiny_model, monkeypatch):
    model = load("mlx", tiny_model("qwen2"))
    scored = []
    monkeypatch.setattr(
        steps, "scored_as_trained", lambda *of, by=steps.scored_as_trained: scored.append(of[2]) or by(*of)
    )
    for batch in (collate(random_examples(7, seed=1)), collate(random_pairs(7, seed=1))):
        positions = (
            answer_positions(batch, with_prompt=True) if batch.prompt_mask is not None else batch.loss_mask[:, 1:]
        )
        model._tokens_at_once = 10_000
        expected = model.logps(batch, positions)
        assert scored == [positions.shape] and np.abs(expected).max() > 1
        scored.clear()
        model._tokens_at_once = 2 * batch.tokens.shape[1]
        found = model.logps(batch, positions)
        assert found.shape == expected.shape and found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        assert len(scored) > 2 and all(rows * (length + 1) <= model._tokens_at_once for rows, length in scored)
        scored.clear()


@pytest.mark.parametrize(
    ("size", "recommended", "expected"), [(8, 5.3, 5.0), (16, 10.7, 10.7), (64, 48.0, 48.0)], ids=lambda x: str(x)
)
def test_a_mac_keeps_memory_for_itself(tiny_model, mac, size, recommended, expected):
    mac.info |= {"memory_size": size * GB, "max_recommended_working_set_size": int(recommended * GB)}
    load_model("mlx", ModelSpec(tiny_model("llama"), None))
    assert mac.limits == {"wired": int(expected * GB), "cache": int(expected * GB) // 4}


def test_free_buffers_go_when_a_model_loads_and_when_it_turns_to_another_task(tiny_model, monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(None))
    model = load("mlx", tiny_model("llama"))
    assert len(cleared) == 2, "what another model left, and what loading left"
    batch = collate(random_examples(2, seed=1))
    for expected, task in enumerate(("score", "score", "train", "train", "score", "train")):
        if task == "score":
            model.logps(batch, batch.loss_mask[:, 1:])
        else:
            train_step(model, Sft(), [batch], lr=1e-3, step=expected)
    assert len(cleared) == 2 + 4


def test_a_gpu_reads_its_head_for_more_rows_at_once(wide, mac):
    assert load("mlx", wide)._split._rows_at_once == 2**26 // 16384
    # a sixteenth of 5 GB, at 16 bytes a logit
    mac.info |= {"memory_size": 8 * GB, "max_recommended_working_set_size": 6 * GB}
    assert load("mlx", wide)._split._rows_at_once == pytest.approx(5 * GB / 256 / 16384, rel=0.01)


# Memory that runs out

SAID = [
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallback...)",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 9 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
]


def one_line(what: str, phase: str) -> str:
    """The whole message, as a pattern; `what` is one too."""
    return rf"^Apple M4 Pro {what}: {re.escape(LEVERS[phase])}$"


OUT = r"is out of memory {doing}, with [0-9.]+ [kMG]B of 37.0 GB in use"


def fails(said: str):
    def fail(*_args, **_options):
        raise RuntimeError(said)

    return fail


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("said", SAID)
def test_memory_that_runs_out_at_load_is_one_line(tiny_model, monkeypatch, said):
    spec = ModelSpec(tiny_model("llama"), LORA)
    for owner, name, doing, phase in (
        (models, "load_mlx_lm_model", "loading the weights", "load"),
        (mx, "eval", "loading the weights", "load"),
        (SplitModel, "hidden", "trying the model on a few tokens", "load"),
        (memory, "gradient_step", "trying a row of 4 tokens", "train"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails(said))
            with pytest.raises(ModelError, match=one_line(OUT.format(doing=doing), phase)):
                load_model("mlx", spec, OptimizerSpec())


@pytest.mark.usefixtures("mac")
def test_memory_that_runs_out_later_is_one_line(tiny_model, monkeypatch):
    model, batch = load("mlx", tiny_model("llama")), collate(random_examples(3, seed=1))
    shape = f"3 rows of {batch.tokens.shape[1]} tokens"

    def tasks():
        yield f"in a training step of {shape}", "train", lambda: train_step(model, Sft(), [batch], lr=1e-3, step=0)
        yield f"scoring {shape}", "score", lambda: model.logps(batch, batch.loss_mask[:, 1:])
        yield "computing the logits of 3 tokens", "answer", lambda: model.logits([1, 2, 3])
        answer = {"max_new_tokens": 4, "stop_ids": frozenset(), "sampling": Sampling()}
        yield "answering a prompt of 3 tokens", "answer", lambda: list(model.generate([1, 2, 3], **answer))

    monkeypatch.setattr(type(model._model.model.module), "__call__", fails(SAID[0]))
    for doing, phase, run in tasks():
        with pytest.raises(ModelError, match=one_line(OUT.format(doing=doing), phase)):
            run()


@pytest.mark.usefixtures("mac")
def test_a_gpu_that_is_stopped_for_taking_too_long_says_what_helps_and_other_errors_stay(tiny_model, monkeypatch):
    model, batch = load("mlx", tiny_model("llama")), collate(random_examples(1, seed=1))
    kind = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallback...)"
    what = (
        rf"was stopped by its driver scoring 1 rows of {batch.tokens.shape[1]} tokens, as one operation took too long"
    )
    monkeypatch.setattr(SplitModel, "hidden", fails(kind))
    with pytest.raises(ModelError, match=one_line(what, "score")):
        model.logps(batch, batch.loss_mask[:, 1:])
    monkeypatch.setattr(SplitModel, "hidden", fails("[matmul] shapes (1,2) and (3,4) do not fit"))
    with pytest.raises(RuntimeError, match="do not fit"):
        model.logps(batch, batch.loss_mask[:, 1:])
