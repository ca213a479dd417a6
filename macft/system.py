"""Keep a Mac awake and measure the memory of this process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_awake() -> Iterator[None]:
    """On macOS, `caffeinate` holds the machine awake for as long as this block, or process, lives."""
    if sys.platform != "darwin" or shutil.which("caffeinate") is None:
        yield
        return
    process = subprocess.Popen(["caffeinate", "-i", "-m", "-w", str(os.getpid())])
    try:
        yield
    finally:
        process.terminate()


def peak_process_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
