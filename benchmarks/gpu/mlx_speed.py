"""Measure steps of the MLX engine on a GPU: memory, tokens per second."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np

from benchmarks.gpu.mlx_common import FOLDER, GB, half_billion, load, loud, mlx_or_skip, steps
from benchmarks.gpu.models import HALF_BILLION, flops_per_token, tokens_of_a_pass, whole_rows
from benchmarks.gpu.table import Row, SkipCheck, measured, outcome


def optimizer() -> Iterator[Row]:
    """Clipping and AdamW as one compiled function, and one operation after the other."""
    mx = mlx_or_skip()
    from macft.backends.base import OptimizerSpec
    from macft.backends.mlx.step import AdamState, AdamW

    drawn = {str(i): 0.1 * mx.random.normal((8, 896)) for i in range(336)}
    mx.eval(drawn)
    seconds, results = [], []
    for compiles in (True, False):
        adam = AdamW(OptimizerSpec())
        if not compiles:
            adam._update = adam._updated
        state, parameters = AdamState(), drawn
        for step in range(6):
            if step == 1:  # the first one compiles
                start = time.perf_counter()
            state, parameters, _ = adam.update(state, parameters, drawn, 1e-3)
            mx.eval(parameters, state.moments)
        seconds.append((time.perf_counter() - start) / 5)
        results.append(parameters)
    worst = max(float(mx.abs(results[0][name] - results[1][name]).max()) for name in drawn)
    yield outcome(
        "clip and AdamW of 336 arrays, compiled and plain",
        "the same within 1e-6, faster",
        f"{1e3 * seconds[0]:.1f} and {1e3 * seconds[1]:.1f} ms, off by {worst:.1e}",
        worst < 1e-6 and seconds[0] < seconds[1],
    )


def head_memory() -> Iterator[Row]:
    """The peak of a step does not grow with the logits."""
    mx = mlx_or_skip()
    from support.loud_models import write_loud_model

    from macft.objectives.losses import Sft

    folder = write_loud_model(FOLDER / "wide", vocab_size=49152, num_hidden_layers=2, max_position_embeddings=8192)
    peaks = []
    for length in (1024, 4096):
        model = load(folder)
        model._split._rows_at_once = 256
        steps(model, Sft(), [whole_rows(1, length)])
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        steps(model, Sft(), [whole_rows(1, length)])
        peaks.append((mx.get_peak_memory() - start) / GB)
    found = f"{peaks[0]:.2f} and {peaks[1]:.2f} GB for 1024 and 4096 rows of 49152 logits (2.4 GB more in float32)"
    yield outcome("head in chunks", "0.6 GB more at the most", found, peaks[1] < peaks[0] + 0.6)


def shapes() -> Iterator[Row]:
    """Rows of many lengths: few shapes are compiled, and free buffers stay bounded."""
    mx = mlx_or_skip()
    from macft.backends.mlx import device
    from macft.objectives.losses import Sft

    model = load(loud(), max_length=512)
    rng = np.random.default_rng(0)
    batches = [whole_rows(4, int(rng.integers(32, 512))) for _ in range(40)]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        steps(model, Sft(), batches)
        seconds.append((time.perf_counter() - start) / len(batches))
    count, cached = len(model._steps[Sft()].shapes), mx.get_cache_memory()
    yield outcome(
        "bf16, 40 lengths for the first time and again",
        "at most 20 shapes, free buffers within their bound",
        f"{1e3 * seconds[0]:.0f} and {1e3 * seconds[1]:.0f} ms a step, {count} shapes, {cached / GB:.2f} GB of buffers",
        count <= 20 and cached <= 0.26 * device.memory_size(),
    )


def memory() -> Iterator[Row]:
    """The peak of a step beside the plan's estimate, and the default batch where little is free."""
    mx = mlx_or_skip()
    from macft.backends.mlx import device
    from macft.backends.mlx.memory import token_bytes
    from macft.objectives.losses import Sft

    model = load(half_billion(), max_length=1024)
    kept = token_bytes(model._split, 1024, model._masters, model._dtype, None)
    held, batch = mx.get_active_memory(), whole_rows(4, 1024)
    steps(model, Sft(), [batch])
    mx.reset_peak_memory()
    steps(model, Sft(), [batch])
    tokens = tokens_of_a_pass(batch, model._tokens_at_once)
    head = min(model._split.head_bytes, tokens * model._split.row_bytes)
    expected = held + 12 * model.info.trainable_parameters + kept * tokens + head
    peak = mx.get_peak_memory()
    yield outcome(
        "bf16, 0.5B, 4 x 1024, peak",
        f"at most {1.15 * expected / GB:.2f} GB",
        f"{peak / GB:.2f} GB, {kept / 1e6:.2f} MB a token",
        peak < 1.15 * expected,
    )
    del model
    for most in (6 * GB, 2 * GB):
        gc.collect()
        mx.clear_cache()
        held, free = mx.get_active_memory(), min(most, device.free_memory())
        with patch.object(
            device, "free_memory", lambda free=free, held=held: int(free + held - mx.get_active_memory())
        ):
            small = load(half_billion(), max_length=2048)
        batch = whole_rows(8, 2047)
        start = time.perf_counter()
        steps(small, Sft(), [batch])
        seconds = time.perf_counter() - start
        peak = mx.get_peak_memory() - held
        note = "checkpointing" if small.info.notes else "no checkpointing"
        rate = batch.tokens.size / seconds
        said = f"{peak / GB:.1f} GB, {rate:,.0f} tokens/s, passes of {small._tokens_at_once}, {note}"
        yield outcome(f"bf16, 0.5B, 8 x 2048 with {free / GB:.1f} GB free", "within them", said, peak < free)
        del small


