"""Plan the passes of a step on a GPU by what short trial passes take in memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import exact, plain_layout
from macft.backends.memory import BYTES_PER_TRAINED, PassPlan, plan_passes
from macft.backends.mlx import device
from macft.backends.mlx.lora import Dropout
from macft.backends.mlx.model import checkpoint_layers
from macft.backends.mlx.out_of_memory import explaining_out_of_memory
from macft.backends.mlx.split import SplitModel, to_device
from macft.backends.mlx.step import Parameters, gradient_step, place
from macft.objectives.batch import Batch
from macft.objectives.losses import Sft

# Rows of so many tokens are tried: after one that ran out of memory, Metal computes nothing more.
_SHORTEST_TRIAL, _LONGEST_TRIAL = 16, 256


def plan_device_passes(
    split: SplitModel, spec: ModelSpec, masters: Parameters, dtype: mx.Dtype, dropout: Dropout | None
) -> PassPlan:
    """Plan the passes of a step on a GPU, and switch checkpointing on where the longest row does not fit without."""
    length = max(_SHORTEST_TRIAL, spec.row_length or spec.max_length)
    row_tokens = length * spec.rows_per_example
    trained = sum(value.size for value in masters.values())
    free = device.free_memory() - trained * BYTES_PER_TRAINED - split.head_bytes
    kept = token_bytes(split, length, masters, dtype, dropout)
    plan = plan_passes(free, row_tokens, kept, kept, checkpoints=spec.gradient_checkpointing)
    if plan.checkpoints and not spec.gradient_checkpointing:
        if not checkpoint_layers(split.model):
            return PassPlan(row_tokens, checkpoints=False)
        split.shares_prompts = False
        less = token_bytes(split, length, masters, dtype, dropout)
        plan = plan_passes(free, row_tokens, kept, less, checkpoints=False)
    return plan


def token_bytes(split: SplitModel, length: int, masters: Parameters, dtype: mx.Dtype, dropout: Dropout | None) -> float:
    """Bytes that a training pass takes for each token of a row of this length, without gradients and a head's chunks.

    The sum of a part for each token and of one for each pair of tokens, which attention has where it keeps its scores;
    both follow from three short rows.
    """
    longest = min(length, _LONGEST_TRIAL)
    lengths = [longest // 4, longest // 2, longest]
    peaks = [_peak(split, tokens, masters, dtype, dropout) for tokens in lengths]
    pairs, tokens, _ = np.polyfit(lengths, peaks, 2)
    if pairs < 0:
        pairs, tokens = 0.0, (peaks[2] - peaks[1]) / (lengths[2] - lengths[1])
    head = split.row_bytes if split.backbone is None else 0
    return max(1.0, float(tokens + pairs * length)) + head


def _peak(split: SplitModel, tokens: int, masters: Parameters, dtype: mx.Dtype, dropout: Dropout | None) -> int:
    """Bytes that a training pass over one row takes at the most; only its last token is scored."""
    row = np.ones((1, tokens + 1), dtype=np.int32)
    is_last = np.arange(tokens + 1)[None] == tokens
    segments = 1 + (np.arange(tokens + 1)[None] >= tokens // 2).astype(np.int32) if split.packs else None
    batch = Batch(row, is_last, np.array([tokens + 1], dtype=np.int32), segment_ids=segments)
    layout = plain_layout(batch, is_last[:, 1:], exact)
    keys = None
    if dropout is not None and dropout.rate > 0.0:
        keys = mx.random.split(mx.random.key(0), len(list(split.model.modules())))
    split.model.train()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    with explaining_out_of_memory(f"trying a row of {tokens} tokens"):
        step = gradient_step(split, dropout, Sft(), dtype)
        mx.eval(step(masters, to_device(batch.columns), to_device(layout.columns), keys, mx.array(1.0)))
    place(split.model, masters)
    return mx.get_peak_memory() - start
