"""Check the MLX engine on a GPU: Metal, or CUDA where MLX's wheel for it is installed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from benchmarks.gpu.mlx_common import FOLDER, GB, load, loud, mlx_or_skip, on_cpu, share, steps, tiny
from benchmarks.gpu.mlx_speed import head_memory, memory, optimizer, out_of_memory, shapes, speed
from benchmarks.gpu.models import packed_rows, whole_rows
from benchmarks.gpu.table import Check, Row, measured, outcome, run_all


def machine() -> Iterator[Row]:
    """What the device is."""
    mx = mlx_or_skip()
    from importlib.metadata import version

    from macft.backends.mlx import device

    info = mx.device_info()
    yield measured("device", "", ", ".join(f"{key} {value}" for key, value in info.items() if "id" not in key)[:200])
    memory = f"{device.memory_size() / GB:.1f} GB for a run, {device.free_memory() / GB:.1f} GB free"
    yield measured("versions", "", f"mlx {mx.__version__}, mlx-lm {version('mlx-lm')}; {memory}")


def parity() -> Iterator[Row]:
    """Ten float32 steps of small models, compiled on the GPU, and on the CPU."""
    mlx_or_skip()
    from support.tiny_models import ARCHITECTURES, random_examples, random_pairs, steps_of

    from macft.data.batches import collate
    from macft.data.tokenization.table import Reference
    from macft.objectives.losses import Sft
    from macft.objectives.preference import Preference

    pairs = [replace(p, reference=Reference(-20.0 - i, -18.0 + i, 3.0)) for i, p in enumerate(random_pairs(20, seed=1))]
    sft = [batch for step in steps_of(random_examples(40, seed=1), 4, 1) for batch in step]
    dpo = [collate(pairs[i : i + 2]) for i in range(0, 20, 2)]
    cases = [(name, "sft", Sft(), sft, 1e-4) for name in ARCHITECTURES] + [("llama", "dpo", Preference(), dpo, 5e-4)]
    for name, what, objective, batches, limit in cases:
        folder = tiny(name)
        with on_cpu():
            expected = steps(load(folder, precision="float32"), objective, batches, lr=1e-3)
        found = steps(load(folder, precision="float32"), objective, batches, lr=1e-3)
        losses = share([r.loss for r in found], [r.loss for r in expected])
        norms = share([r.grad_norm for r in found], [r.grad_norm for r in expected])
        yield outcome(
            f"float32, 10 {what} steps as on the CPU: {name}",
            f"loss {limit:g}, norm 1e-3",
            f"loss {losses:.1e}, norm {norms:.1e}",
            losses <= limit and norms <= 1e-3,
        )


def sixteen_bits() -> Iterator[Row]:
    """What a loud model can do is found out in bfloat16; packing that is broken is refused."""
    mlx_or_skip()
    from macft.backends.mlx.split import SplitModel
    from macft.backends.probes import probe_packed, probe_pairs

    model = load(loud(), packing=True)
    split = model._split
    shares = []
    for first, second in (probe_packed(), probe_pairs()):
        a, b = split.logits(first), split.logits(second)
        shares.append(float(np.sqrt(np.mean(np.square(a - b))) / b.std()))
    found = f"splits {split.backbone is not None}, packs {split.packs} ({shares[0]:.3f})"
    found += f", shares {split.shares_prompts} ({shares[1]:.3f})"
    passes = split.backbone is not None and split.packs and split.shares_prompts and max(shares) < 0.1
    yield outcome("bf16, loud model", "splits, packs, shares, rms below 0.1", found, passes)
    before = SplitModel.hidden

    def broken(self, layout):
        return before(self, {name: value for name, value in layout.items() if name != "positions"})

    with patch.object(SplitModel, "hidden", broken):
        refused = not load(loud(), packing=True)._split.packs
    yield outcome("bf16, packing that is broken", "refused", "refused" if refused else "accepted", refused)


def first_preference_step() -> Iterator[Row]:
    """The reference, scored in other batches, and the first step."""
    mlx_or_skip()
    from support.tiny_models import random_pairs

    from macft.data.batches import collate
    from macft.data.tokenization.table import Reference
    from macft.objectives.preference import Preference, answer_positions, reference_columns
    from macft.training.checks.first_step import check_start

    for count, longest in ((8, 200), (1, 500)):
        pairs = random_pairs(count, seed=5, prompt=(30, 60), answer=(longest // 2, longest))
        zero = [replace(pair, reference=Reference(0.0, 0.0, 1.0)) for pair in pairs]
        model = load(loud(), max_length=longest + 60, rows_per_example=2)
        # longest first, one by one: not the batch of the step
        columns = []
        for pair in zero:
            batch = collate([pair])
            columns.append(
                reference_columns(model.logps(batch, answer_positions(batch, with_prompt=False)), batch, 1.0)
            )
        scored = [
            replace(pair, reference=Reference(float(c[0][0]), float(c[1][0]), 1.0))
            for pair, c in zip(pairs, columns, strict=True)
        ]
        batch = collate(scored)
        [result] = steps(model, Preference(beta=0.1), [batch])
        alarm = check_start(Preference(beta=0.1), result, [batch], model.info.precision)
        worst = max(abs(result.metrics[f"rewards/{side}"]) for side in ("chosen", "rejected"))
        yield outcome(
            f"bf16, first DPO step, {count} x {longest}",
            "no alarm",
            f"loss - ln 2 {result.loss - math.log(2):+.5f}, mean reward up to {worst:.4f}",
            alarm is None,
        )


def precisions() -> Iterator[Row]:
    """Steps in 16 bits beside float32, compiled, of rows and of packed rows."""
    mlx_or_skip()
    from macft.objectives.losses import Sft

    for kind, batches in (
        ("rows", [whole_rows(2, 64, seed) for seed in range(8)]),
        ("packed", [packed_rows(2, 4, 20, seed) for seed in range(8)]),
    ):
        options = {"packing": kind == "packed"}
        expected = steps(load(loud(), precision="float32", **options), Sft(), batches)
        for precision in ("bfloat16", "float16"):
            found = steps(load(loud(), precision=precision, **options), Sft(), batches)
            kept = [(a, b) for a, b in zip(found, expected, strict=True) if not a.is_skipped]
            loss = max((abs(a.loss - b.loss) / b.loss for a, b in kept), default=math.inf)
            norm = max((abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in kept), default=math.inf)
            yield outcome(
                f"{precision} beside float32, 8 steps, {kind}",
                "loss within 2 %, norm within 10 %",
                f"loss {100 * loss:.2f} %, norm {100 * norm:.1f} %, {8 - len(kept)} skipped",
                loss < 0.02 and norm < 0.1,
            )


def resuming() -> Iterator[Row]:
    """A run that goes on from a checkpoint."""
    mlx_or_skip()
    from macft.objectives.losses import Sft

    batches = [whole_rows(2, 64, seed) for seed in range(6)]
    model = load(loud())
    steps(model, Sft(), batches[:3])
    trained, moments = model.trained_state(), model.optimizer_state()
    expected = steps(model, Sft(), batches[3:], start=3)
    resumed = load(loud())
    resumed.set_trained_state(trained)
    resumed.set_optimizer_state(moments, 3)
    same = all(np.array_equal(value, resumed.trained_state()[name]) for name, value in trained.items())
    found = steps(resumed, Sft(), batches[3:], start=3)
    losses = share([r.loss for r in found], [r.loss for r in expected])
    yield outcome("bf16, resumed", "state equal, loss 1e-2", f"state equal {same}, loss {losses:.1e}", losses < 1e-2)


def quantized() -> Iterator[Row]:
    """Steps on a base of 4 bits beside the same numbers dense, and its answers."""
    mx = mlx_or_skip()
    from support.tiny_models import write_mlx_quantized

    from macft.backends.base import Sampling
    from macft.objectives.losses import Sft

    folder = write_mlx_quantized(loud(), FOLDER / "quantized", 4)
    batches = [whole_rows(2, 64)] * 6
    with on_cpu():  # which dequantizes
        expected = steps(load(folder, precision="float32"), Sft(), batches, lr=1e-3)
    found = steps(load(folder, precision="float32"), Sft(), batches, lr=1e-3)
    losses = share([r.loss for r in found], [r.loss for r in expected])
    norms = share([r.grad_norm for r in found], [r.grad_norm for r in expected])
    yield outcome(
        "4 bits, float32, 6 steps as dense on the CPU",
        "loss 1e-3, norm 1e-2",
        f"loss {losses:.1e}, norm {norms:.1e}",
        losses < 1e-3 and norms < 1e-2,
    )
    weights = {name: x.astype(mx.float16) for name, x in mx.load(str(loud() / "model.safetensors")).items()}
    half = FOLDER / "half"
    half.mkdir()
    (half / "config.json").write_text((loud() / "config.json").read_text())
    mx.save_safetensors(str(half / "model.safetensors"), weights, metadata={"format": "pt"})
    model = load(write_mlx_quantized(half, FOLDER / "half-quantized", 4), precision="auto")
    results = steps(model, Sft(), batches, lr=1e-3)
    kept = [result for result in results if not result.is_skipped]
    said = f"{model.info.precision}, loss {kept[0].loss:.3f} to {kept[-1].loss:.3f}, {6 - len(kept)} skipped"
    passes = model.info.precision == "float16" and kept[-1].loss < kept[0].loss
    yield outcome("4 bits with float16 scales, precision auto, 6 steps", "float16, falling", said, passes)
    sampling = Sampling(temperature=0.7, seed=1)
    start = time.perf_counter()
    answer = list(model.generate([1, 2, 3], max_new_tokens=64, stop_ids=frozenset(), sampling=sampling))
    rate = len(answer) / (time.perf_counter() - start)
    yield outcome("4 bits, an answer", "64 tokens", f"{len(answer)} tokens, {rate:.0f} a second", len(answer) == 64)


if __name__ == "__main__":
    CHECKS: dict[str, Check] = {
        "machine": machine,
        "parity": parity,
        "sixteen_bits": sixteen_bits,
        "first_preference_step": first_preference_step,
        "precisions": precisions,
        "resuming": resuming,
        "quantized": quantized,
        "optimizer": optimizer,
        "head_memory": head_memory,
        "shapes": shapes,
        "memory": memory,
        "speed": speed,
        "out_of_memory": out_of_memory,
    }
    run_all(CHECKS, sys.argv[1:])
