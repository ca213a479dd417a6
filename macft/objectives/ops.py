"""Define the few array functions that objectives are written over, and their NumPy form."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = Any


class Ops(Protocol):
    """Array functions that every backend offers besides slices, comparisons and + - * / on its arrays."""

    def sum(self, x: Array) -> Array:
        """Sum over all elements, as a scalar array."""

    def row_sum(self, x: Array) -> Array:
        """[rows, T] -> [rows]."""

    def log_sigmoid(self, x: Array) -> Array:
        """log(1 / (1 + exp(-x))), stable on both sides."""

    def log(self, x: Array) -> Array:
        """Natural logarithm."""

    def expm1(self, x: Array) -> Array:
        """exp(x) - 1, exact near 0."""

    def maximum(self, x: Array, low: float) -> Array:
        """x, or `low` where x is below it."""

    def minimum(self, x: Array, high: float) -> Array:
        """x, or `high` where x is above it."""

    def stop_gradient(self, x: Array) -> Array:
        """x as a constant."""


class NumpyOps:
    """Ops in double precision throughout, for evaluation and as the oracle in tests."""

    def sum(self, x: np.ndarray) -> Any:
        """Sum over all elements."""
        return np.float64(np.sum(x, dtype=np.float64))

    def row_sum(self, x: np.ndarray) -> Any:
        """[rows, T] -> [rows]."""
        return np.sum(x, axis=1, dtype=np.float64)

    def log_sigmoid(self, x: np.ndarray) -> Any:
        """-log(1 + exp(-x))."""
        return -np.logaddexp(0.0, -x)

    def log(self, x: np.ndarray) -> Any:
        """Natural logarithm."""
        return np.log(x)

    def expm1(self, x: np.ndarray) -> Any:
        """exp(x) - 1."""
        return np.expm1(x)

    def maximum(self, x: np.ndarray, low: float) -> Any:
        """Elementwise."""
        return np.maximum(x, low)

    def minimum(self, x: np.ndarray, high: float) -> Any:
        """Elementwise."""
        return np.minimum(x, high)

    def stop_gradient(self, x: np.ndarray) -> Any:
        """NumPy has no gradients."""
        return x
