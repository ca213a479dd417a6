"""Keep tests apart: each starts from the same state, and one that leaves the process changed fails.

What fails a test: loggers of macft and the root one, os.environ, the current folder, sys.path, sys.argv,
modules replaced or removed, signal handlers, settings of the engines. What is reset without a word: random
numbers and macft's caches. State is compared inside of session and module fixtures, which may set things up.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# pytest says the phase of the test; the others are set by importing the engines and what stands on them
_FREE = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
)
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class LoggerState:
    """What a test may change of a logger."""

    level: int
    handlers: tuple[logging.Handler, ...]
    propagate: bool
    disabled: bool
    filters: tuple[Any, ...]
    # what it answers, which is kept apart from the level and outlives it where setLevel is gone around
    enabled: tuple[bool, ...]


_NEW_LOGGER = LoggerState(logging.NOTSET, (), True, False, (), ())


@dataclass(frozen=True)
class State:
    """What tests share in a process."""

    loggers: dict[str, LoggerState]
    environ: dict[Any, Any]
    folder: str
    path: tuple[str, ...]
    argv: tuple[str, ...]
    modules: dict[str, ModuleType]
    signals: tuple[Any, ...]
    engines: dict[str, Any]


def take() -> State:
    """The state now."""
    return State(
        loggers={name or "root": _of_logger(logging.getLogger(name)) for name in _logger_names()},
        environ=_environ(),
        folder=_folder(),
        path=tuple(sys.path),
        argv=tuple(sys.argv),
        modules=sys.modules.copy(),
        signals=tuple(map(signal.getsignal, _SIGNALS)),
        engines={name: get() for name, (get, _) in _engine_settings().items()},
    )


def leaks(before: State) -> list[str]:
    """What differs now, one clause each; it goes behind the words "the test leaves"."""
    found = _logger_leaks(before.loggers)
    if (environ := _environ()) != before.environ:
        found += _environ_leaks(before.environ, environ)
    if (folder := _folder()) != before.folder:
        found.append(f"the current folder at {folder}")
    if tuple(sys.path) != before.path:
        changed = [f"+{one}" for one in sys.path if one not in before.path]
        changed += [f"-{one}" for one in before.path if one not in sys.path]
        found.append(f"sys.path changed: {' '.join(changed) or 'in another order'}")
    if tuple(sys.argv) != before.argv:
        found.append(f"sys.argv at {sys.argv}")
    found += [f"the module {name} {how}" for name, how in _module_leaks(before.modules).items()]
    for one, handler in zip(_SIGNALS, before.signals, strict=True):
        if signal.getsignal(one) is not handler:
            found.append(f"a handler of {one.name}: {signal.getsignal(one)}")
    for name, (get, _) in _engine_settings().items():
        # an engine that the test was the first to load has no state before
        if name in before.engines and (value := get()) != before.engines[name]:
            found.append(f"{name} at {value}, found {before.engines[name]}")
    return found


def put_back(before: State) -> None:
    """Make the state what it was."""
    for name in _logger_names():
        logger = logging.getLogger(name)
        old = before.loggers.get(name or "root", _NEW_LOGGER)
        logger.handlers = [*old.handlers, *filter(_is_of_pytest, logger.handlers)]
        logger.filters = list(old.filters)
        logger.propagate, logger.disabled = old.propagate, old.disabled
        # never the attribute alone: setLevel makes a logger forget which levels it passed on
        logger.setLevel(old.level)
    for key in _environ().keys() - before.environ.keys():
        del os.environ[os.environ.decodekey(key)]
    os.environ.update({os.environ.decodekey(key): os.environ.decodevalue(x) for key, x in before.environ.items()})
    if _folder() != before.folder:
        os.chdir(before.folder)
    sys.path[:], sys.argv[:] = before.path, before.argv
    sys.modules.update({name: before.modules[name] for name in _module_leaks(before.modules)})
    for one, handler in zip(_SIGNALS, before.signals, strict=True):
        if handler is not None:  # None: set by no Python code
            signal.signal(one, handler)
    for name, (get, put) in _engine_settings().items():
        if name in before.engines and get() != before.engines[name]:
            put(before.engines[name])


def seed_all(seed: int = 0) -> None:
    """Seed every source of random numbers that is loaded."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        # torch.manual_seed asks for every kind of device there is, which takes 0.1 ms
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
    if mlx := sys.modules.get("mlx.core"):
        mlx.random.seed(seed)


