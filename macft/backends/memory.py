"""Decide how many tokens of a step a device holds at once, and say what helps when it runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from macft.text import size

# What allocators lose between blocks, and the temporary values of one layer.
USABLE = 0.85
# Of each trained number a step holds a float32 gradient and two moments.
BYTES_PER_TRAINED = 12

_SMALLER_BASE = "take the base in 4 bits (quantization_bit: 4, or --quantization-bit 4), or a smaller one"
# what helps, by what was being done
LEVERS = {
    "train": "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much: the same curve) or "
    "cutoff_len, set gradient_checkpointing: true, or take the base in 4 bits (quantization_bit: 4)",
    "score": f"lower cutoff_len, per_device_train_batch_size or per_device_eval_batch_size, {_SMALLER_BASE}",
    "answer": f"give a shorter prompt, {_SMALLER_BASE}",
    "load": f"{_SMALLER_BASE}, or close what else uses the device",
}
Phase = Literal["train", "score", "answer", "load"]


@dataclass(frozen=True)
class PassPlan:
    """How a training step is computed: in passes of at most so many tokens, with checkpointing or without."""

    tokens_at_once: int
    checkpoints: bool
    note: str | None = None


def plan_passes(free: int, row_tokens: int, kept: float, checkpointed: float, *, checkpoints: bool) -> PassPlan:
    """Plan the passes of a step for `free` bytes.

    `row_tokens` is what a pass holds at the least: the longest row, or both answers of a pair. A token keeps `kept`
    bytes for the backward pass, or `checkpointed` bytes with checkpointing, which is switched on where the longest row
    does not fit without. A row that fits neither way is still tried: these are estimates.
    """
    usable = max(0.0, USABLE * free)
    if not checkpoints and row_tokens * kept <= usable:
        return PassPlan(max(row_tokens, int(usable / kept)), checkpoints=False)
    note = None
    if not checkpoints:
        note = (
            f"gradient_checkpointing is on: without it the longest row, {row_tokens} tokens, does not fit into the "
            f"{size(max(0, int(free)))} that are free"
        )
    return PassPlan(max(row_tokens, int(usable / checkpointed)), checkpoints=True, note=note)


def out_of_memory_text(device: str, doing: str, used: int, total: int, phase: Phase = "train") -> str:
    """One line for a device that ran out of memory while `doing` something; `used` of `total` bytes were taken."""
    return f"{device} is out of memory {doing}, with {size(used)} of {size(total)} in use: {LEVERS[phase]}"


def timeout_text(device: str, doing: str, phase: Phase = "train") -> str:
    """One line for a device whose driver stopped it while `doing` something, as it took too long."""
    return f"{device} was stopped by its driver {doing}, as one operation took too long: {LEVERS[phase]}"
