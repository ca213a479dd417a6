"""Choose a training engine and load models with it; no engine is imported before it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys
from functools import cache
from typing import TYPE_CHECKING, cast

from macft.backends.nvidia import (
    growing_segments,
    torch_build,
    torch_is_for_cuda,
    visible_cards,
    why_torch_sees_none,
)
from macft.engines import BACKENDS
from macft.errors import MissingPackageError, UsageError
from macft.process_group import ProcessGroup

if TYPE_CHECKING:
    # the doctor asks this module on machines that lack what the contract needs
    from macft.backends.base import EngineModule, LogitsModule, Model, ModelSpec, OptimizerSpec

logger = logging.getLogger("macft")


def is_installed(name: str) -> bool:
    """Whether the packages of an engine can be found; imports none of them."""
    return not _missing_packages(name)


def _missing_packages(name: str) -> list[str]:
    return [package for package in BACKENDS[name].packages if importlib.util.find_spec(package) is None]


def choose_backend(name: str) -> str:
    """What `auto` stands for on this machine; any other name is checked and returned.

    MLX on Apple Silicon, PyTorch where it is built for CUDA and there is an NVIDIA GPU, else MLX if it has a fast
    BLAS, else PyTorch. Raises MissingPackageError with the command to install what is missing.
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
    has_cuda = not has_metal and bool(visible_cards()) and torch_is_for_cuda()
    accelerator = "Metal" if has_metal else "CUDA" if has_cuda else None
    for engine in installed:
        if engine.accelerator == accelerator:
            return engine.name
    # the check may have to import an engine: not where there is no choice
    for engine in installed[:-1]:
        if engine.cpu_check is None or _ask(engine.cpu_check):
            return engine.name
    return installed[-1].name


def _ask(check: str) -> bool:
    module, _, function = check.partition(":")
    with growing_segments():
        return bool(getattr(importlib.import_module(module), function)())


@cache
def unused_gpu(backend: str) -> str | None:
    """Why an engine does not compute on the NVIDIA GPU of this machine, in one line with the remedy.

    None where it does, where there is none, and where CUDA_VISIBLE_DEVICES hides it. Only where there is one is the
    engine imported, to ask it. Raises ModelError for a GPU that the engine has no code for.
    """
    cards = visible_cards()
    if not cards or _ask(BACKENDS[backend].gpu_check):
        return None
    build = torch_build()
    if BACKENDS[backend].accelerator != "CUDA" and build is not None and build.cuda is not None:
        return f"{cards[0]} is here, and the {backend} engine does not use it; --backend torch does"
    return why_torch_sees_none(cards[0], build)


@cache
def _warn_of_unused_gpu(backend: str) -> None:
    if reason := unused_gpu(backend):
        logger.warning("computing on the CPU: %s", reason)


def load_model(backend: str, spec: ModelSpec, optimizer: OptimizerSpec | None, group: ProcessGroup) -> Model:
    """Load a model with the engine of this name, or the one that `auto` chooses; with `optimizer`, to train it.

    Raises as `choose_backend` and `EngineModule.load` do.
    """
    name = choose_backend(backend)
    _warn_of_unused_gpu(name)
    with growing_segments():
        engine = cast("EngineModule", importlib.import_module(BACKENDS[name].module))
        return engine.load(spec, optimizer, group)


def load_logits_module(backend: str) -> LogitsModule:
    """What the engine of this name offers for checking a conversion."""
    return cast("LogitsModule", importlib.import_module(BACKENDS[backend].logits_module))
