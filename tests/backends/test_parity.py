"""One configuration, two engines, one curve: losses, gradient norms and adapters of MLX and PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.engines import load_model, train_step
from support.tiny_models import ARCHITECTURES, ROPE_THETA, random_examples, steps_of, write_mlx_quantized, write_model

from macft.backends.base import LoraSpec, ModelSpec, OptimizerSpec, State
from macft.objectives.losses import Sft

pytestmark = [pytest.mark.mlx, pytest.mark.torch]

STEPS = 50
LR = 1e-3
LORA = LoraSpec(rank=4, alpha=8)
# clipping is active: norms of these models are far above 0.5
OPTIMIZER = OptimizerSpec(weight_decay=0.1, max_grad_norm=0.5)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Curve:
    losses: np.ndarray
    norms: np.ndarray
    adapter: State


def run(
    engine: str,
    folder: Path,
    *,
    optimizer: OptimizerSpec = OPTIMIZER,
    lora: LoraSpec | None = LORA,
    batch_size: int = 4,
    accumulation: int = 1,
    steps: int = STEPS,
    **spec,
) -> Curve:
    """Train on 12 random rows again and again, some longer than the sliding window; the rate falls."""
    backend = load_model(engine, ModelSpec(folder=folder, lora=lora, seed=7, precision="float32", **spec), optimizer)
    assert backend.info.precision == "float32"
    examples = (random_examples(12, seed=3) * steps)[: steps * 4]
    results = [
        train_step(backend, Sft(), micro_batches, lr=LR * (1 - step / steps), step=step)
        for step, micro_batches in enumerate(steps_of(examples, batch_size, accumulation))
    ]
    return Curve(
        np.array([result.loss for result in results]),
        np.array([result.grad_norm for result in results]),
        backend.trained_state(),
    )


def distance(a: Curve, b: Curve) -> tuple[float, float, float]:
    """Largest relative differences of losses and norms, and of adapters relative to their largest entry."""
    assert a.adapter.keys() == b.adapter.keys()
    largest = max(float(np.abs(value).max()) for value in a.adapter.values())
    adapters = max(float(np.abs(a.adapter[name] - b.adapter[name]).max()) for name in a.adapter)
    return (
        float(np.max(np.abs(a.losses - b.losses) / a.losses)),
        float(np.max(np.abs(a.norms - b.norms) / a.norms)),
        adapters / largest,
    )


@pytest.fixture(scope="module")
def torch_curve(tiny_model):
    """The PyTorch curve of an architecture, trained once."""
    curves: dict[str, Curve] = {}

    def get(architecture: str) -> Curve:
        if architecture not in curves:
            curves[architecture] = run("torch", tiny_model(architecture))
        return curves[architecture]

    return get


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gemma3_text")) for name in ARCHITECTURES],
)
def test_both_engines_give_one_curve_over_50_steps(architecture, tiny_model, torch_curve):
    ours = run("mlx", tiny_model(architecture))
    losses, norms, adapters = distance(torch_curve(architecture), ours)
    assert losses < TOLERANCE
    assert norms < TOLERANCE
    assert adapters < 1e-4
    assert ours.losses[-10:].mean() < ours.losses[:10].mean(), "nothing was learned: the test would be blind"


MUTATIONS = {
    "another beta2": replace(OPTIMIZER, beta2=0.99),
    "no weight decay": replace(OPTIMIZER, weight_decay=0.0),
    "no clipping": replace(OPTIMIZER, max_grad_norm=0.0),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices_a_wrong_optimizer(name, tiny_model, torch_curve):
    wrong = run("mlx", tiny_model("llama"), optimizer=MUTATIONS[name])
    assert max(distance(torch_curve("llama"), wrong)[:2]) > 10 * TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_notices_a_wrong_rope_base(architecture, tmp_path, torch_curve):
    wrong = write_model(tmp_path, architecture, rope_theta=ROPE_THETA / 12)
    assert max(distance(torch_curve(architecture), run("mlx", wrong))[:2]) > 10 * TOLERANCE


def test_the_comparison_notices_a_wrong_window(tmp_path, torch_curve):
    wrong = write_model(tmp_path, "gemma3_text", sliding_window=64)
    assert max(distance(torch_curve("gemma3_text"), run("mlx", wrong))[:2]) > 10 * TOLERANCE


@pytest.mark.parametrize("engine", ["mlx", "torch"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_curve(engine, accumulation, tiny_model, torch_curve):
    split = run(engine, tiny_model("llama"), batch_size=4 // accumulation, accumulation=accumulation)
    losses, norms, adapters = distance(torch_curve("llama"), split)
    assert losses < TOLERANCE
    assert norms < TOLERANCE
    assert adapters < 1e-4


VARIANTS = {
    "rslora": {"lora": replace(LORA, alpha=4, use_rslora=True)},
    "dora": {"lora": replace(LORA, use_dora=True)},
    "some targets": {"lora": replace(LORA, target=("q_proj", "down_proj"))},
    "checkpointed": {"gradient_checkpointing": True},
    "4 bits": {"quantization_bit": 4},
    "8 bits": {"quantization_bit": 8},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_engines_agree_on_every_kind_of_adapter(name, tiny_model):
    folder, options = tiny_model("qwen2"), VARIANTS[name]
    losses, norms, adapters = distance(
        run("torch", folder, steps=20, **options), run("mlx", folder, steps=20, **options)
    )
    assert losses < TOLERANCE
    assert norms < TOLERANCE
    assert adapters < 1e-4


def test_checkpointing_changes_no_number(tiny_model):
    folder = tiny_model("gemma3_text")
    plain = run("mlx", folder, steps=8)
    checkpointed = run("mlx", folder, steps=8, gradient_checkpointing=True)
    assert max(distance(plain, checkpointed)) < 1e-6


def test_engines_agree_on_full_fine_tuning(tiny_model):
    folder = tiny_model("qwen2")
    curves = [run(engine, folder, lora=None, full=True, steps=20) for engine in ("torch", "mlx")]
    losses, norms, parameters = distance(*curves)
    assert losses < TOLERANCE
    assert norms < 2 * TOLERANCE
    assert parameters < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_an_mlx_quantized_folder_gives_one_curve_on_both_engines(bits, tiny_model, tmp_path):
    write_mlx_quantized(tiny_model("llama"), tmp_path / "q", bits)
    curves = [run(engine, tmp_path / "q", steps=20) for engine in ("torch", "mlx")]
    losses, norms, adapters = distance(*curves)
    assert losses < TOLERANCE
    assert norms < TOLERANCE
    assert adapters < 1e-4
