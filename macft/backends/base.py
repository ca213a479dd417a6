"""The seam between the training loop and a framework: numpy and Python floats on this side of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective

# canonical parameter name (as PEFT saves it) -> float32 array
State = dict[str, np.ndarray]

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapter. Weight of a target: W + scale * B A."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target: tuple[str, ...] = ("all",)  # "all", or module names or their last parts
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Under:
    """An adapter that becomes part of the base before anything else happens."""

    lora: LoraSpec
    state: State = field(repr=False)


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load and how."""

    folder: Path
    lora: LoraSpec | None  # None: no adapter
    under: Under | None = None
    full: bool = False  # every parameter is trained
    precision: str = "auto"  # auto, float32, bfloat16, float16
    quantization_bit: int | None = None  # 4 or 8
    gradient_checkpointing: bool = False
    max_length: int = 0  # longest example that will be asked for; 0: unknown
    packing: bool = False  # whether rows will hold several examples
    from_scratch: bool = False  # `folder` holds a config.json alone; weights are drawn with `seed`
    seed: int = 0


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled weight decay (arXiv 1711.05101) and clipping of the global norm."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping


@dataclass(frozen=True)
class LoadedModel:
    """What a backend did to load a model."""

    device: str
    precision: str
    trainable_parameters: int
    total_parameters: int
    target_modules: tuple[str, ...]  # full names of the modules that carry an adapter
    notes: tuple[str, ...] = ()  # what the user should be told: fallbacks, dequantization


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss, gradient norm before clipping, mean metrics."""

    loss: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Backend(Protocol):
    """A framework that can train and generate; the loop cannot tell one from another."""

    rank: int
    world_size: int

    def load(self, model: ModelSpec, optimizer: OptimizerSpec | None = None) -> LoadedModel:
        """Load a model, attach a fresh adapter; with `optimizer`, get ready to train."""

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, lr: float, step: int
    ) -> StepResult:
        """One optimizer step over all micro-batches; `step` seeds dropout."""

    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        """float32 [rows, T-1]: log-probability of each next token at `positions` (bool of that shape), 0 elsewhere."""

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """New token ids one by one, without the stop token."""

    def adapter_state(self) -> State:
        """The trained parameters: LoRA matrices in PEFT's names and layout, or the whole model."""

    def set_adapter_state(self, state: State) -> None:
        """Take trained parameters; raises ModelError listing names and shapes that do not fit."""

    def optimizer_state(self) -> State:
        """Moments as `NAME.exp_avg` and `NAME.exp_avg_sq`; empty before the first step."""

    def set_optimizer_state(self, state: State, step: int) -> None:
        """Take moments after `step` optimizer steps."""

    def peak_memory(self) -> int:
        """Largest memory in use so far, in bytes: of the device, or of the process on a CPU."""


def initial_lora_a(seed: int, name: str, rank: int, width: int) -> np.ndarray:
    """LoRA A [rank, width] of one parameter: uniform in +-1/sqrt(width), the same on every backend."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    bound = 1.0 / np.sqrt(width)
    return rng.uniform(-bound, bound, size=(rank, width)).astype(np.float32)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A seed for one micro-batch's dropout: a run that resumes draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1)[0])


def is_decayed(shape: Sequence[int]) -> bool:
    """Weight decay is for matrices: biases, norms and DoRA magnitudes are left alone."""
    return len(shape) > 1


NOT_TARGETS = frozenset({"gate", "router", "shared_expert_gate", "lm_head"})


def select_targets(linears: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Full names of the linear modules that `lora_target` asks for.

    `linears` are the linear modules inside the blocks. `all` leaves out routers.
    Returns names in the model's order; an entry that matches nothing gives KeyError(entry).
    """
    if tuple(expected) == ("all",):
        return [name for name in linears if name.rsplit(".", 1)[-1] not in NOT_TARGETS]
    chosen = set()
    for entry in expected:
        matches = [name for name in linears if name == entry or name.endswith("." + entry)]
        if not matches:
            raise KeyError(entry)
        chosen.update(matches)
    return [name for name in linears if name in chosen]
