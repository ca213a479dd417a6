"""Check the MLX engine on a GPU: Metal, or CUDA where MLX's wheel for it is installed."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.gpu.models import HALF_BILLION, ROOT, flops_per_token, packed_rows, whole_rows
from benchmarks.gpu.table import Check, Row, SkipCheck, measured, outcome, run_all

FOLDER = Path(tempfile.mkdtemp(prefix="macft-gpu-"))
GB = 1e9
assert ROOT


def mlx_or_skip():
    """The module mlx.core, where it computes on a GPU."""
    try:
        # isort: split
        import mlx.core as mx
        import mlx_lm  # noqa: F401

        import macft.backends.mlx  # noqa: F401
    except ImportError as error:
        raise SkipCheck(f"mlx is not installed: {error}") from None
    if mx.default_device() != mx.Device(mx.gpu):
        raise SkipCheck(f"this build of MLX {mx.__version__} computes on the CPU")
    return mx


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU within the block."""
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(mx.Device(mx.gpu))


def load(folder: Path, *, precision: str = "bfloat16", **options):
    """A model with an adapter, ready to train."""
    import mlx.core as mx
    from support.engines import load_model

    from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec

    mx.clear_cache()
    return load_model("mlx", ModelSpec(folder, LoraSpec(8, 16), precision=precision, **options), OptimizerSpec())


def steps(model, objective, batches, lr: float = 1e-4):
    """The results of a step on each batch."""
    from support.engines import train_step

    return [train_step(model, objective, [batch], lr=lr, step=index) for index, batch in enumerate(batches)]


def share(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(found, expected, strict=True))


def machine() -> Iterator[Row]:
    """What the device is."""
    mx = mlx_or_skip()
    from importlib.metadata import version

    info = mx.device_info()
    yield measured("device", "", ", ".join(f"{key} {value}" for key, value in info.items())[:160])
    yield measured("versions", "", f"mlx {mx.__version__}, mlx-lm {version('mlx-lm')}")


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


def tiny(name: str) -> Path:
    """A small model, written once."""
    from support.tiny_models import write_model

    folder = FOLDER / f"tiny-{name}"
    return folder if folder.exists() else write_model(folder, name)


def loud() -> Path:
    """A model whose logits are as far apart as a trained model's."""
    from support.loud_models import write_loud_model

    folder = FOLDER / "loud"
    return folder if folder.exists() else write_loud_model(folder)


def sixteen_bits() -> Iterator[Row]:
    """What a loud model can do is found out in bfloat16."""
    mlx_or_skip()
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


def precisions() -> Iterator[Row]:
    """Steps in 16 bits beside float32, compiled and packed."""
    mlx_or_skip()
    from macft.objectives.losses import Sft

    for kind, batches in (
        ("rows", [whole_rows(2, 64, seed) for seed in range(12)]),
        ("packed", [packed_rows(2, 4, 20, seed) for seed in range(12)]),
    ):
        options = {"packing": kind == "packed"}
        expected = steps(load(loud(), precision="float32", **options), Sft(), batches)
        for precision in ("bfloat16", "float16"):
            found = steps(load(loud(), precision=precision, **options), Sft(), batches)
            kept = [(a, b) for a, b in zip(found, expected, strict=True) if not a.is_skipped]
            loss = max(abs(a.loss - b.loss) / b.loss for a, b in kept)
            norm = max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in kept)
            yield outcome(
                f"{precision} beside float32, 12 steps, {kind}",
                "loss within 2 %, norm within 10 %",
                f"loss {100 * loss:.2f} %, norm {100 * norm:.1f} %, {12 - len(kept)} skipped",
                loss < 0.02 and norm < 0.1,
            )


def quantized() -> Iterator[Row]:
    """Steps on a base of 4 bits, and its answers."""
    mlx_or_skip()
    from macft.backends.base import Sampling
    from macft.objectives.losses import Sft

    model = load(loud(), quantization_bit=4)
    results = steps(model, Sft(), [whole_rows(2, 64)] * 10, lr=1e-3)
    losses = f"{results[0].loss:.3f} to {results[-1].loss:.3f}"
    yield outcome("4 bits, 10 steps", "falling", losses, results[-1].loss < results[0].loss)
    answer = list(
        model.generate([1, 2, 3], max_new_tokens=16, stop_ids=frozenset(), sampling=Sampling(temperature=0.7, seed=1))
    )
    yield outcome("4 bits, an answer", "16 tokens", f"{len(answer)} tokens", len(answer) == 16)


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
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        steps(model, Sft(), [whole_rows(1, length)])
        peaks.append((mx.get_peak_memory() - start) / GB)
    found = f"{peaks[0]:.2f} and {peaks[1]:.2f} GB for 1024 and 4096 rows of 49152 logits"
    yield outcome("head in chunks", "less than 3 times as much", found, peaks[1] < 3 * peaks[0])


def speed() -> Iterator[Row]:
    """Tokens per second of 0.5B."""
    mx = mlx_or_skip()
    from transformers import AutoConfig

    from macft.objectives.losses import Sft

    folder = FOLDER / "0.5B"
    folder.mkdir()
    AutoConfig.for_model("qwen2", **HALF_BILLION).save_pretrained(folder)
    a, b = (mx.random.normal((8192, 8192)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a @ b)
    start = time.perf_counter()
    mx.eval([a @ b for _ in range(10)])
    rate = 10 * 2 * 8192**3 / (time.perf_counter() - start)
    for rows, length in ((4, 512), (8, 1024)):
        model = load(write_random(folder), max_length=length)
        batch = whole_rows(rows, length)
        steps(model, Sft(), [batch] * 2)
        mx.reset_peak_memory()
        start = time.perf_counter()
        steps(model, Sft(), [batch] * 4)
        tokens = 4 * rows * length / (time.perf_counter() - start)
        used = tokens * flops_per_token(HALF_BILLION, length) / rate
        yield measured(
            f"bf16, 0.5B, {rows} x {length}",
            "",
            f"{tokens:,.0f} tokens/s, {100 * used:.0f} % of {rate / 1e12:.0f} TFLOP/s, "
            f"{mx.get_peak_memory() / GB:.1f} GB",
        )


def write_random(folder: Path) -> Path:
    """Random weights beside a config.json."""
    import json

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    if (folder / "model.safetensors").exists():
        return folder
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = {
        name: (0.02 * mx.random.normal(x.shape)).astype(mx.bfloat16) for name, x in tree_flatten(model.parameters())
    }
    weights |= {name: mx.ones_like(x) for name, x in weights.items() if "norm" in name}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


CHECKS: dict[str, Check] = {
    "machine": machine,
    "parity": parity,
    "sixteen_bits": sixteen_bits,
    "precisions": precisions,
    "quantized": quantized,
    "head_memory": head_memory,
    "speed": speed,
}

if __name__ == "__main__":
    run_all(CHECKS, sys.argv[1:])
