"""Run the command line in tests, and build the small model folder and data it works on."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from macft.cli import main
from support.paths import CHECKOUT


def heed_ctrl_c() -> None:
    """For `preexec_fn`: a process started by a background job would ignore SIGINT, and Python with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def macft(*arguments: object) -> Result:
    """Run `macft ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("macft")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    try:
        with (
            patch.dict(os.environ),
            patch.object(sys, "argv", ["macft", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as stop:
        return Result(int(stop.code or 0), out.getvalue(), err.getvalue())
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        # not the attribute: a logger remembers which levels it passes on, and setLevel alone makes it forget
        logger.setLevel(level)
    raise AssertionError("main() always exits")


def macft_process(
    *arguments: object, cwd: Path | None = None, without: Iterable[str] = (), then: str = "", **environment: str
) -> Result:
    """Run `macft ARGUMENTS` in a process of its own, in which the modules `without` cannot be imported.

    `then` is Python code that runs when the command has ended.
    """
    code = "\n".join(
        [
            "import sys",
            f"for name in {list(without)!r}: sys.modules[name] = None",
            f"sys.argv = {['macft', *map(str, arguments)]!r}",
            "from macft.cli import main",
            "try: main()",
            f"finally: {then or 'pass'}",
        ]
    )
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


QUESTIONS = ("hello", "what is the capital of France?", "one two three", "你好", "the quick brown fox")


def write_chat_data(path: Path) -> Path:
    """Five conversations as `messages` rows."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Paris is the capital."}]}
        for text in QUESTIONS
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, **settings: object) -> Path:
    """A YAML file of these keys (JSON is YAML)."""
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
