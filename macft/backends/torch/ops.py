"""Implement the array functions of `macft.objectives.ops` on PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class TorchOps:
    """`macft.objectives.ops.Ops`, whose docstrings hold for its methods."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sum(x)

    def row_sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1)

    def log_sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(x)

    def log(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)

    def expm1(self, x: torch.Tensor) -> torch.Tensor:
        return torch.expm1(x)

    def maximum(self, x: torch.Tensor, low: float) -> torch.Tensor:
        return x.clamp(min=low)

    def minimum(self, x: torch.Tensor, high: float) -> torch.Tensor:
        return x.clamp(max=high)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()
