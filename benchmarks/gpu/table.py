"""Collect the outcomes of checks on a device, as rows of one table."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

PASSED, FAILED, SKIPPED, MEASURED = "ok", "FAILED", "skipped", "measured"


@dataclass(frozen=True)
class Row:
    """One outcome: what was expected and what was found."""

    check: str
    expected: str
    found: str
    status: str
    seconds: float = 0.0
    engine: str = ""


class SkipCheck(Exception):  # noqa: N818
    """A check cannot run here; the message says why."""


Check = Callable[[], Iterator[Row]]


def outcome(check: str, expected: str, found: str, passes: bool) -> Row:
    """A row that passes or fails."""
    return Row(check, expected, found, PASSED if passes else FAILED)


def measured(check: str, expected: str, found: str) -> Row:
    """A row of a figure that has no limit."""
    return Row(check, expected, found, MEASURED)


def skipped(check: str, reason: str) -> Row:
    """A row of a check that this device is too small for."""
    return Row(check, "", reason, SKIPPED)


def run_all(checks: dict[str, Check], arguments: list[str]) -> None:
    """Run the checks and print each row as a line of JSON; an error in one is its row, and the next one runs.

    `arguments` are the seconds that there are, and the names of the checks to run; without names all are.
    """
    end, only = time.perf_counter() + float(arguments[0]), arguments[1:]
    for name, check in checks.items():
        if only and name not in only:
            continue
        start = time.perf_counter()
        try:
            for row in check():
                emit(row, start)
                start = time.perf_counter()
                if start > end:
                    raise SkipCheck("the time is over")
        except SkipCheck as reason:
            emit(Row(name, "", str(reason), SKIPPED), start)
        except Exception as error:  # whatever a device does that was not foreseen
            traceback.print_exc()
            text = " ".join(str(error).split())[:200]
            emit(Row(name, "no error", f"{type(error).__name__}: {text}", FAILED), start)


def emit(row: Row, start: float) -> None:
    """Print one row as JSON."""
    line = asdict(row) | {"seconds": round(time.perf_counter() - start, 1)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    cells = [["engine", "check", "expected", "found", "", "s"]]
    cells += [[row.engine, row.check, row.expected, row.found, row.status, f"{row.seconds:.0f}"] for row in rows]
    cells.insert(1, ["---"] * 6)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
