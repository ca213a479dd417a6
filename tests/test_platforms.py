"""Which systems and Pythons are served, told in one sentence before anything is installed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import CHECKOUT
from support.fake_gpus import T4, plug_in

from macft import platforms


def pretend(monkeypatch, system: str, machine: str, release: str = "", version=(3, 12, 1)) -> str:
    """What is said on such a machine."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "executable", "python3")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), machine))
    monkeypatch.setattr(platform, "python_version", lambda: ".".join(map(str, version)))
    return platforms.problem()


def fake_program(folder: Path, name: str, text: str, monkeypatch) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return path


@pytest.mark.parametrize("release", ["14.0", "15.6.1", "26.2", "10.16"])
def test_a_mac_with_apple_silicon_is_served_from_macos_14_on(release, monkeypatch):
    assert pretend(monkeypatch, "darwin", "arm64", release) == ""
    assert pretend(monkeypatch, "linux", "x86_64") == ""


def test_an_older_macos_is_told_by_its_version(monkeypatch):
    assert pretend(monkeypatch, "darwin", "arm64", "13.7.1") == (
        "macOS 13.7.1 is too old: MLX and PyTorch need macOS 14 or newer; update macOS"
    )


def test_the_python_of_xcode_is_told_with_the_way_out(monkeypatch):
    assert pretend(monkeypatch, "darwin", "arm64", "15.0", (3, 9, 6)) == (
        "this is Python 3.9.6 (python3), and macft needs 3.10 or newer: brew install python@3.12, then name it: make "
        "quickstart PYTHON=python3.12"
    )
    assert "needs 3.10 or newer: install a newer one" in pretend(monkeypatch, "linux", "x86_64", "", (3, 8, 10))


def test_rosetta_and_an_intel_mac_are_told_apart(tmp_path, monkeypatch):
    fake_program(tmp_path, "sysctl", "echo 1", monkeypatch)
    assert pretend(monkeypatch, "darwin", "x86_64", "15.0").startswith(
        "this Python (python3) is for Intel Macs and runs under Rosetta, where neither engine does: "
    )
    # Intel Macs do not know the name
    fake_program(tmp_path, "sysctl", "echo \"unknown oid 'hw.optional.arm64'\" >&2; exit 1", monkeypatch)
    assert pretend(monkeypatch, "darwin", "x86_64", "15.0") == (
        "this is an Intel Mac, for which MLX and PyTorch make no releases any more: use a Mac with Apple silicon, or "
        "Linux"
    )


def test_windows_is_sent_to_wsl2(monkeypatch):
    assert "install WSL2 (wsl --install)" in pretend(monkeypatch, "win32", "AMD64")


def test_the_file_itself_says_nothing_here_and_needs_no_installation():
    command = [sys.executable, "-I", "-S", str(CHECKOUT / "macft" / "platforms.py")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    told = (
        f"import sys; sys.version_info = (3, 9, 6); import runpy; runpy.run_path({command[-1]!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert ran.returncode == 1 and "macft needs 3.10 or newer" in ran.stderr


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=CHECKOUT, env=environment, capture_output=True, text=True)


def test_make_stops_before_it_installs_with_a_python_that_is_too_old(tmp_path, monkeypatch):
    old = fake_program(tmp_path, "python3.9", "echo 'this is Python 3.9.6 and too old' >&2; exit 1", monkeypatch)
    done = make("quickstart", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0 and "this is Python 3.9.6 and too old" in done.stderr
    assert "venv" not in done.stdout and not (tmp_path / "venv").exists()


def test_make_says_how_to_be_rid_of_an_installation_that_an_old_python_left(tmp_path, monkeypatch):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake_program(venv / "bin", "python", "echo 'this is Python 3.9.6 and too old' >&2; exit 1", monkeypatch)
    done = make("quickstart", f"VENV={venv}")
    assert done.returncode != 0 and "this is Python 3.9.6 and too old" in done.stderr
    assert f"{venv} was made with it: rm -rf {venv}, then again" in done.stdout
    assert "Installing" not in done.stdout


def installs(tmp_path: Path, *arguments: str) -> str:
    """What `make quickstart` would do in a new folder."""
    return make("-n", "quickstart", f"VENV={tmp_path / 'venv'}", *arguments).stdout


def test_the_quickstart_takes_pytorch_where_the_driver_names_a_gpu(tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4)
    assert "--editable '.[torch]'" in installs(tmp_path)
    plug_in(tmp_path, monkeypatch, T4, fails=True)
    assert "--editable '.[mlx]'" in installs(tmp_path)
    plug_in(tmp_path, monkeypatch)
    assert "--editable '.[mlx]'" in installs(tmp_path)


def test_the_quickstart_takes_pytorch_from_the_index_that_is_named(tmp_path, monkeypatch):
    plug_in(tmp_path, monkeypatch, T4)
    wanted = "pip install --quiet 'torch==2.13.0' --index-url https://download.pytorch.org/whl/cu126"
    lines = installs(tmp_path, "TORCH_INDEX=https://download.pytorch.org/whl/cu126").splitlines()
    [pytorch] = [number for number, line in enumerate(lines) if line.endswith(wanted)]
    assert "--editable '.[torch]'" in lines[pytorch + 1]
    assert "index-url" not in installs(tmp_path)
    assert "index-url" not in installs(tmp_path, "TORCH_INDEX=https://host/cpu", "ENGINE=mlx")


def test_the_checks_of_a_gpu_run_without_an_installation_and_with_one(tmp_path, monkeypatch):
    venv = tmp_path / "venv"
    assert make("-n", "gpu-test", f"VENV={venv}").stdout.strip() == "python3 -m benchmarks.gpu"
    (venv / "bin").mkdir(parents=True)
    fake_program(venv / "bin", "python", "", monkeypatch)
    assert make("-n", "gpu-test", f"VENV={venv}").stdout.strip() == f"{venv}/bin/python -m benchmarks.gpu"
    named = make("-n", "gpu-test", f"VENV={venv}", "PYTHON=python3.13", "ENGINE=mlx").stdout.strip()
    assert named == "python3.13 -m benchmarks.gpu --engine mlx"
