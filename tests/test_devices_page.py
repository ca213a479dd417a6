"""The table of docs/devices.md names tests and checks that are there, one row for each finding."""

from __future__ import annotations

import re

import pytest
from support.commands import CHECKOUT

PAGE = (CHECKOUT / "docs" / "devices.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| .* \| (.*) \| (.*) \|$", PAGE, flags=re.MULTILINE)


def test_every_finding_has_its_row():
    assert [int(number) for number, *_ in ROWS] == [*range(1, 25), *range(1, 16)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_that_a_row_names_are_there(row):
    for part in row[1].split("; "):
        names = re.findall(r"`([\w/.]+)`", part)
        if not names:
            assert part == "-"
            continue
        file, functions = names[0], names[1:]
        [path] = [path for folder in ("", "backends") if (path := CHECKOUT / "tests" / folder / file).is_file()]
        text = path.read_text(encoding="utf-8")
        assert [name for name in functions if f"def test_{name}(" not in text] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_checks_that_a_row_names_are_there(row):
    checks = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "benchmarks" / "gpu").glob("*.py"))
    for name in re.findall(r"`(\w+)`", row[2]):
        assert f"def {name}()" in checks
