"""The few array functions that objectives are written over, and their NumPy form."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = Any


class Ops(Protocol):
    """Array functions that every backend offers, beside the operators + - * / on its arrays."""

    def sum(self, x: Array) -> Array:
        """Sum over all elements, as a scalar array."""


class NumpyOps:
    """The oracle of the tests, and what evaluation uses."""

    def sum(self, x: np.ndarray) -> Any:
        """Sum over all elements, in double precision."""
        return np.float64(np.sum(x, dtype=np.float64))
