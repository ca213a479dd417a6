"""Check the PyTorch engine on CUDA."""

from __future__ import annotations

import gc
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from benchmarks.gpu.models import parameters, whole_rows
from benchmarks.gpu.table import Check, Row, SkipCheck, measured, outcome, run_all
from benchmarks.gpu.torch_common import (
    FOLDER,
    GB,
    SHAPES,
    fitting,
    folder_of,
    load,
    matmul_rate,
    native,
    on_cpu,
    share,
    sixteen,
    steps,
    torch_or_skip,
)


def machine() -> Iterator[Row]:
    """What the device is, and how fast its products and copies are."""
    torch = torch_or_skip()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / GB
    yield measured("device", "", f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GB, driver {driver}")
    import peft
    import transformers

    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    yield measured("versions", "", f"{versions}, transformers {transformers.__version__}, peft {peft.__version__}")
    yield measured(f"matmul, {native()}, 8192^3", "650-800 TFLOP/s on H100", f"{matmul_rate() / 1e12:.0f} TFLOP/s")


def parity() -> Iterator[Row]:
    """Ten float32 steps of small models on the GPU and on the CPU."""
    torch_or_skip()
    from support.tiny_models import ARCHITECTURES, random_examples, random_pairs, steps_of, write_model

    from macft.data.batches import collate
    from macft.data.tokenization.table import Reference
    from macft.objectives.losses import Sft
    from macft.objectives.preference import Preference

    pairs = [replace(p, reference=Reference(-20.0 - i, -18.0 + i, 3.0)) for i, p in enumerate(random_pairs(20, seed=1))]
    sft = [batch for step in steps_of(random_examples(40, seed=1), 4, 1) for batch in step]
    dpo = [collate(pairs[i : i + 2]) for i in range(0, 20, 2)]
    cases = [(name, "sft", Sft(), sft, 1e-4) for name in ARCHITECTURES] + [("llama", "dpo", Preference(), dpo, 5e-4)]
    for name, what, objective, batches, limit in cases:
        folder = FOLDER / f"tiny-{name}"
        if not folder.exists():
            write_model(folder, name)
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


def loading() -> Iterator[Row]:
    """Memory of device and host while a model is loaded."""
    torch = torch_or_skip()
    for name in fitting():
        folder = folder_of(name)
        gc.collect()
        torch.cuda.empty_cache()
        before, host = torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        model = load(folder, optimizer=False)
        seconds = time.perf_counter() - start
        device = torch.cuda.memory_allocated() - before
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - host
        expected = 2 * parameters(SHAPES[name])
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        del model
        yield outcome(
            f"loading {name}",
            f"{expected / GB:.2f} GB on the device, host below 1.2 x {largest / GB:.1f} GB",
            f"{device / GB:.2f} GB, host {host / GB:.1f} GB more, {seconds:.1f} s",
            abs(device / expected - 1) < 0.03 and host < 1.2 * largest + 0.5 * GB,
        )


def sixteen_bits() -> Iterator[Row]:
    """What a loud model can do is found out in 16 bits; packing that is broken is refused."""
    torch = torch_or_skip()
    from macft.backends.probes import probe_packed, probe_pairs
    from macft.backends.torch.split import SplitModel

    model = load(folder_of("loud"), packing=True)
    split = model._split
    shares = []
    for first, second in (probe_packed(), probe_pairs()):
        with torch.no_grad(), torch.autocast("cuda", sixteen()):
            a, b = split.logits(first), split.logits(second)
        shares.append(float(np.sqrt(np.mean(np.square(a - b))) / b.std()))
    found = (
        f"splits {split.splits}, packs {split.packs} ({shares[0]:.3f}), shares {split.shares_prompts} ({shares[1]:.3f})"
    )
    passes = split.splits and split.packs and split.shares_prompts and max(shares) < 0.1
    yield outcome(f"{native()}, loud model", "splits, packs, shares, rms below 0.1", found, passes)
    before = SplitModel.hidden

    def broken(self, layout):
        return before(self, {k: v for k, v in layout.items() if k not in ("positions", "bounds")})

    with patch.object(SplitModel, "hidden", broken):
        refused = not load(folder_of("loud"), packing=True)._split.packs
    yield outcome(f"{native()}, rows that see each other", "refused", "refused" if refused else "accepted", refused)
    kind = "variable-length" if split.uses_varlen else "masked"
    yield measured("attention of packed rows", "variable-length from sm_80 on", kind)


def precisions() -> Iterator[Row]:
    """20 steps of 0.5B in 16 bits beside float32."""
    torch_or_skip()
    from macft.objectives.losses import Sft

    batches = [whole_rows(2, 256, seed) for seed in range(20)]
    folder = folder_of("0.5B")
    expected = steps(load(folder, precision="float32"), Sft(), batches)
    for precision in dict.fromkeys([native(), "float16"]):
        found = steps(load(folder, precision=precision), Sft(), batches)
        kept = [(a, b) for a, b in zip(found, expected, strict=True) if not a.is_skipped]
        loss = max(abs(a.loss - b.loss) for a, b in kept)
        norm = max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in kept[1:])
        yield outcome(
            f"{precision} beside float32, 20 steps of 0.5B",
            "loss within 0.02, norm within 5 %",
            f"loss {loss:.4f}, norm {100 * norm:.1f} %, {20 - len(kept)} skipped",
            loss < 0.02 and norm < 0.05 and all(math.isfinite(r.loss) for r in found),
        )


