"""Load random models on CUDA and take steps with them."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

from benchmarks.gpu.models import HALF_BILLION, THREE_BILLION, parameters, write_shape
from benchmarks.gpu.table import SkipCheck

FOLDER = Path(tempfile.mkdtemp(prefix="macft-gpu-"))
GB = 1e9
SHAPES = {"0.5B": HALF_BILLION, "3B": THREE_BILLION}


def torch_or_skip():
    """The module torch, where it sees a GPU."""
    try:
        import torch
    except ImportError:
        raise SkipCheck("torch is not installed") from None
    if not torch.cuda.is_available():
        raise SkipCheck(f"torch {torch.__version__} sees no CUDA device")
    from macft.backends.nvidia import growing_segments

    with growing_segments():
        torch.cuda.init()
    return torch


@cache
def sixteen():
    """The 16-bit type that this GPU computes in: float16 where it has no bfloat16."""
    from macft.backends.torch.device import compute_dtype, pick_device

    return compute_dtype("auto", pick_device(), [])


def native() -> str:
    """Its name."""
    return str(sixteen()).removeprefix("torch.")


def fitting(others: float = 2 * GB) -> list[str]:
    """The named models whose weights in 16 bits fit beside so many other bytes."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return [name for name, shape in SHAPES.items() if 2 * parameters(shape) + others <= free]


@contextmanager
def on_cpu() -> Iterator[None]:
    """Load models on the CPU within the block."""
    import torch

    from macft.backends.torch import model

    with patch.object(model, "pick_device", lambda: torch.device("cpu")):
        yield


def load(folder: Path, *, precision: str | None = None, rank: int = 8, optimizer: bool = True, **options):
    """A model with an adapter, ready to train, on the GPU that is free of the one before."""
    import torch
    from support.engines import load_model

    from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec

    gc.collect()
    torch.cuda.empty_cache()
    lora = None if options.get("full") else options.pop("lora", LoraSpec(rank, 2 * rank))
    spec = ModelSpec(folder, lora, precision=precision or native(), **options)
    return load_model("torch", spec, OptimizerSpec() if optimizer else None)


def steps(model, objective, batches, lr: float = 1e-4, start: int = 0):
    """The results of a step on each batch."""
    from support.engines import train_step

    return [train_step(model, objective, [b], lr=lr, step=start + i) for i, b in enumerate(batches)]


def folder_of(name: str) -> Path:
    """The folder of a named model, written once."""
    from support.loud_models import write_loud_model

    path = FOLDER / name
    if path.exists():
        return path
    if name in SHAPES:
        return write_shape(path, SHAPES[name], "cuda")
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    return write_loud_model(path, **wide, max_position_embeddings=4096)


def share(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(found, expected, strict=True))


def matmul_rate() -> float:
    """FLOP/s of large products in 16 bits."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=sixteen()) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def timed(model, batch, count: int = 4) -> float:
    """Seconds of a step, after two that warm up."""
    import torch

    from macft.objectives.losses import Sft

    steps(model, Sft(), [batch] * 2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    steps(model, Sft(), [batch] * count)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count