def speed() -> Iterator[Row]:
    """Tokens per second of 0.5B, compiled and not, and with a head in larger chunks."""
    mx = mlx_or_skip()
    from macft.objectives.losses import Sft

    a, b = (mx.random.normal((8192, 8192)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a @ b)
    start = time.perf_counter()
    mx.eval([a @ b for _ in range(10)])
    rate = 10 * 2 * 8192**3 / (time.perf_counter() - start)

    def tokens_per_second(model, batch) -> float:
        steps(model, Sft(), [batch] * 2)
        mx.reset_peak_memory()
        begin = time.perf_counter()
        steps(model, Sft(), [batch] * 4)
        return 4 * (batch.tokens.size - len(batch.tokens)) / (time.perf_counter() - begin)

    for rows, length, compiles in ((4, 512, True), (4, 512, False), (8, 1024, True)):
        model = load(half_billion(), max_length=length)
        model._compiles = compiles
        tokens = tokens_per_second(model, whole_rows(rows, length))
        used = tokens * flops_per_token(HALF_BILLION, length) / rate
        yield measured(
            f"bf16, 0.5B, {rows} x {length}{'' if compiles else ', not compiled'}",
            "",
            f"{tokens:,.0f} tokens/s, {100 * used:.0f} % of {rate / 1e12:.0f} TFLOP/s, "
            f"{mx.get_peak_memory() / GB:.1f} GB",
        )
    found = []
    for power in (23, 25, 26):
        model = load(half_billion(), max_length=512)
        model._split._rows_at_once = (1 << power) // 151936
        found.append(f"2^{power}: {tokens_per_second(model, whole_rows(4, 512)):,.0f}")
    yield measured("bf16, 0.5B, 4 x 512, logits at once", "", ", ".join(found))


def out_of_memory() -> Iterator[Row]:
    """A full card ends in one line; last, as it is unknown what a device does after that."""
    mx = mlx_or_skip()
    from macft.errors import ModelError
    from macft.objectives.losses import Sft

    if "total_memory" not in mx.device_info():
        raise SkipCheck("on a Mac this would fill the memory of everything else")
    model = load(half_billion(), max_length=2048)
    ballast = mx.zeros(max(0, int(mx.device_info()["free_memory"] - 2 * GB)), dtype=mx.uint8)
    mx.eval(ballast)
    try:
        steps(model, Sft(), [whole_rows(8, 2047)])
        said, passes = "no error", False
    except ModelError as error:
        said, passes = str(error)[:150], " is out of memory in a training step of 8 rows of 2048 tokens" in str(error)
    del ballast
    yield outcome("8 x 2048 with 2 GB free that load did not know of", "one line", said, passes)
