"""Give MLX's CPU build the settings of a Mac's GPU: compiled steps, padded shapes, 16 bits, passes by memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

GB = 10**9


@dataclass
class Mac:
    """What MLX says of the GPU of a Mac, and the limits that it was asked to keep."""

    info: dict[str, Any] = field(
        default_factory=lambda: {
            "device_name": "Apple M4 Pro",
            "architecture": "applegpu_g16s",
            "max_buffer_length": 28 * GB,
            "max_recommended_working_set_size": 37 * GB,
            "memory_size": 48 * GB,
            "resource_limit": 499000,
        }
    )
    limits: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    """Pretend to be a Mac, whose `info` a test may change."""
    import mlx.core as mx

    from macft.backends.mlx import device

    pretended = Mac()
    monkeypatch.setattr(device, "device_info", lambda: pretended.info)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    for kind in ("cache", "wired"):
        monkeypatch.setattr(mx, f"set_{kind}_limit", lambda limit, kind=kind: pretended.limits.update({kind: limit}))
    yield pretended
