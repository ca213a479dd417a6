"""Keep the examples of a packed row apart in mlx-lm models, by masks and by rotations that restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class PackedCache:
    """A cache for packed rows, the same for every layer: it keeps nothing, but gives the positions and the mask.

    `positions` is int32 [R, L]; each 0 begins an example. As `offset` it reaches the layers' rotary modules.
    """

    def __init__(self, positions: mx.array):
        self.offset = positions
        self._segments = mx.cumsum(positions == 0, axis=1)
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(self, *_args: Any, window_size: int | None = None, **_kwargs: Any) -> mx.array:
        """bool [R, 1, L, L]: the same example, not later, and no more than a window before."""
        if window_size not in self._masks:
            columns = mx.arange(self._segments.shape[1])
            mask = columns[:, None] >= columns
            if window_size is not None:
                mask = mask & (columns[:, None] < columns + window_size)
            same = self._segments[:, :, None] == self._segments[:, None, :]
            self._masks[window_size] = (same & mask)[:, None]
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The same keys and values."""
        return keys, values


class RestartingRope:
    """Stands in for a rotary module: given a position for every token, it rotates each token by itself."""

    def __init__(self, rope: nn.Module):
        self.rope = rope

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """x: [R, H, L, D]; offset: int, or one per row, or [R, L]."""
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            return self.rope(x, offset=offset)
        rows, heads, length, width = x.shape
        # the rotation takes one offset per row: every token becomes a row of its own
        tokens = x.transpose(0, 2, 1, 3).reshape(rows * length, heads, 1, width)
        rotated = self.rope(tokens, offset=offset.reshape(-1))
        return rotated.reshape(rows, length, heads, width).transpose(0, 2, 1, 3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rope, name)


def restarting_rope(model: nn.Module) -> Callable[[], None]:
    """Put a `RestartingRope` before every rotary module of a model; returns a function that removes them."""
    owners = [
        (module, name)
        for _, module in model.named_modules()
        for name, child in module.items()
        if name in ("rope", "rotary_emb") and isinstance(child, nn.Module)
    ]
    for module, name in owners:
        # An instance attribute shadows the module's entry for reading; the parameter tree stays.
        object.__setattr__(module, name, RestartingRope(module[name]))

    def restore() -> None:
        for module, name in owners:
            object.__delattr__(module, name)

    return restore
