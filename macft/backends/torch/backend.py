"""Train, score and generate with transformers models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from macft.backends.base import ModelInfo, ModelSpec, OptimizerSpec, Sampling, StepResult
from macft.backends.batch_layout import (
    GPU_MIN_SAVING,
    MIN_SAVING,
    exact,
    lay_out,
    multiples_of,
    pad_batch,
    score_in_parts,
)
from macft.backends.loss_scale import LossScale
from macft.backends.memory import PassPlan, Phase
from macft.backends.shared import CPU_TOKENS_AT_ONCE, dropout_seed, load_notes, step_parts
from macft.backends.torch import generate as generation
from macft.backends.torch import lora
from macft.backends.torch import model as models
from macft.backends.torch.device import device_name
from macft.backends.torch.memory import plan_device_passes
from macft.backends.torch.ops import TorchOps
from macft.backends.torch.out_of_memory import explaining_out_of_memory
from macft.backends.torch.recompute import recompute_elementwise
from macft.backends.torch.split import SplitModel, split
from macft.backends.torch.step import autocast, clip, make_optimizer, token_logps, unscale, whole_logits
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ProcessGroup
from macft.system import peak_process_memory
from macft.weights.adapters.peft import State

CPU_PASSES = PassPlan(CPU_TOKENS_AT_ONCE, checkpoints=False)
# A GPU scores so many tokens in one pass of a model that is not trained.
SCORED_AT_ONCE = 8192
# Rows of a length not seen before cost a GPU new kernels' plans and other blocks of memory.
GPU_LENGTH_MULTIPLE = 64
_LOSS_SCALE = "loss_scale"


def load(spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> TorchModel:
    """See `EngineModule.load`."""
    loaded = models.load(spec)
    inner, device, dtype = loaded.model, loaded.device, loaded.dtype
    if spec.merged_adapter is not None:
        inner = lora.merge(inner, spec.merged_adapter)
    model, targets = _with_adapter(inner, spec)
    # What is trained stays in float32, and so do DoRA's norms; all else is in the compute type already.
    keeps_float32 = optimizer is not None or spec.full or (spec.lora is not None and spec.lora.use_dora)
    autocast_dtype = dtype if keeps_float32 else torch.float32
    lora.compute_in(model, dtype, under_autocast=keeps_float32)
    precision = str(dtype).removeprefix("torch.")
    with autocast(device, autocast_dtype):
        halves = split(
            inner,
            device,
            lm_head_is_frozen=not spec.full,
            may_share=not spec.gradient_checkpointing,
            may_pack=spec.packing and loaded.rope_problem is None,
            precision=precision,
        )
    notes = load_notes(spec, has_lm_head=halves.splits, packs=halves.packs, rope_problem=loaded.rope_problem)
    trainable, total = models.count_parameters(model)
    passes = CPU_PASSES if device.type == "cpu" else PassPlan(SCORED_AT_ONCE, checkpoints=False)
    if optimizer is not None and device.type != "cpu":
        with autocast(device, autocast_dtype):
            passes = plan_device_passes(halves, spec, trainable)
        notes += [passes.note] if passes.note else []
    if spec.gradient_checkpointing or passes.checkpoints:
        models.checkpoint_layers(inner)
        halves.shares_prompts = False
    elif optimizer is not None and device.type == "cpu" and dtype == torch.float32:
        # under autocast the second time would not cast as the first did
        recompute_elementwise(inner)
    info = ModelInfo(
        device=device_name(device),
        precision=precision,
        trainable_parameters=trainable,
        total_parameters=total,
        target_modules=tuple(targets),
        notes=(*loaded.notes, *notes),
    )
    has_dropout = spec.lora is not None and spec.lora.dropout > 0
    seed = spec.seed if has_dropout else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return TorchModel(info, model, halves, autocast_dtype, optimizer, seed, group, passes.tokens_at_once)


def _with_adapter(model: torch.nn.Module, spec: ModelSpec) -> tuple[torch.nn.Module, list[str]]:
    """The model to run, in evaluation mode, and the modules that carry an adapter."""
    if spec.lora is None:
        return model.requires_grad_(spec.full).eval(), []
    adapted, targets = lora.attach(model, spec.lora, spec.seed)
    return adapted.eval(), targets


class TorchModel:
    """A model on CUDA, MPS or the CPU: `macft.backends.base.Model`, whose docstrings hold for its methods."""

    def __init__(
        self,
        info: ModelInfo,
        model: torch.nn.Module,
        halves: SplitModel,
        dtype: torch.dtype,
        optimizer: OptimizerSpec | None,
        dropout_seed: int | None,
        group: ProcessGroup,
        tokens_at_once: int,
    ):
        self.info = info
        self._model = model
        self._split = halves
        self._device = halves.device
        self._dtype = dtype
        self._dropout_seed = dropout_seed
        self._group = group
        self._tokens_at_once = tokens_at_once
        on_cpu = self._device.type == "cpu"
        self._round_up = exact if on_cpu else multiples_of(GPU_LENGTH_MULTIPLE)
        self._min_saving = MIN_SAVING if on_cpu else GPU_MIN_SAVING
        self._loss_scale = LossScale() if dtype == torch.float16 else None
        self._steps_taken = 0
        self._peak = 0
        self._ops = TorchOps()
        self._trained = lora.trainable_parameters(model)
        self._max_grad_norm = optimizer.max_grad_norm if optimizer is not None else 0.0
        self._trainer = make_optimizer(list(self._trained.values()), optimizer) if optimizer is not None else None

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self._trainer is not None, "load() was called without an optimizer"
        return self._trainer

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, weight: float, lr: float, step: int
    ) -> StepResult:
        self._model.train()
        losses: list[torch.Tensor] = []
        amounts: dict[str, list[torch.Tensor]] = {}
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        for index, part in step_parts(micro_batches, self._tokens_at_once, packs=self._split.packs):
            batch = pad_batch(part, self._round_up)
            if self._dropout_seed is not None:
                torch.manual_seed(dropout_seed(self._dropout_seed, step, index, self._group.rank))
            with self._explaining("in a training step", batch):
                with autocast(self._device, self._dtype):
                    logps = self._logps(batch, objective.positions(batch))
                value, more = objective(self._ops, logps, batch.map(self._to_device))
                value = value / weight
                (value if scale == 1.0 else value * scale).backward()
            losses.append(value.detach())
            for name, amount in more.items():
                amounts.setdefault(name, []).append(amount.detach())
        parameters = list(self._trained.values())
        unscale(parameters, scale)
        norm = clip(parameters, self._max_grad_norm)
        # all numbers of the step come to the host at once
        found = [norm.detach(), *losses, *itertools.chain.from_iterable(amounts.values())]
        numbers = iter(torch.stack([number.float() for number in found]).tolist())
        grad_norm = next(numbers)
        loss = _in_turn(itertools.islice(numbers, len(losses)))
        metrics = {name: _in_turn(next(numbers) / weight for _ in values) for name, values in amounts.items()}
        # a loss that is not finite is not the scale's doing
        scale_counts = self._loss_scale if math.isfinite(loss) else None
        is_skipped = scale_counts is not None and scale_counts.skips(is_finite=math.isfinite(grad_norm))
        if not is_skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            with self._explaining("in an optimizer step"):
                self._optimizer.step()
            self._steps_taken += 1
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, metrics, is_skipped=is_skipped)

    def _explaining(
        self, doing: str, batch: NumpyBatch | None = None, phase: Phase = "train"
    ) -> AbstractContextManager[None]:
        of = "" if batch is None else " of {} rows of {} tokens".format(*batch.tokens.shape)
        return explaining_out_of_memory(self._device, doing + of, phase)

    def _logps(self, batch: NumpyBatch, positions: np.ndarray) -> torch.Tensor:
        layout = lay_out(
            batch,
            positions,
            share=self._split.shares_prompts,
            round_up=self._round_up,
            min_saving=self._min_saving,
        )
        return token_logps(self._split, layout, positions.shape)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.no_grad()
    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        assert batch.segment_ids is None or self._split.packs, "this model takes one example per row"
        self._model.eval()
        # on a CPU a batch is scored whole
        bound = None if self._device.type == "cpu" else self._tokens_at_once
        return score_in_parts(batch, positions, bound, self._score)

    def _score(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        padded = pad_batch(batch, self._round_up)
        extra = padded.tokens.shape[1] - batch.tokens.shape[1]
        with self._explaining("scoring", batch, "score"), autocast(self._device, self._dtype):
            found = self._logps(padded, np.pad(positions, ((0, 0), (0, extra))))
            return found.cpu().numpy()[:, : positions.shape[1]]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with (
            self._explaining(f"computing the logits of {len(tokens)} tokens", phase="answer"),
            autocast(self._device, self._dtype),
        ):
            return whole_logits(self._model.eval(), self._device, tokens)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        with (
            self._explaining(f"answering a prompt of {len(prompt)} tokens", phase="answer"),
            autocast(self._device, self._dtype),
        ):
            yield from generation.generate(
                self._model,
                prompt,
                device=self._device,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                sampling=sampling,
            )

    def trained_state(self) -> State:
        return {name: lora.to_numpy(parameter) for name, parameter in self._trained.items()}

    def set_trained_state(self, state: State) -> None:
        lora.set_trainable_state(self._model, state)

    def optimizer_state(self) -> State:
        state = {}
        for name, parameter in self._trained.items():
            moments = self._optimizer.state.get(parameter, {})
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind in moments:
                    state[f"{name}.{kind}"] = lora.to_numpy(moments[kind])
        if self._loss_scale is not None:
            state[_LOSS_SCALE] = self._loss_scale.state(self._steps_taken)
        return state

    def set_optimizer_state(self, state: State, step: int) -> None:
        self._steps_taken = step
        if self._loss_scale is not None and _LOSS_SCALE in state:
            self._steps_taken = self._loss_scale.restore(state[_LOSS_SCALE])
        for name, parameter in self._trained.items():
            if f"{name}.exp_avg" not in state:
                continue  # every step so far was skipped
            device = parameter.device
            self._optimizer.state[parameter] = {
                # the fused AdamW of CUDA counts on the device
                "step": torch.tensor(float(self._steps_taken), device=device if device.type == "cuda" else "cpu"),
                **{
                    kind: torch.from_numpy(state[f"{name}.{kind}"].copy()).to(device)
                    for kind in ("exp_avg", "exp_avg_sq")
                },
            }

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if self._device.type == "mps":
            # MPS tells only what is in use now
            self._peak = max(self._peak, int(torch.mps.driver_allocated_memory()))
            return self._peak
        return peak_process_memory()


def _in_turn(numbers: Iterable[float]) -> float:
    """Their sum, one after the other: `sum` compensates for rounding from Python 3.12 on, and gives other bits."""
    total = 0.0
    for number in numbers:
        total += number
    return total
