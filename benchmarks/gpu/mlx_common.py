"""Load random models on MLX's GPU and take steps with them."""

from __future__ import annotations

import gc
import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.models import HALF_BILLION
from benchmarks.gpu.table import SkipCheck

FOLDER = Path(tempfile.mkdtemp(prefix="macft-gpu-"))
GB = 1e9


def mlx_or_skip():
    """The module mlx.core, where it computes on a GPU."""
    try:
        # first: it says which BLAS MLX loads, and how products in float32 are computed
        importlib.import_module("macft.backends.mlx")
        import mlx.core as mx
        import mlx_lm  # noqa: F401
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
    from support.engines import load_model

    from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec

    gc.collect()
    return load_model("mlx", ModelSpec(folder, LoraSpec(8, 16), precision=precision, **options), OptimizerSpec())


def steps(model, objective, batches, lr: float = 1e-4, start: int = 0):
    """The results of a step on each batch."""
    from support.engines import train_step

    return [train_step(model, objective, [batch], lr=lr, step=start + i) for i, batch in enumerate(batches)]


def share(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(found, expected, strict=True))


def tiny(name: str) -> Path:
    """A small model, written once."""
    from support.tiny_models import write_model

    folder = FOLDER / f"tiny-{name}"
    return folder if folder.exists() else write_model(folder, name)


def loud() -> Path:
    """A model whose logits are as far apart as a trained model's."""
    from support.loud_models import write_loud_model

    folder = FOLDER / "loud"
    return folder if folder.exists() else write_loud_model(folder, max_position_embeddings=2048)


def half_billion() -> Path:
    """Random weights in the shape of Qwen2.5-0.5B, written once."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen2 import Model, ModelArgs

    folder = FOLDER / "0.5B"
    if folder.exists():
        return folder
    folder.mkdir()
    config = {"model_type": "qwen2", **HALF_BILLION, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: x.shape for name, x in tree_flatten(Model(ModelArgs.from_dict(config)).parameters())}
    weights = {name: (0.02 * mx.random.normal(shape)).astype(mx.bfloat16) for name, shape in shapes.items()}
    weights |= {name: mx.ones_like(x) for name, x in weights.items() if "norm" in name}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder
