"""Stack two LoRA adapters of one base into one that does what both do, and take the second out again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from macft.weights.adapters.peft import State
from macft.weights.tensors.lazy import Array

_A, _B = ".lora_A.weight", ".lora_B.weight"


def stack_adapters(
    first: Mapping[str, Array], first_rank: int, first_scale: float, state: Mapping[str, Array], scale: float
) -> State:
    """An adapter of scale `scale` equal to both: A = [A1; A2], B = [B1 s1/s2, B2]; the second is kept to the bit.

    A [rank, in], B [out, rank] under PEFT's names; a module that only one adapter has gets zeros for the other.
    """
    rank = next(value.shape[0] for name, value in state.items() if name.endswith(_A))
    stacked: State = {}
    for module in sorted({name.removesuffix(_A) for name in (*first, *state) if name.endswith(_A)}):
        known = first if module + _A in first else state
        width, height = known[module + _A].shape[1], known[module + _B].shape[0]
        first_a = first.get(module + _A, np.zeros((first_rank, width), np.float32))
        first_b = first.get(module + _B, np.zeros((height, first_rank), np.float32))
        second_a = state.get(module + _A, np.zeros((rank, width), np.float32))
        second_b = state.get(module + _B, np.zeros((height, rank), np.float32))
        stacked[module + _A] = np.concatenate([first_a, second_a]).astype(np.float32)
        stacked[module + _B] = np.concatenate([first_b * (first_scale / scale), second_b], axis=1).astype(np.float32)
    return stacked


def unstack_adapter(stacked: Mapping[str, Array], first_rank: int, targets: tuple[str, ...]) -> State:
    """The second adapter of a stack, limited to modules whose names end in one of `targets`."""
    state: State = {}
    for name, value in stacked.items():
        module = name.removesuffix(_A).removesuffix(_B)
        if any(module.endswith(f".{target}") for target in targets):
            state[name] = value[first_rank:] if name.endswith(_A) else np.ascontiguousarray(value[:, first_rank:])
    return state
