"""Plan the passes of a step on a GPU by what one of them keeps in memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import exact, plain_layout
from macft.backends.memory import BYTES_PER_TRAINED, PassPlan, plan_passes
from macft.backends.torch.device import free_memory, pick_device
from macft.backends.torch.out_of_memory import is_out_of_memory
from macft.backends.torch.split import SplitModel
from macft.objectives.batch import Batch
from macft.weights.source import open_model


def device_for_float32(folder: Path) -> torch.device:
    """The device to compute a model in float32 on: a GPU only if the weights fit twice into what is free."""
    device = pick_device()
    parameters = sum(math.prod(tensor.shape) for tensor in open_model(folder).tensors)
    fits = device.type == "cpu" or 2 * 4 * parameters <= free_memory(device)
    return device if fits else torch.device("cpu")


def plan_device_passes(split: SplitModel, spec: ModelSpec, trained: int) -> PassPlan:
    """Plan the passes of a step on a GPU by what a pass over the longest row keeps there."""
    config = split.model.config
    row_tokens = max(1, spec.max_length) * spec.rows_per_example
    split.model.train()  # dropout keeps its masks
    try:
        kept = kept_bytes(split, row_tokens) / row_tokens
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        kept = math.inf
    split.model.eval()
    torch.cuda.empty_cache()
    layer_input = config.hidden_size * next(split.model.parameters()).element_size()
    free = free_memory(split.device) - trained * BYTES_PER_TRAINED - split.head_bytes
    return plan_passes(
        free,
        row_tokens,
        kept,
        config.num_hidden_layers * layer_input + kept / config.num_hidden_layers,
        checkpoints=spec.gradient_checkpointing,
    )


def kept_bytes(split: SplitModel, tokens: int) -> int:
    """Bytes that a training pass over one row of so many tokens keeps for the backward pass, without the head's."""
    model = split.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # an output that holds itself through its own graph would never be freed, nor the model with it
        return tensor.detach()

    row = np.ones((1, tokens + 1), dtype=np.int32)
    batch = Batch(row, row.astype(bool), np.array([tokens + 1], dtype=np.int32))
    columns = split.columns(plain_layout(batch, row[:, 1:].astype(bool), exact))
    with saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = split.hidden(columns)
    assert hidden.requires_grad, "nothing is trained"
    return sum(kept.values())
