"""The array functions of `macft.objectives.ops`, on MLX."""

from __future__ import annotations

import mlx.core as mx


class MlxOps:
    """One line a name."""

    def sum(self, x: mx.array) -> mx.array:
        """Sum over all elements."""
        return mx.sum(x)
