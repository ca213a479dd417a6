"""Ask the system: on/off environment variables, installed packages, cores, memory; keep a Mac awake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from macft.errors import ConfigError

_ON = ("1", "true", "yes", "on", "y")
_OFF = ("0", "false", "no", "off", "n", "")


def is_on(name: str) -> bool:
    """Whether an environment variable says yes; ConfigError when it says neither yes nor no."""
    value = os.environ.get(name, "")
    if value.lower() not in (*_ON, *_OFF):
        raise ConfigError(
            f"the environment variable {name} is {value!r}; set it to one of {', '.join(_ON)}, or to one of "
            f"{', '.join(_OFF[:-1])}, or unset it"
        )
    return value.lower() in _ON


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int:
    """The memory of this machine in bytes; 0 on Windows, where Python cannot tell."""
    return 0 if sys.platform == "win32" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def keep_awake() -> Iterator[None]:
    """On macOS, keep the machine awake with `caffeinate` for as long as this block, or process, lives."""
    if sys.platform != "darwin" or shutil.which("caffeinate") is None:
        yield
        return
    process = subprocess.Popen(["caffeinate", "-i", "-m", "-w", str(os.getpid())])
    try:
        yield
    finally:
        process.terminate()


def peak_process_memory() -> int:
    """Largest resident set of this process so far, in bytes; 0 on Windows, where Python cannot tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
