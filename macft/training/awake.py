"""Keeps a Mac from falling asleep while a block runs."""

from __future__ import annotations

import os
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
