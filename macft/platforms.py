"""Say whether this Python, on this system, can run macft.

`make` runs this file before it installs anything, so it imports nothing of macft and is read by any Python from 3.6 on.
"""

import platform
import subprocess
import sys

OLDEST_PYTHON = (3, 10)
OLDEST_MACOS = 14


def problem() -> str:
    """Why macft cannot run here and what to do, in one sentence; empty where it can."""
    if sys.platform == "win32":
        return "Windows itself is not served: install WSL2 (wsl --install), and use macft inside of it"
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return _of_intel()
        release = platform.mac_ver()[0]
        # a Python built for very old systems is told 10.16 by all newer ones
        if release != "10.16" and int(release.split(".")[0]) < OLDEST_MACOS:
            return f"macOS {release} is too old: MLX and PyTorch need macOS {OLDEST_MACOS} or newer; update macOS"
    if sys.version_info[:2] < OLDEST_PYTHON:
        get = "brew install python@3.12" if sys.platform == "darwin" else "install a newer one"
        return (
            f"this is Python {platform.python_version()} ({sys.executable}), and macft needs "
            f"{'.'.join(map(str, OLDEST_PYTHON))} or newer: {get}, then name it: make quickstart PYTHON=python3.12"
        )
    return ""


def _of_intel() -> str:
    asked = subprocess.run(
        ["sysctl", "-n", "hw.optional.arm64"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    if asked.stdout.strip() == b"1":
        return (
            f"this Python ({sys.executable}) is for Intel Macs and runs under Rosetta, where neither engine does: in a "
            "terminal that is not under Rosetta, install one for Apple silicon, then name it: make quickstart "
            "PYTHON=python3.12"
        )
    return (
        "this is an Intel Mac, for which MLX and PyTorch make no releases any more: use a Mac with Apple silicon, or "
        "Linux"
    )


if __name__ == "__main__":
    sys.exit(problem() or None)
