"""Train, score and generate with mlx-lm models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from macft.backends.base import ModelInfo, ModelSpec, OptimizerSpec, Sampling, StepResult
from macft.backends.batch_layout import lay_out, pad_batch
from macft.backends.mlx import generate as generation
from macft.backends.mlx import lora
from macft.backends.mlx import model as models
from macft.backends.mlx import step as steps
from macft.backends.mlx.split import Columns, SplitModel, split, to_device
from macft.backends.shared import CPU_TOKENS_AT_ONCE, dropout_seed, load_notes, step_parts
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ProcessGroup
from macft.system import peak_process_memory
from macft.weights.adapters.peft import State

# On a GPU the step is compiled; shapes are padded to multiples of this, so that few are compiled.
# On a CPU compiling halves the speed (measured), so shapes stay as they are.
COMPILED_SHAPE_MULTIPLE = 32
# mx.compile never forgets a shape, and Metal runs out of buffers after very many.
MAX_COMPILED_SHAPES = 48


def load(spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> MlxModel:
    """See `EngineModule.load`."""
    loaded = models.load(spec)
    model = loaded.model
    targets: list[str] = []
    dropout: lora.Dropout | None = None
    if spec.merged_adapter is not None:
        lora.merge(model, spec.merged_adapter)
    if spec.lora is not None:
        targets, dropout = lora.attach(model, spec.lora, spec.seed)
    elif not spec.full:
        model.freeze()
    precision = str(loaded.dtype).rsplit(".", 1)[-1]
    halves = split(
        model,
        lm_head_is_frozen=not spec.full,
        may_share=not spec.gradient_checkpointing,
        may_pack=spec.packing and loaded.rope_problem is None,
        precision=precision,
    )
    has_lm_head = halves.backbone is not None
    notes = load_notes(spec, has_lm_head=has_lm_head, packs=halves.packs, rope_problem=loaded.rope_problem)
    if spec.gradient_checkpointing:
        models.checkpoint_layers(model)
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    trainable, total = models.count_parameters(model)
    info = ModelInfo(
        device="Metal" if models.on_gpu() else "CPU",
        precision=precision,
        trainable_parameters=trainable,
        total_parameters=total,
        target_modules=tuple(targets),
        notes=(*loaded.notes, *notes),
    )
    return MlxModel(info, halves, loaded.dtype, dropout, optimizer or OptimizerSpec(), spec.seed, group)


class MlxModel:
    """A model on Metal or on the CPU: `macft.backends.base.Model`, whose docstrings hold for its methods."""

    def __init__(
        self,
        info: ModelInfo,
        halves: SplitModel,
        dtype: mx.Dtype,
        dropout: lora.Dropout | None,
        optimizer: OptimizerSpec,
        seed: int,
        group: ProcessGroup,
    ):
        self.info = info
        self._split = halves
        self._model = halves.model
        self._dtype = dtype
        self._dropout = dropout
        self._seed = seed
        self._group = group
        self._optimizer = steps.AdamW(optimizer)
        self._steps: dict[Objective, tuple[steps.GradientStep, steps.GradientStep]] = {}
        self._shapes: set[tuple[int, ...]] = set()
        self._compiles = models.on_gpu()
        self._multiple = COMPILED_SHAPE_MULTIPLE if self._compiles else 1
        self._tokens_at_once = None if models.on_gpu() else CPU_TOKENS_AT_ONCE
        self._masters = steps.trainable_parameters(self._model)
        self._place_masters()

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, weight: float, lr: float, step: int
    ) -> StepResult:
        self._model.train()
        scale = mx.array(1.0 / weight)
        loss = mx.array(0.0)
        metrics: dict[str, mx.array] = {}
        gradients: steps.Parameters | None = None
        for index, batch in step_parts(micro_batches, self._tokens_at_once, packs=self._split.packs):
            value, more, new = self._gradients(objective, batch, self._dropout_keys(step, index), scale)
            loss = loss + value
            metrics = {name: metrics.get(name, 0.0) + amount for name, amount in more.items()}
            gradients = new if gradients is None else {path: gradients[path] + g for path, g in new.items()}
            mx.eval(loss, metrics, gradients)
        assert gradients is not None, "a step without micro-batches"
        gradients, norm = steps.clip(gradients, self._optimizer.spec.max_grad_norm)
        self._masters = self._optimizer.update(self._masters, gradients, lr)
        mx.eval(norm, self._masters, self._optimizer.moments)
        self._place_masters()
        return StepResult(_float(loss), _float(norm), {name: _float(value) for name, value in metrics.items()})

    def _dropout_keys(self, step: int, index: int) -> mx.array | None:
        """One key per layer, for one micro-batch."""
        if self._dropout is None or self._dropout.rate == 0.0:
            return None
        seed = dropout_seed(self._seed, step, index, self._group.rank)
        return mx.random.split(mx.random.key(seed), len(self.info.target_modules))

    def _gradients(
        self, objective: Objective, batch: NumpyBatch, keys: mx.array | None, scale: mx.array
    ) -> tuple[mx.array, dict[str, mx.array], steps.Parameters]:
        if objective not in self._steps:
            eager = steps.gradient_step(self._split, self._dropout, objective, self._dtype)
            self._steps[objective] = (eager, mx.compile(eager))
        eager, compiled = self._steps[objective]
        batch = pad_batch(batch, self._multiple)
        columns, layout = to_device(batch.columns), self._lay_out(batch, objective.positions(batch))
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
        assert batch.segment_ids is None or self._split.packs, "this model takes one example per row"
        self._stop_training()
        layout = self._lay_out(batch, positions)
        return np.array(steps.token_logps(self._split, layout, positions.shape, with_gradient=False))

    def _lay_out(self, batch: NumpyBatch, positions: np.ndarray) -> Columns:
        layout = lay_out(batch, positions, share=self._split.shares_prompts, multiple=self._multiple)
        return to_device(layout.columns)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self._stop_training()
        return steps.whole_logits(self._model, tokens)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        self._stop_training()
        return generation.generate(
            self._model, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling
        )

    def _stop_training(self) -> None:
        self._model.eval()
        if self._dropout is not None:
            self._dropout.keys = None

    def trained_state(self) -> State:
        return {lora.canonical_name(path): np.array(value) for path, value in self._masters.items()}

    def set_trained_state(self, state: State) -> None:
        lora.set_trainable_state(self._model, state)
        self._masters = steps.trainable_parameters(self._model)
        self._place_masters()

    def optimizer_state(self) -> State:
        return {
            f"{lora.canonical_name(path)}.{kind}": np.array(value)
            for kind, moments in self._optimizer.moments.items()
            for path, value in moments.items()
        }

    def set_optimizer_state(self, state: State, step: int) -> None:
        self._optimizer.steps = step
        for kind, moments in self._optimizer.moments.items():
            for path in self._masters:
                moments[path] = mx.array(state[f"{lora.canonical_name(path)}.{kind}"])

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory()) if models.on_gpu() else peak_process_memory()

    def _place_masters(self) -> None:
        steps.place(self._model, steps.cast(self._masters, self._dtype))


def _float(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]
