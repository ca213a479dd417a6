"""Run training that must not begin, and take its message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from support.commands import Result, macft


def refused(folder: Path, *overrides: str, code: int = 1) -> str:
    """The message of a run that must not begin, after checking how it ended."""
    before = written(folder)
    result = macft("train", folder / "run.yaml", *overrides)
    assert written(folder) == before, "something was written"
    return message_of(result, code)


def written(folder: Path) -> dict[Path, int]:
    """Every file but those of the cache, with its date."""
    found = [path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts]
    return {path: path.stat().st_mtime_ns for path in found}


def message_of(result: Result, code: int) -> str:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    head, found, message = result.err.partition("error: ")
    assert found and not head.strip().endswith(":")
    headline, *problems = message.removesuffix("\n").split("\n")
    assert headline and all(problem.startswith("  ") for problem in problems), (
        "one line, or a headline and its problems"
    )
    return message.removesuffix("\n")


def changed_model(model: Path, folder: Path, **config: object) -> Path:
    """A copy of the model whose config.json says something else."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder
