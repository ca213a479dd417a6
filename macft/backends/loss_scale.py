"""Scale float16 losses, as torch.amp.GradScaler does, so that small gradients do not become zero."""

from __future__ import annotations

import numpy as np

# GradScaler's defaults
_START = 65536.0
_GROWTH = 2.0
_GROWTH_INTERVAL = 2000


class LossScale:
    """The factor that a float16 loss is multiplied by, and its gradients divided by.

    Gradients that overflow cost the step: the factor is halved. After 2000 steps without one it is doubled. At
    factor 1 nothing is left to halve: what overflows then is the run's own divergence.
    """

    def __init__(self) -> None:
        self.value = _START
        self._steps_since_change = 0

    def skips(self, *, is_finite: bool) -> bool:
        """Whether to skip the step whose gradients these are; adjusts the factor for the next one."""
        if not is_finite and self.value > 1.0:
            self.value /= _GROWTH
            self._steps_since_change = 0
            return True
        self._steps_since_change += 1
        if self._steps_since_change == _GROWTH_INTERVAL:
            self.value *= _GROWTH
            self._steps_since_change = 0
        return False

    def state(self, steps_taken: int) -> np.ndarray:
        """float32 [3] for a checkpoint: the factor, the steps since it changed, and the steps not skipped."""
        return np.array([self.value, self._steps_since_change, steps_taken], dtype=np.float32)

    def restore(self, state: np.ndarray) -> int:
        """Go back to a saved state; returns the steps not skipped."""
        self.value, self._steps_since_change = float(state[0]), int(state[1])
        return int(state[2])