def clear_caches() -> None:
    """Empty macft's caches of results; what has no parameter is loaded once a process, as a library is."""
    for function in _cached_functions():
        function.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What tests share draws the same numbers, whichever test is the first to ask for it."""
    if fixturedef.scope != "function":
        seed_all()


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start from the same random numbers and empty caches; fail the test that leaves anything else changed."""
    # one fixture for both: each of them costs more than what it does
    seed_all()
    before = take()
    yield
    clear_caches()
    if found := leaks(before):
        put_back(before)
        pytest.fail("the test leaves " + "; ".join(found), pytrace=False)


# --- loggers


_named: dict[int, list[str | None]] = {}


def _logger_names() -> list[str | None]:
    known = logging.root.manager.loggerDict
    if len(known) not in _named:
        _named.clear()
        _named[len(known)] = [None, *(name for name in [*known] if name.partition(".")[0] == "macft")]
    return _named[len(known)]


def _is_of_pytest(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest.")


def _of_logger(logger: logging.Logger) -> LoggerState:
    return LoggerState(
        logger.level,
        tuple(handler for handler in logger.handlers if not _is_of_pytest(handler)),
        logger.propagate,
        logger.disabled,
        tuple(logger.filters),
        tuple(map(logger.isEnabledFor, _LEVELS)),
    )


def _logger_leaks(before: dict[str, LoggerState]) -> list[str]:
    found: list[str] = []
    for name in _logger_names():
        now = _of_logger(logging.getLogger(name))
        old = before.get(name or "root", _NEW_LOGGER)
        title = f"the logger {name or 'root'}"
        if now.level != old.level:
            found.append(f"{title} at {logging.getLevelName(now.level)}")
        elif old.enabled and now.enabled != old.enabled and not found:
            found.append(f"{title} answering as for another level (setLevel empties what it remembers)")
        if now.handlers != old.handlers:
            found.append(f"{title} with handlers {list(now.handlers)}, found {list(old.handlers)}")
        found += [
            f"{title} with {key} {getattr(now, key)!r}"
            for key in ("propagate", "disabled", "filters")
            if getattr(now, key) != getattr(old, key)
        ]
    return found


# --- the process


def _environ() -> dict[Any, Any]:
    """The variables as the system has them, which spares decoding each of them twice a test."""
    environ = os.environ._data.copy()
    for name in _FREE:
        environ.pop(os.environ.encodekey(name), None)
    return environ


def _environ_leaks(before: dict[Any, Any], now: dict[Any, Any]) -> list[str]:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    names = map(os.environ.decodekey, changed)
    return [
        f"{name}={os.environ[name]} in os.environ" if name in os.environ else f"no {name} in os.environ"
        for name in names
    ]


def _folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return "a folder that is gone"


def _module_leaks(before: dict[str, ModuleType]) -> dict[str, str]:
    """name -> what happened to it; a module that is new was merely imported."""
    # comparing in order takes a tenth of the time of looking each up
    if [*islice(sys.modules.values(), len(before))] == [*before.values()]:
        return {}
    return {
        name: "replaced" if name in sys.modules else "removed from sys.modules"
        for name, module in before.items()
        if sys.modules.get(name, sys) is not module
    }


# --- the engines and macft


def _engine_settings() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """name -> (get, set) of the settings of each engine that is loaded."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
    if torch := sys.modules.get("torch"):
        found |= {
            "torch's threads": (torch.get_num_threads, torch.set_num_threads),
            "torch's default type": (torch.get_default_dtype, torch.set_default_dtype),
            "torch's gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
            "torch's determinism": (
                torch.are_deterministic_algorithms_enabled,
                torch.use_deterministic_algorithms,
            ),
        }
    if mlx := sys.modules.get("mlx.core"):
        found["MLX's device"] = (mlx.default_device, mlx.set_default_device)
    return found


_known: dict[int, list[Any]] = {}


def _cached_functions() -> list[Any]:
    count = len(sys.modules)
    if count not in _known:
        _known.clear()
        members = [
            member
            for name, module in sys.modules.copy().items()
            if name.partition(".")[0] == "macft" and module is not None
            for member in vars(module).values()
            if hasattr(member, "cache_clear") and member.__wrapped__.__code__.co_argcount
        ]
        _known[count] = list({id(member): member for member in members}.values())
    return _known[count]
