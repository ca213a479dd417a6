"""Implement the array functions of `macft.objectives.ops` on PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class TorchOps:
    """One line per name."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all elements."""
        return torch.sum(x)

    def row_sum(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, T] -> [rows]."""
        return x.sum(dim=1)

    def log_sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """-log(1 + exp(-x))."""
        return F.logsigmoid(x)

    def log(self, x: torch.Tensor) -> torch.Tensor:
        """Natural logarithm."""
        return torch.log(x)

    def expm1(self, x: torch.Tensor) -> torch.Tensor:
        """exp(x) - 1."""
        return torch.expm1(x)

    def maximum(self, x: torch.Tensor, low: float) -> torch.Tensor:
        """Elementwise."""
        return x.clamp(min=low)

    def minimum(self, x: torch.Tensor, high: float) -> torch.Tensor:
        """Elementwise."""
        return x.clamp(max=high)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """x as a constant."""
        return x.detach()
