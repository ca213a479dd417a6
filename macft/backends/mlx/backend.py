"""The MLX backend: one optimizer step, log-probabilities, generation and state behind the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.backends.base import (
    LoadedModel,
    ModelSpec,
    OptimizerSpec,
    Sampling,
    State,
    StepResult,
    dropout_seed,
)
from macft.backends.batch_layout import CPU_TOKENS_AT_ONCE, lay_out, packing_note, pad_batch, passes
from macft.backends.mlx import generate as generation
from macft.backends.mlx import lora
from macft.backends.mlx import model as models
from macft.backends.mlx.split import split
from macft.backends.mlx.step import (
    AdamW,
    Columns,
    GradientStep,
    Parameters,
    cast,
    clip,
    gradient_step,
    place,
    token_logps,
)
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.system import peak_process_memory

# On a GPU the step is compiled; shapes are padded to multiples of this, so that few are compiled.
# On a CPU compiling halves the speed (measured), so shapes stay as they are.
COMPILED_SHAPE_MULTIPLE = 32
# mx.compile never forgets a shape, and Metal runs out of buffers after very many.
MAX_COMPILED_SHAPES = 48


class MlxBackend:
    """Trains and generates with mlx-lm models, on Metal or on the CPU."""

    rank = 0
    world_size = 1

    def load(self, model: ModelSpec, optimizer: OptimizerSpec | None = None) -> LoadedModel:
        """See `Backend.load`."""
        loaded = models.load(model)
        self._model, self._dtype = loaded.model, loaded.dtype
        self._seed = model.seed
        targets: list[str] = []
        self._dropout: lora.Dropout | None = None
        if model.under is not None:
            lora.merge(self._model, model.under)
        if model.lora is not None:
            targets, self._dropout = lora.attach(self._model, model.lora, model.seed)
        elif not model.full:
            self._model.freeze()
        self._layers = len(targets)
        self._drops = model.lora is not None and model.lora.dropout > 0
        self._split = split(
            self._model,
            head_is_frozen=not model.full,
            may_share=not model.gradient_checkpointing,
            may_pack=model.packing and loaded.rope_problem is None,
            tolerance=1e-4 if self._dtype == mx.float32 and not models.on_gpu() else 2e-2,
        )
        notes = list(loaded.notes)
        if self._split.trunk is None:
            notes.append("this architecture hides its head: logits are computed at every position")
        if model.packing and not self._split.packs:
            notes.append(packing_note(loaded.rope_problem))
        if model.gradient_checkpointing:
            models.checkpoint_layers(self._model)
        self._masters = _trainable(self._model)
        self._optimizer = AdamW(optimizer or OptimizerSpec())
        self._steps: dict[Objective, tuple[GradientStep, GradientStep]] = {}
        self._shapes: set[tuple[int, ...]] = set()
        self._compiles = models.on_gpu()
        self._multiple = COMPILED_SHAPE_MULTIPLE if self._compiles else 1
        self._tokens_at_once = None if models.on_gpu() else CPU_TOKENS_AT_ONCE
        self._place_masters()
        if mx.metal.is_available():
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        trainable, total = models.count_parameters(self._model)
        return LoadedModel(
            device="Metal" if models.on_gpu() else "CPU",
            precision=str(self._dtype).rsplit(".", 1)[-1],
            trainable_parameters=trainable,
            total_parameters=total,
            target_modules=tuple(targets),
            notes=tuple(notes),
        )

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, lr: float, step: int
    ) -> StepResult:
        """See `Backend.train_step`."""
        self._model.train()
        scale = mx.array(1.0 / sum(objective.weight(batch) for batch in micro_batches))
        loss = mx.array(0.0)
        metrics: dict[str, mx.array] = {}
        gradients: Parameters | None = None
        packs = self._split.packs
        parts = (part for batch in micro_batches for part in passes(batch, self._tokens_at_once, packs=packs))
        for index, batch in enumerate(parts):
            keys = None
            if self._drops:
                keys = lora.dropout_keys(dropout_seed(self._seed, step, index, self.rank), self._layers)
            value, more, new = self._gradients(objective, batch, keys, scale)
            loss = loss + value
            metrics = {name: metrics.get(name, 0.0) + amount for name, amount in more.items()}
            gradients = new if gradients is None else {path: gradients[path] + g for path, g in new.items()}
            mx.eval(loss, metrics, gradients)
        assert gradients is not None, "a step without micro-batches"
        gradients, norm = clip(gradients, self._optimizer.spec.max_grad_norm)
        self._masters = self._optimizer.update(self._masters, gradients, lr)
        mx.eval(norm, self._masters, self._optimizer.exp_avg, self._optimizer.exp_avg_sq)
        self._place_masters()
        return StepResult(_float(loss), _float(norm), {name: _float(value) for name, value in metrics.items()})

    def _gradients(
        self, objective: Objective, batch: NumpyBatch, keys: mx.array | None, scale: mx.array
    ) -> tuple[mx.array, dict[str, mx.array], Parameters]:
        if objective not in self._steps:
            eager = gradient_step(self._split, self._dropout, objective, self._dtype)
            self._steps[objective] = (eager, mx.compile(eager))
        eager, compiled = self._steps[objective]
        batch = pad_batch(batch, self._multiple)
        columns, layout = _arrays(batch.columns), self._lay_out(batch, objective.positions(batch))
        shape = tuple(size for array in (*columns.values(), *layout.values()) for size in array.shape)
        if self._compiles and len(self._shapes) < MAX_COMPILED_SHAPES:
            self._shapes.add(shape)
        run = compiled if shape in self._shapes else eager
        try:
            return run(self._masters, columns, layout, keys, scale)
        finally:
            # Tracing leaves its placeholders in the model.
            self._place_masters()

    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        """See `Backend.logps`."""
        assert batch.segment_ids is None or self._split.packs, "this model takes examples one a row"
        self._model.eval()
        if self._dropout is not None:
            self._dropout.keys = None
        layout = self._lay_out(batch, positions)
        return np.array(token_logps(self._split, layout, positions.shape, with_gradient=False))

    def _lay_out(self, batch: NumpyBatch, positions: np.ndarray) -> Columns:
        layout = lay_out(batch, positions, share=self._split.shares_prompts, multiple=self._multiple)
        return _arrays(layout.columns)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """See `Backend.generate`."""
        if self._dropout is not None:
            self._dropout.keys = None
        return generation.generate(
            self._model, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling
        )

    def adapter_state(self) -> State:
        """See `Backend.adapter_state`."""
        return {lora.canonical_name(path): np.array(value) for path, value in self._masters.items()}

    def set_adapter_state(self, state: State) -> None:
        """See `Backend.set_adapter_state`."""
        lora.set_trainable_state(self._model, state)
        self._masters = _trainable(self._model)
        self._place_masters()

    def optimizer_state(self) -> State:
        """See `Backend.optimizer_state`."""
        state = {}
        for kind, moments in (
            ("exp_avg", self._optimizer.exp_avg),
            ("exp_avg_sq", self._optimizer.exp_avg_sq),
        ):
            for path, value in moments.items():
                state[f"{lora.canonical_name(path)}.{kind}"] = np.array(value)
        return state

    def set_optimizer_state(self, state: State, step: int) -> None:
        """See `Backend.set_optimizer_state`."""
        self._optimizer.steps = step
        for kind, moments in (
            ("exp_avg", self._optimizer.exp_avg),
            ("exp_avg_sq", self._optimizer.exp_avg_sq),
        ):
            for path in self._masters:
                moments[path] = mx.array(state[f"{lora.canonical_name(path)}.{kind}"])

    def peak_memory(self) -> int:
        """See `Backend.peak_memory`."""
        return int(mx.get_peak_memory()) if models.on_gpu() else peak_process_memory()

    def _place_masters(self) -> None:
        place(self._model, cast(self._masters, self._dtype))


def _arrays(columns: dict[str, np.ndarray]) -> Columns:
    return {name: mx.array(value) for name, value in columns.items()}


def _float(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def _trainable(model: nn.Module) -> Parameters:
    return {path: value.astype(mx.float32) for path, value in tree_flatten(model.trainable_parameters())}