def first_preference_step() -> Iterator[Row]:
    """The first DPO step in 16 bits, its reference computed in other batches."""
    torch_or_skip()
    from support.tiny_models import random_pairs

    from macft.data.batches import collate
    from macft.data.tokenization.table import Reference
    from macft.errors import MacftError
    from macft.objectives.preference import Preference, answer_positions, reference_columns
    from macft.training.checks.first_step import check_start

    for precision, count, length in (("float32", 8, 512), (native(), 8, 512), (native(), 1, 1024)):
        model = load(folder_of("loud"), precision=precision)
        pairs = random_pairs(count, seed=1, prompt=(length // 4, length // 4), answer=(length // 2, 3 * length // 4))
        done = []
        for pair in pairs:
            alone = collate([pair])
            columns = reference_columns(model.logps(alone, answer_positions(alone, with_prompt=False)), alone, None)
            done.append(replace(pair, reference=Reference(*(float(column[0]) for column in columns))))
        batch = collate(done)
        result = steps(model, Preference(), [batch])[0]
        try:
            said = check_start(Preference(), result, [batch], precision) or "passes in silence"
        except MacftError as error:
            said = str(error)
        off = result.loss - math.log(2)
        rewards = " and ".join(f"{result.metrics[f'rewards/{side}']:+.4f}" for side in ("chosen", "rejected"))
        yield outcome(
            f"{precision}, first dpo step, {count} x {length}",
            "passes in silence",
            f"{said[:60]}, loss off by {off:+.6f}, rewards {rewards}",
            said == "passes in silence",
        )


def generation() -> Iterator[Row]:
    """Greedy tokens as on the CPU, and their speed."""
    torch = torch_or_skip()
    from macft.backends.base import Sampling

    prompt = whole_rows(1, 32).tokens[0].tolist()
    options = {"max_new_tokens": 128, "stop_ids": frozenset(), "sampling": Sampling()}
    with on_cpu():
        expected = list(load(folder_of("loud"), precision="float32", optimizer=False).generate(prompt, **options))
    found = list(load(folder_of("loud"), precision="float32", optimizer=False).generate(prompt, **options))
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    yield outcome("float32, 128 greedy tokens as on the CPU", "128 equal", f"{same} equal", same == 128)
    for name in fitting():
        least = {"0.5B": 10, "3B": 8}[name]
        model = load(folder_of(name), optimizer=False)
        list(model.generate(prompt, **options | {"max_new_tokens": 8}))
        torch.cuda.synchronize()
        start = time.perf_counter()
        count = len(list(model.generate(prompt, **options)))
        rate = count / (time.perf_counter() - start)
        yield outcome(
            f"{native()}, {name} with an adapter answers",
            f"above {least} tokens/s",
            f"{rate:.0f} tokens/s",
            rate > least,
        )


def resuming() -> Iterator[Row]:
    """A run that goes on from its state has the losses it would have had."""
    torch_or_skip()
    from macft.objectives.losses import Sft

    for precision in dict.fromkeys([native(), "float16"]):
        batches = [whole_rows(2, 128, seed) for seed in range(8)]
        model = load(folder_of("0.5B"), precision=precision)
        steps(model, Sft(), batches[:3], lr=1e-3)
        state, moments = model.trained_state(), model.optimizer_state()
        expected = steps(model, Sft(), batches[3:], lr=1e-3, start=3)
        del model
        resumed = load(folder_of("0.5B"), precision=precision)
        resumed.set_trained_state(state)
        resumed.set_optimizer_state(moments, 3)
        found = steps(resumed, Sft(), batches[3:], lr=1e-3, start=3)
        off = max(abs(a.loss - b.loss) for a, b in zip(found, expected, strict=True))
        yield outcome(f"{precision}, resumed after 3 steps", "5 losses within 1e-2", f"within {off:.1e}", off < 1e-2)


def quantized() -> Iterator[Row]:
    """Steps on a base of 4 and 8 bits."""
    torch = torch_or_skip()
    try:
        import bitsandbytes
    except ImportError:
        raise SkipCheck("bitsandbytes is not installed") from None
    from macft.objectives.losses import Sft

    batches = [whole_rows(2, 256, 0)] * 10
    first = steps(load(folder_of("0.5B")), Sft(), batches[:1])[0].loss
    for bits in (4, 8):
        model = load(folder_of("0.5B"), quantization_bit=bits)
        weights = torch.cuda.memory_allocated() / GB
        state = model.trained_state()
        model.set_trained_state(state)
        same = all(np.array_equal(value, state[name]) for name, value in model.trained_state().items())
        results = steps(model, Sft(), batches, lr=1e-3)
        yield outcome(
            f"{bits} bits (bitsandbytes {bitsandbytes.__version__}), 10 steps of 0.5B",
            f"first loss within 0.15 of {first:.3f}, falling, state bit-equal",
            f"{results[0].loss:.3f} to {results[-1].loss:.3f}, {'equal' if same else 'differs'}, {weights:.2f} GB",
            abs(results[0].loss - first) < 0.15 and results[-1].loss < results[0].loss and same,
        )


def refusals() -> Iterator[Row]:
    """Several processes are refused until they are served."""
    torch_or_skip()
    command = [sys.executable, "-m", "macft", "train", "configs/quickstart.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "2"})
    said = (ran.stderr.strip().splitlines() or [""])[-1]
    yield outcome("WORLD_SIZE=2", "refused in one line", said[:100], ran.returncode == 2 and "WORLD_SIZE" in said)


if __name__ == "__main__":
    from benchmarks.gpu.torch_speed import attention, full, memory, shapes, speed, trl

    CHECKS: dict[str, Check] = {
        "machine": machine,
        "parity": parity,
        "sixteen_bits": sixteen_bits,
        "first_preference_step": first_preference_step,
        "loading": loading,
        "precisions": precisions,
        "resuming": resuming,
        "quantized": quantized,
        "generation": generation,
        "shapes": shapes,
        "attention": attention,
        "memory": memory,
        "full": full,
        "speed": speed,
        "trl": trl,
        "refusals": refusals,
    }
    run_all(CHECKS, sys.argv[1:])
