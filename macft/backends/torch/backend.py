"""Train, score and generate with transformers models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from macft.backends.base import ModelInfo, ModelSpec, OptimizerSpec, Sampling, StepResult
from macft.backends.batch_layout import lay_out
from macft.backends.shared import CPU_TOKENS_AT_ONCE, dropout_seed, load_notes, step_parts
from macft.backends.torch import generate as generation
from macft.backends.torch import lora
from macft.backends.torch import model as models
from macft.backends.torch.ops import TorchOps
from macft.backends.torch.recompute import recompute_elementwise
from macft.backends.torch.split import SplitModel, split
from macft.backends.torch.step import autocast, clip, make_optimizer, token_logps, whole_logits
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.process_group import ProcessGroup
from macft.system import peak_process_memory
from macft.weights.adapters.peft import State


def load(spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> TorchModel:
    """See `EngineModule.load`."""
    loaded = models.load(spec)
    inner = loaded.model
    if spec.merged_adapter is not None:
        inner = lora.merge(inner, spec.merged_adapter)
    model = inner
    targets: list[str] = []
    if spec.lora is None:
        inner.requires_grad_(spec.full)
    else:
        model, targets = lora.attach(inner, spec.lora, spec.seed)
    model.eval()
    with autocast(loaded.device, loaded.dtype):
        halves = split(
            inner,
            loaded.device,
            lm_head_is_frozen=not spec.full,
            may_share=not spec.gradient_checkpointing,
            may_pack=spec.packing and loaded.rope_problem is None,
        )
    notes = load_notes(spec, has_lm_head=halves.splits, packs=halves.packs, rope_problem=loaded.rope_problem)
    if spec.gradient_checkpointing:
        models.checkpoint_layers(inner)
    elif optimizer is not None and loaded.device.type == "cpu" and loaded.dtype == torch.float32:
        # under autocast the second time would not cast as the first did
        recompute_elementwise(inner)
    trainable, total = models.count_parameters(model)
    info = ModelInfo(
        device=loaded.device.type.upper(),
        precision=str(loaded.dtype).removeprefix("torch."),
        trainable_parameters=trainable,
        total_parameters=total,
        target_modules=tuple(targets),
        notes=(*loaded.notes, *notes),
    )
    has_dropout = spec.lora is not None and spec.lora.dropout > 0
    return TorchModel(info, model, halves, loaded.dtype, optimizer, spec.seed if has_dropout else None, group)


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
    ):
        self.info = info
        self._model = model
        self._split = halves
        self._device = halves.device
        self._dtype = dtype
        self._dropout_seed = dropout_seed
        self._group = group
        self._tokens_at_once = CPU_TOKENS_AT_ONCE if self._device.type == "cpu" else None
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
        loss = 0.0
        metrics: dict[str, float] = {}
        for index, batch in step_parts(micro_batches, self._tokens_at_once, packs=self._split.packs):
            if self._dropout_seed is not None:
                torch.manual_seed(dropout_seed(self._dropout_seed, step, index, self._group.rank))
            with autocast(self._device, self._dtype):
                logps = self._logps(batch, objective.positions(batch))
            value, more = objective(self._ops, logps, batch.map(self._to_device))
            value = value / weight
            value.backward()
            loss += value.item()
            for name, amount in more.items():
                metrics[name] = metrics.get(name, 0.0) + amount.item() / weight
        norm = clip(list(self._trained.values()), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm.item(), metrics)

    def _logps(self, batch: NumpyBatch, positions: np.ndarray) -> torch.Tensor:
        layout = lay_out(batch, positions, share=self._split.shares_prompts)
        return token_logps(self._split, layout, positions.shape)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.no_grad()
    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        assert batch.segment_ids is None or self._split.packs, "this model takes one example per row"
        self._model.eval()
        with autocast(self._device, self._dtype):
            return self._logps(batch, positions).cpu().numpy()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with autocast(self._device, self._dtype):
            return whole_logits(self._model.eval(), self._device, tokens)

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        with autocast(self._device, self._dtype):
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
        return state

    def set_optimizer_state(self, state: State, step: int) -> None:
        for name, parameter in self._trained.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{
                    kind: torch.from_numpy(state[f"{name}.{kind}"].copy()).to(parameter.device)
                    for kind in ("exp_avg", "exp_avg_sq")
                },
            }

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if self._device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return peak_process_memory()
