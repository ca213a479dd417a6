"""The PyTorch backend: one optimizer step, log-probabilities, generation and state behind the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch

from macft.backends.base import (
    LoadedModel,
    ModelSpec,
    OptimizerSpec,
    Sampling,
    State,
    StepResult,
    dropout_seed,
)
from macft.backends.batch_layout import CPU_TOKENS_AT_ONCE, lay_out, packing_note, passes
from macft.backends.torch import generate as generation
from macft.backends.torch import lora
from macft.backends.torch import model as models
from macft.backends.torch.ops import TorchOps
from macft.backends.torch.recompute import recompute_elementwise
from macft.backends.torch.split import split
from macft.backends.torch.step import clip, make_optimizer, token_logps
from macft.objectives.batch import NumpyBatch
from macft.objectives.losses import Objective
from macft.system import peak_process_memory


class TorchBackend:
    """Trains and generates with transformers models, on CUDA, MPS or the CPU."""

    rank = 0
    world_size = 1

    def load(self, model: ModelSpec, optimizer: OptimizerSpec | None = None) -> LoadedModel:
        """See `Backend.load`."""
        loaded = models.load(model)
        if model.under is not None:
            loaded = replace(loaded, model=lora.merge(loaded.model, model.under))
        self._device, self._dtype = loaded.device, loaded.dtype
        self._seed = model.seed
        self._tokens_at_once = CPU_TOKENS_AT_ONCE if self._device.type == "cpu" else None
        self._ops = TorchOps()
        targets: list[str] = []
        if model.lora is None:
            loaded.model.requires_grad_(model.full)
            self._model = loaded.model
        else:
            self._model, targets = lora.attach(loaded.model, model.lora, model.seed)
        self._drops = model.lora is not None and model.lora.dropout > 0
        self._model.eval()
        with self._autocast():
            self._split = split(
                loaded.model,
                self._device,
                head_is_frozen=not model.full,
                may_share=not model.gradient_checkpointing,
                may_pack=model.packing and loaded.rope_problem is None,
            )
        notes = list(loaded.notes)
        if not self._split.splits:
            notes.append("this architecture hides its head: logits are computed at every position")
        if model.packing and not self._split.packs:
            notes.append(packing_note(loaded.rope_problem))
        if model.gradient_checkpointing:
            models.checkpoint_layers(loaded.model)
        elif optimizer is not None and self._device.type == "cpu" and self._dtype == torch.float32:
            # under autocast the second time would not cast as the first did
            recompute_elementwise(loaded.model)
        self._trained = lora.trainable_parameters(self._model)
        self._optimizer_spec = optimizer or OptimizerSpec()
        self._optimizer = (
            make_optimizer(list(self._trained.values()), self._optimizer_spec) if optimizer is not None else None
        )
        trainable, total = models.count_parameters(self._model)
        return LoadedModel(
            device=self._device.type.upper(),
            precision=str(self._dtype).removeprefix("torch."),
            trainable_parameters=trainable,
            total_parameters=total,
            target_modules=tuple(targets),
            notes=tuple(notes),
        )

    def train_step(
        self, objective: Objective, micro_batches: Sequence[NumpyBatch], *, lr: float, step: int
    ) -> StepResult:
        """See `Backend.train_step`."""
        assert self._optimizer is not None, "load() was called without an optimizer"
        self._model.train()
        total_weight = sum(objective.weight(batch) for batch in micro_batches)
        loss = 0.0
        metrics: dict[str, float] = {}
        packs = self._split.packs
        parts = (part for batch in micro_batches for part in passes(batch, self._tokens_at_once, packs=packs))
        for index, batch in enumerate(parts):
            if self._drops:
                torch.manual_seed(dropout_seed(self._seed, step, index, self.rank))
            with self._autocast():
                logps = self._logps(batch, objective.positions(batch))
            value, more = objective(self._ops, logps, batch.map(self._to_device))
            value = value / total_weight
            value.backward()
            loss += value.item()
            for name, amount in more.items():
                metrics[name] = metrics.get(name, 0.0) + amount.item() / total_weight
        norm = clip(list(self._trained.values()), self._optimizer_spec.max_grad_norm)
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

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    @torch.no_grad()
    def logps(self, batch: NumpyBatch, positions: np.ndarray) -> np.ndarray:
        """See `Backend.logps`."""
        assert batch.segment_ids is None or self._split.packs, "this model takes examples one a row"
        self._model.eval()
        with self._autocast():
            return self._logps(batch, positions).cpu().numpy()

    def generate(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """See `Backend.generate`."""
        with self._autocast():
            yield from generation.generate(
                self._model,
                prompt,
                device=self._device,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                sampling=sampling,
            )

    def adapter_state(self) -> State:
        """See `Backend.adapter_state`."""
        return lora.trainable_state(self._model)

    def set_adapter_state(self, state: State) -> None:
        """See `Backend.set_adapter_state`."""
        lora.set_trainable_state(self._model, state)

    def optimizer_state(self) -> State:
        """See `Backend.optimizer_state`."""
        assert self._optimizer is not None, "load() was called without an optimizer"
        state = {}
        for name, parameter in self._trained.items():
            moments = self._optimizer.state.get(parameter, {})
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind in moments:
                    state[f"{name}.{kind}"] = lora.to_numpy(moments[kind])
        return state

    def set_optimizer_state(self, state: State, step: int) -> None:
        """See `Backend.set_optimizer_state`."""
        assert self._optimizer is not None, "load() was called without an optimizer"
        for name, parameter in self._trained.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{
                    kind: torch.from_numpy(state[f"{name}.{kind}"].copy()).to(parameter.device)
                    for kind in ("exp_avg", "exp_avg_sq")
                },
            }

    def peak_memory(self) -> int:
        """See `Backend.peak_memory`."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if self._device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return peak_process_memory()
