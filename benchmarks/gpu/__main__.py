"""Prove macft on the GPU of this machine: parity, memory, speed, in one table of expected and found.

    python -m benchmarks.gpu [--engine torch] [--engine mlx] [--only CHECK ...] [--seconds 360] [--markdown FILE]

Needs no network and no installed macft. Each engine runs in a process of its own; without a GPU, or without an
engine, its checks say why they are skipped, and so do those for which no time is left. Ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.table import FAILED, Row, markdown

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("torch", "mlx")
# of the time, where another engine is still to come
FIRST = 0.65


def run_engine(engine: str, only: list[str], seconds: float) -> list[Row]:
    """The rows of one engine, shown as they come; no check begins when the seconds are over."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{engine}_checks", str(seconds), *only]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"check": '):  # a library's own words
                continue
            rows.append(Row(**json.loads(line) | {"engine": engine}))
            row = rows[-1]
            print(f"{row.status:<8} {engine}: {row.check}: {row.found} ({row.seconds:.0f} s)", flush=True)
    if process.returncode:
        rows.append(Row("all", "no error", f"the process ended with {process.returncode}", FAILED, engine=engine))
    return rows


def main() -> int:
    """Run the checks, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    rows: list[Row] = []
    engines = options.engine or list(ENGINES)
    for engine in engines:
        left = options.seconds - (time.perf_counter() - start)
        rows += run_engine(engine, options.only, left if engine == engines[-1] else FIRST * left)
    table = markdown(rows)
    print(f"\n{table}\n\n{time.perf_counter() - start:.0f} s")
    if options.markdown:
        options.markdown.write_text(table + "\n")
    return int(any(row.status == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
