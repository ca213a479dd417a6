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
from macft.backends.torch.device import empty_cache, free_memory, pick_device
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
    length = max(2, spec.row_length or spec.max_length)
    row_tokens = length * spec.rows_per_example
    split.model.train()  # dropout keeps its masks
    kept, constant = _kept_by_tokens(split, spec.rows_per_example, length)
    split.model.eval()
    empty_cache(split.device)
    layer_input = config.hidden_size * next(split.model.parameters()).element_size()
    free = free_memory(split.device) - trained * BYTES_PER_TRAINED - split.head_bytes - constant
    return plan_passes(
        int(free),
        row_tokens,
        kept,
        config.num_hidden_layers * layer_input + kept / config.num_hidden_layers,
        checkpoints=spec.gradient_checkpointing,
    )


def _kept_by_tokens(split: SplitModel, rows: int, length: int) -> tuple[float, float]:
    """(bytes a token, bytes that a pass keeps whatever it holds), from rows of this length and of half of it.

    The second are copies of trained weights in the compute type. Where even the trial runs out of memory, shorter rows
    stand for long ones.
    """
    while True:
        try:
            long, short = (kept_bytes(split, rows, size) for size in (length, length // 2))
        except RuntimeError as error:
            if not is_out_of_memory(error) or length < 64:
                raise
            length //= 4
            empty_cache(split.device)
            continue
        # attention that keeps all scores grows faster than its row, and leaves less than nothing here
        constant = max(0.0, 2 * short - long)
        return (long - constant) / (rows * length), constant


def kept_bytes(split: SplitModel, rows: int, length: int) -> int:
    """Bytes that a training pass over rows of one length keeps for the backward pass, without the head's."""
    model = split.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # an output that holds itself through its own graph would never be freed, nor the model with it
        return tensor.detach()

    tokens = np.ones((rows, length + 1), dtype=np.int32)
    batch = Batch(tokens, tokens.astype(bool), np.full(rows, length + 1, dtype=np.int32))
    columns = split.columns(plain_layout(batch, tokens[:, 1:].astype(bool), exact))
    with saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = split.hidden(columns)
    assert hidden.requires_grad, "nothing is trained"
    return sum(kept.values())
