"""Train, score and generate with mlx-lm models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from macft.backends.base import ModelInfo, ModelSpec, OptimizerSpec, Sampling, StepResult
from macft.backends.batch_layout import exact, lay_out, pad_batch, quarter_octaves, score_in_parts
from macft.backends.loss_scale import LossScale
from macft.backends.memory import PassPlan
from macft.backends.mlx import device, lora
from macft.backends.mlx import generate as generation
from macft.backends.mlx import model as models
from macft.backends.mlx import step as steps
from macft.backends.mlx.memory import plan_device_passes
from macft.backends.mlx.out_of_memory import explaining_out_of_memory
from macft.backends.mlx.split import Columns, SplitModel, split, to_device
from macft.backends.shared import CPU_TOKENS_AT_ONCE, dropout_seed, load_notes, step_parts
from macft.errors import ModelError
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ProcessGroup
from macft.system import peak_process_memory
from macft.weights.adapters.peft import State

CPU_PASSES = PassPlan(CPU_TOKENS_AT_ONCE, checkpoints=False)
_LOSS_SCALE = "loss_scale"


def load(spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> MlxModel:
    """See `EngineModule.load`."""
    device.bound_memory()
    # the buffers of a model that was there before
    mx.clear_cache()
    with explaining_out_of_memory("loading the weights", "load"):
        loaded, targets, dropout = _attached(spec)
    model = loaded.model
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
    if spec.gradient_checkpointing and not models.checkpoint_layers(model):
        raise ModelError("gradient_checkpointing: the blocks of this architecture were not found; remove the key")
    masters = steps.trainable_parameters(model)
    mx.eval(masters)
    passes = CPU_PASSES
    if optimizer is not None and device.on_gpu():
        passes = plan_device_passes(halves, spec, masters, loaded.dtype, dropout)
        notes += [passes.note] if passes.note else []
    mx.clear_cache()
    mx.reset_peak_memory()
    trainable, total = models.count_parameters(model)
    info = ModelInfo(
        device=device.device_name(),
        precision=precision,
        trainable_parameters=trainable,
        total_parameters=total,
        target_modules=tuple(targets),
        notes=(*loaded.notes, *notes),
    )
    optimizer = optimizer or OptimizerSpec()
    return MlxModel(info, halves, loaded.dtype, dropout, optimizer, spec.seed, group, masters, passes.tokens_at_once)


def _attached(spec: ModelSpec) -> tuple[models.LoadedMlxModel, list[str], lora.Dropout | None]:
    """The model with its adapters, their targets, and the dropout switch; in float32 where float16 overflows."""
    found = _attached_in(spec)
    if found[0].dtype != mx.float16 or models.has_finite_logits(found[0].model):
        return found
    # two copies at once might not fit
    del found
    mx.clear_cache()
    found = _attached_in(replace(spec, precision="float32"))
    found[0].notes.append("float16 overflows in this model: computing in float32")
    return found


def _attached_in(spec: ModelSpec) -> tuple[models.LoadedMlxModel, list[str], lora.Dropout | None]:
    loaded = models.load(spec)
    if spec.merged_adapter is not None:
        lora.merge(loaded.model, spec.merged_adapter)
    if spec.lora is not None:
        return loaded, *lora.attach(loaded.model, spec.lora, spec.seed)
    if not spec.full:
        loaded.model.freeze()
    return loaded, [], None


class MlxModel:
    """A model on a GPU or on the CPU: `macft.backends.base.Model`, whose docstrings hold for its methods."""

    def __init__(
        self,
        info: ModelInfo,
        halves: SplitModel,
        dtype: mx.Dtype,
        dropout: lora.Dropout | None,
        optimizer: OptimizerSpec,
        seed: int,
        group: ProcessGroup,
        masters: steps.Parameters,
        tokens_at_once: int,
    ):
        self.info = info
        self._split = halves
        self._model = halves.model
        self._dtype = dtype
        self._dropout = dropout
        self._seed = seed
        self._group = group
        self._optimizer = steps.AdamW(optimizer)
        self._state = steps.AdamState()
        self._loss_scale = LossScale() if dtype == mx.float16 else None
        self._steps: dict[Objective, steps.GradientStep] = {}
        # On a CPU compiling halves the speed (measured), so shapes stay as they are.
        self._compiles = device.on_gpu()
        self._round_up = quarter_octaves if self._compiles else exact
        self._tokens_at_once: int | None = tokens_at_once
        self._masters = masters
        self._place_masters()

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, weight: float, lr: float, step: int
    ) -> StepResult:
        self._use(training=True)
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        with explaining_out_of_memory("in a training step of {} rows of {} tokens".format(*_largest(micro_batches))):
            loss, metrics, gradients = self._summed_gradients(objective, micro_batches, scale / weight, step)
            # float16 may go back to these
            before = (self._state, self._masters) if self._loss_scale is not None else None
            self._state, self._masters, norm = self._optimizer.update(self._state, self._masters, gradients, lr, scale)
            del gradients
            # all numbers of the step come to the host at once
            mx.eval(loss, metrics, norm, self._masters, self._state.moments)
        grad_norm = _float(norm)
        # a loss that is not finite says that activations overflow, which no loss scale mends
        is_finite = math.isfinite(grad_norm) or not math.isfinite(_float(loss))
        is_skipped = self._loss_scale is not None and self._loss_scale.skips(is_finite=is_finite)
        if is_skipped and before is not None:
            self._state, self._masters = before
        self._place_masters()
        means = {name: _float(value) / scale for name, value in metrics.items()}
        return StepResult(_float(loss) / scale, grad_norm, means, is_skipped=is_skipped)

    def _summed_gradients(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], factor: float, step: int
    ) -> tuple[mx.array, dict[str, mx.array], steps.Parameters]:
        """Loss, metrics and gradients, times `factor`; of several passes all but the last are computed already."""
        total: tuple[mx.array, dict[str, mx.array], steps.Parameters] | None = None
        for index, batch in step_parts(micro_batches, self._tokens_at_once, packs=self._split.packs):
            if total is not None:
                mx.eval(total)
            value, more, new = self._gradients(objective, batch, self._dropout_keys(step, index), mx.array(factor))
            loss, metrics, gradients = total or (mx.array(0.0), {}, {})
            total = (
                loss + value,
                {name: metrics.get(name, 0.0) + amount for name, amount in more.items()},
                {path: gradients[path] + g for path, g in new.items()} if gradients else new,
            )
        assert total is not None, "a step without micro-batches"
        return total

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
            self._steps[objective] = steps.CompiledStep(eager) if self._compiles else eager
        batch = pad_batch(batch, self._round_up)
        columns, layout = to_device(batch.columns), self._lay_out(batch, objective.positions(batch))
        try:
            return self._steps[objective](self._masters, columns, layout, keys, scale)
        finally:
            # Tracing leaves its placeholders in the model.
            self._place_masters()

    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        assert batch.segment_ids is None or self._split.packs, "this model takes one example per row"
        self._use(training=False)
        # on a CPU a batch is scored whole
        return score_in_parts(batch, positions, self._tokens_at_once if device.on_gpu() else None, self._score)

    def _score(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        with explaining_out_of_memory("scoring {} rows of {} tokens".format(*batch.tokens.shape), "score"):
            return np.array(steps.scored_as_trained(self._split, self._lay_out(batch, positions), positions.shape))

    def _lay_out(self, batch: NumpyBatch, positions: np.ndarray) -> Columns:
        layout = lay_out(batch, positions, share=self._split.shares_prompts, round_up=self._round_up)
        return to_device(layout.columns)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self._use(training=False)
        with explaining_out_of_memory(f"computing the logits of {len(tokens)} tokens", "answer"):
            return steps.whole_logits(self._model, tokens)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        self._use(training=False)
        with explaining_out_of_memory(f"answering a prompt of {len(prompt)} tokens", "answer"):
            yield from generation.generate(
                self._model, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling
            )

    def _use(self, *, training: bool) -> None:
        """Make the model ready to train, or to be asked."""
        if self._model.training != training:
            self._model.train(training)
            # buffers of the one have no size that the other needs
            mx.clear_cache()
        if self._dropout is not None:
            self._dropout.keys = None

    def trained_state(self) -> State:
        return {lora.canonical_name(path): np.array(value) for path, value in self._masters.items()}

    def set_trained_state(self, state: State) -> None:
        lora.set_trainable_state(self._model, state)
        self._masters = steps.trainable_parameters(self._model)
        self._place_masters()

    def optimizer_state(self) -> State:
        state = {
            f"{lora.canonical_name(path)}.{kind}": np.array(value)
            for kind, moments in self._state.moments.items()
            for path, value in moments.items()
        }
        if self._loss_scale is not None:
            state[_LOSS_SCALE] = self._loss_scale.state(self._state.steps)
        return state

    def set_optimizer_state(self, state: State, step: int) -> None:
        if self._loss_scale is not None and _LOSS_SCALE in state:
            step = self._loss_scale.restore(state[_LOSS_SCALE])
        fresh = steps.AdamState(step)
        if not state.keys() - {_LOSS_SCALE}:
            self._state = fresh
            return
        moments = {
            kind: {path: mx.array(state[f"{lora.canonical_name(path)}.{kind}"]) for path in self._masters}
            for kind in fresh.moments
        }
        self._state = steps.AdamState(step, moments)

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory()) if device.on_gpu() else peak_process_memory()

    def _place_masters(self) -> None:
        steps.place(self._model, steps.cast(self._masters, self._dtype))


def _float(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def _largest(batches: Sequence[NumpyBatch]) -> tuple[int, ...]:
    """Rows and tokens of the largest batch."""
    return max((batch.tokens.shape for batch in batches), key=math.prod)
