"""Choose a training engine and load models with it; no engine is imported before it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from typing import cast

from macft.backends.base import EngineModule, LogitsModule, Model, ModelSpec, OptimizerSpec
from macft.engines import BACKENDS
from macft.errors import MissingPackageError, UsageError
from macft.process_group import ProcessGroup


def is_installed(name: str) -> bool:
    """Whether the packages of an engine can be found; imports none of them."""
    return not _missing_packages(name)


def _missing_packages(name: str) -> list[str]:
    return [package for package in BACKENDS[name].packages if importlib.util.find_spec(package) is None]


def choose_backend(name: str) -> str:
    """What `auto` stands for on this machine; any other name is checked and returned.

    MLX on Apple Silicon, PyTorch where there is an NVIDIA GPU, else MLX if it has a fast BLAS,
    else PyTorch. Raises MissingPackageError with the command to install what is missing.
    """
    if name == "auto":
        return _choose()
    if name not in BACKENDS:
        raise UsageError(f"backend: found {name!r}, expected one of auto, {', '.join(BACKENDS)}")
    if missing := _missing_packages(name):
        raise MissingPackageError(
            f"the {name} backend needs {', '.join(missing)}, not installed here: {BACKENDS[name].install}"
        )
    return name


def _choose() -> str:
    installed = [engine for name, engine in BACKENDS.items() if is_installed(name)]
    if not installed:
        commands = (f"{engine.install} for {engine.hardware}" for engine in BACKENDS.values())
        raise MissingPackageError(f"no training engine is installed: {', or '.join(commands)}")
    has_metal = sys.platform == "darwin" and platform.machine() == "arm64"
    accelerator = "Metal" if has_metal else "CUDA" if shutil.which("nvidia-smi") is not None else None
    for engine in installed:
        if engine.accelerator == accelerator:
            return engine.name
    # the check may have to import an engine: not where there is no choice
    for engine in installed[:-1]:
        if _is_fast_on_cpu(engine.cpu_check):
            return engine.name
    return installed[-1].name


def _is_fast_on_cpu(check: str | None) -> bool:
    if check is None:
        return True
    module, _, function = check.partition(":")
    return bool(getattr(importlib.import_module(module), function)())


def load_model(backend: str, spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> Model:
    """Load a model with the engine of this name, or the one that `auto` chooses; with `optimizer`, to train it.

    Raises as `choose_backend` and `EngineModule.load` do.
    """
    engine = cast(EngineModule, importlib.import_module(BACKENDS[choose_backend(backend)].module))
    return engine.load(spec, optimizer, group)


def load_logits_module(backend: str) -> LogitsModule:
    """What the engine of this name offers for checking a conversion."""
    return cast(LogitsModule, importlib.import_module(BACKENDS[backend].logits_module))
