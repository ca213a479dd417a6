"""The array functions of `macft.objectives.ops`, on PyTorch."""

from __future__ import annotations

import torch


class TorchOps:
    """One line a name."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all elements."""
        return torch.sum(x)
