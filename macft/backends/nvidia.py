"""Ask NVIDIA's driver which GPUs this machine has, and say why PyTorch does not use them."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The oldest driver for each CUDA of PyTorch's builds. Source: NVIDIA, CUDA minor version compatibility.
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
# CUDA 13 has no code for older GPUs.
_TURING = (7, 5)
_NEWEST_BUILD = "pip install --force-reinstall torch"
# the last builds for drivers before 580, and for GPUs before Turing
OLDER_BUILD = "pip install --force-reinstall 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
# the variable that PyTorch reads once, as it starts to use CUDA, and its older name, which gives way to it
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TIMEOUT = 60


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    driver: str
    memory: int  # bytes; 0 where the driver does not tell
    capability: tuple[int, int] | None  # None where the driver does not tell

    def __str__(self) -> str:
        return f"{self.name} (driver {self.driver})"


@dataclass(frozen=True)
class TorchBuild:
    """What an installed PyTorch was built for; `cuda` is None for one without CUDA."""

    version: str
    cuda: str | None


def visible_cards() -> tuple[Card, ...]:
    """The GPUs that nvidia-smi lists, in the order of CUDA_VISIBLE_DEVICES where that holds numbers of them.

    None where nvidia-smi is missing or fails, or where the user hides them.
    """
    program = shutil.which("nvidia-smi")
    if program is None or is_hidden():
        return ()
    cards = _cards(program)
    numbers = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    chosen = tuple(cards[int(number)] for number in numbers if number.isdigit() and int(number) < len(cards))
    # a number of no GPU hides all from CUDA, by a mistake that is to be told of them
    return chosen or cards


@cache
def _cards(program: str) -> tuple[Card, ...]:
    """What nvidia-smi says, asked once: it takes up to a second on a machine of many GPUs."""
    fields = "memory.total,driver_version,name"
    # older drivers do not know their GPU's capability
    lines = _ask(program, f"compute_cap,{fields}") or [f"[N/A], {line}" for line in _ask(program, fields)]
    return tuple(_card(line) for line in lines)


def is_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value is not None and value.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def driver_fails() -> bool:
    """Whether nvidia-smi is installed and names no GPU."""
    return shutil.which("nvidia-smi") is not None and not is_hidden() and not visible_cards()


def _ask(program: str, fields: str) -> list[str]:
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if ran.returncode else [line for line in ran.stdout.splitlines() if line.count(", ") >= fields.count(",")]


def _card(line: str) -> Card:
    capability, mebibytes, driver, name = line.split(", ", 3)
    major, _, minor = capability.partition(".")
    return Card(
        name=name,
        driver=driver,
        memory=int(mebibytes) << 20 if mebibytes.isdigit() else 0,
        capability=(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None,
    )


@contextmanager
def growing_segments() -> Iterator[None]:
    """Let a PyTorch that first uses CUDA within this block reserve memory in segments that grow.

    Rows of ever other lengths would leave much of a GPU's memory in pieces too small to use. What the user sets counts.
    """
    if any(name in os.environ for name in _ALLOCATOR):
        yield
        return
    os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    try:
        yield
    finally:
        # the process is the caller's: its children and its other libraries see what they saw
        del os.environ[_ALLOCATOR[0]]


def torch_build() -> TorchBuild | None:
    """What torch/version.py says, without importing torch; None where it is not installed or says nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        source = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    values: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            values[ast.unparse(target)] = node.value.value
    if "cuda" not in values:
        return None
    cuda = values["cuda"]
    return TorchBuild(str(values.get("__version__")), cuda if isinstance(cuda, str) else None)


def torch_is_for_cuda() -> bool:
    """Whether an installed PyTorch may use NVIDIA GPUs; one that says nothing of its build may."""
    build = torch_build()
    return build is None or build.cuda is not None


def why_torch_sees_none(card: Card, build: TorchBuild | None) -> str:
    """One line for a GPU that the driver knows and PyTorch does not see: the reason and the remedy."""
    if build is None:
        return f"{card} is here, and PyTorch is not: pip install 'macft[torch]'"
    found = f"{card} is here, but torch {build.version}"
    if build.cuda is None:
        return f"{found} is a build without CUDA: {build_for(card)}"
    major = build.cuda.partition(".")[0]
    oldest = _OLDEST_DRIVER.get(major, 0)
    if _driver_number(card) < oldest:
        remedy = f"update the driver, or {OLDER_BUILD}" if major == "13" else "update the driver"
        return f"{found} is built for CUDA {build.cuda}, which needs driver {oldest} or newer: {remedy}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
    return f"{found} (CUDA {build.cuda}) sees no GPU{reason}: python -c 'import torch; torch.cuda.init()' says why"


def build_for(card: Card) -> str:
    """The command that installs a PyTorch which runs with this GPU and its driver."""
    has_old_driver = _driver_number(card) < _OLDEST_DRIVER["13"]
    is_old = card.capability is not None and card.capability < _TURING
    return OLDER_BUILD if has_old_driver or is_old else _NEWEST_BUILD


def _driver_number(card: Card) -> int:
    number = card.driver.partition(".")[0]
    # a driver that does not tell its version is not called too old
    return int(number) if number.isdigit() else max(_OLDEST_DRIVER.values())
