"""The name of a backend in, the backend out; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from typing import cast

from macft.backends.base import Backend
from macft.errors import MissingPackageError, UsageError

BACKENDS = {
    "mlx": "macft.backends.mlx.backend:MlxBackend",
    "torch": "macft.backends.torch.backend:TorchBackend",
}
PACKAGES = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "transformers", "peft")}


def is_installed(name: str) -> bool:
    """Whether the packages of a backend can be found; imports none of them."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[name])


def choose_backend(name: str) -> str:
    """What `auto` stands for on this machine; any other name is checked and returned.

    MLX on Apple Silicon, PyTorch where there is an NVIDIA GPU, else MLX if it has a fast BLAS,
    else PyTorch. Raises MissingPackageError with the command to install what is missing.
    """
    if name == "auto":
        return _choose()
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; there are auto, {', '.join(BACKENDS)}")
    if not is_installed(name):
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        raise MissingPackageError(
            f"the {name} backend needs {', '.join(missing)}, not installed here: pip install 'macft[{name}]'"
        )
    return name


def _choose() -> str:
    installed = [name for name in BACKENDS if is_installed(name)]
    if not installed:
        expected = "mlx" if sys.platform == "darwin" else "mlx]' or, for NVIDIA, 'macft[torch"
        raise MissingPackageError(f"no training engine is installed: pip install 'macft[{expected}]'")
    if len(installed) == 1:
        return installed[0]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mlx"
    if shutil.which("nvidia-smi") is not None:
        return "torch"
    blas = importlib.import_module("macft.backends.mlx.blas")
    return "mlx" if blas.is_fast() else "torch"


def load_backend(name: str) -> Backend:
    """The backend of this name, or the one `auto` chooses; raises as `choose_backend` does."""
    module, _, attribute = BACKENDS[choose_backend(name)].partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute)())
