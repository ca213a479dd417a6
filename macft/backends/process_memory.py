"""How much memory this process has used at most."""

from __future__ import annotations

import resource
import sys


def peak_process_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
