"""Define the contract of the training loop and an engine, which exchange numpy arrays and Python floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ProcessGroup
from macft.weights.adapters.peft import State  # a parameter's name, as PEFT saves it -> float32 array


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
class MergedAdapter:
    """An adapter that becomes part of the base before anything else happens."""

    lora: LoraSpec
    state: State = field(repr=False)


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load and how."""

    folder: Path
    lora: LoraSpec | None  # None: no adapter
    merged_adapter: MergedAdapter | None = None
    full: bool = False  # every parameter is trained
    precision: str = "auto"  # auto, float32, bfloat16, float16
    quantization_bit: int | None = None  # 4 or 8
    gradient_checkpointing: bool = False
    max_length: int = 0  # of the longest example to come; 0: unknown
    row_length: int = 0  # of the longest row, packed or not; 0: unknown
    rows_per_example: int = 1  # 2 for the two answers of a pair, which are computed together
    packing: bool = False  # whether rows will hold several examples
    from_scratch: bool = False  # `folder` holds only a config.json; weights are drawn with `seed`
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
class ModelInfo:
    """What an engine did to load a model."""

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
    is_skipped: bool = False  # float16 gradients overflowed: nothing was updated, and the loss scale was halved


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Trainable(Protocol):
    """A model that can be trained; only one that was loaded with an OptimizerSpec takes steps."""

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, weight: float, lr: float, step: int
    ) -> StepResult:
        """Take one optimizer step over all micro-batches of this process.

        The loss is their sum divided by `weight`, that of all processes' micro-batches. `step` seeds dropout.
        """

    def trained_state(self) -> State:
        """The trained parameters: LoRA matrices in PEFT's names and layout, or the whole model."""

    def set_trained_state(self, state: State) -> None:
        """Replace the trained parameters; raises ModelError listing names and shapes that do not fit."""

    def optimizer_state(self) -> State:
        """Moments as `NAME.exp_avg` and `NAME.exp_avg_sq`, empty before the first step; in float16 `loss_scale` too."""

    def set_optimizer_state(self, state: State, step: int) -> None:
        """Replace the moments by those after `step` optimizer steps."""

    def peak_memory(self) -> int:
        """Largest memory in use so far, in bytes: of the device, or of the process on a CPU."""


class Scores(Protocol):
    """A model that says how likely tokens are."""

    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        """float32 [rows, T-1]: log-probability of each next token at `positions` (bool of that shape), 0 elsewhere."""

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: the logits after each of these tokens."""


class Generates(Protocol):
    """A model that continues a prompt."""

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """Yield new token ids one by one, without the stop token."""


class Model(Trainable, Scores, Generates, Protocol):
    """A loaded model; its users cannot tell one engine from another."""

    @property
    def info(self) -> ModelInfo:
        """What was done to load it."""


class EngineModule(Protocol):
    """The module of an engine, as `macft.engines.BACKENDS` names it."""

    def load(self, spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> Model:
        """Load a model and attach a fresh adapter; with `optimizer`, get ready to train."""


class LogitsModule(Protocol):
    """The second module of an engine, which computes logits to verify a conversion with."""

    def logits(self, folder: Path, adapters: Sequence[MergedAdapter | Path], tokens: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: the logits of a model folder with adapters on it, computed in float32.

        An adapter given as a folder is read and attached by the engine's own library. Where the engine reads
        litgpt checkpoints, `folder` may be one.
        """
