"""An nvidia-smi and a PyTorch that tell of GPUs which are not here, as the real ones do."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

GIB = 1 << 30
# what the builds of torch 2.13 for CUDA 13 have code for
BUILT_FOR = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@dataclass(frozen=True)
class FakeGpu:
    """An NVIDIA GPU, with the memory that nvidia-smi tells in MiB."""

    name: str
    major: int
    minor: int
    mebibytes: int
    driver: str = "580.65.06"


T4 = FakeGpu("Tesla T4", 7, 5, 15_360)
RTX_3060 = FakeGpu("NVIDIA GeForce RTX 3060", 8, 6, 12_288)
P100 = FakeGpu("Tesla P100-PCIE-16GB", 6, 0, 16_384)
H100 = FakeGpu("NVIDIA H100 80GB HBM3", 9, 0, 81_559)

# NVIDIA's own words for a driver that does not run; drivers before 495 do not know the field compute_cap
_SMI = """\
#!/bin/sh
echo "$1" >> "$0.asked"
if [ -n "{fails}" ]; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
  exit 9
fi
case "$1" in
-L) {listed} ;;
--query-gpu=compute_cap,memory.total,driver_version,name)
  if [ -n "{is_old}" ]; then echo 'Field "compute_cap" is not a valid field to query.'; exit 2; fi
  {new} ;;
--query-gpu=memory.total,driver_version,name) {old} ;;
*) exit 2 ;;
esac
"""

_TORCH = """
from torch import version
from torch.version import __version__

class _Type:
    def __init__(self, name): self.name = name
    def __repr__(self): return "torch." + self.name

float32, bfloat16, float16 = map(_Type, ("float32", "bfloat16", "float16"))

class device:
    def __init__(self, type): self.type = type

class _Properties:
    total_memory = {memory}

class cuda:
    is_available = staticmethod(lambda: {is_seen})
    device_count = staticmethod(lambda: {count})
    get_device_name = staticmethod(lambda *_: {name!r})
    get_device_capability = staticmethod(lambda *_: {capability})
    get_arch_list = staticmethod(lambda: {built_for})
    get_device_properties = staticmethod(lambda *_: _Properties)
    is_bf16_supported = staticmethod(lambda including_emulation=True: including_emulation or {capability} >= (8, 0))

class backends:
    class cuda:
        enable_cudnn_sdp = staticmethod(lambda is_on: None)

    class mps:
        is_available = staticmethod(lambda: False)
"""


def plug_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu, fails: bool = False, is_old: bool = False
) -> None:
    """Put an nvidia-smi first in PATH that lists these GPUs, or fails, or is older than the field compute_cap.

    What it is asked stands in a file beside it: `questions`.
    """
    lines = [f"{gpu.mebibytes}, {gpu.driver}, {gpu.name}" for gpu in gpus]
    script = _SMI.format(
        fails="yes" if fails else "",
        is_old="yes" if is_old else "",
        listed=_echo([f"GPU {index}: {gpu.name} (UUID: GPU-{index})" for index, gpu in enumerate(gpus)]),
        new=_echo([f"{gpu.major}.{gpu.minor}, {line}" for gpu, line in zip(gpus, lines, strict=True)]),
        old=_echo(lines),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def questions(folder: Path) -> list[str]:
    """What the nvidia-smi in a folder was asked so far, by whatever process."""
    return (folder / "nvidia-smi.asked").read_text().splitlines()


def _echo(lines: list[str]) -> str:
    return "; ".join(f"echo '{line}'" for line in lines) or "echo 'No devices were found'; exit 6"


def install_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu, cuda: str | None = "13.0", sees: bool = True
) -> None:
    """Install, for processes started from here, a PyTorch built for `cuda` that sees these GPUs, or sees none."""
    version = "2.13.0" if cuda else "2.13.0+cpu"
    (folder / "torch").mkdir(parents=True)
    head = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: "
    (folder / "torch" / "version.py").write_text(f"{head}Optional[str] = None\n")
    first = gpus[0] if gpus and sees and cuda else None
    code = _TORCH.format(
        memory=0 if first is None else first.mebibytes << 20,
        is_seen=first is not None,
        count=0 if first is None else len(gpus),
        name=None if first is None else first.name,
        capability=(0, 0) if first is None else (first.major, first.minor),
        built_for=list(BUILT_FOR),
    )
    (folder / "torch" / "__init__.py").write_text(textwrap.dedent(code))
    info = folder / "torch-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
