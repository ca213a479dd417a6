"""Put tests in another order: files among each other, and the tests of each file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shuffle SEED`: the same seed gives the same order on every worker."""
    parser.addoption("--shuffle", metavar="SEED", help="run files, and the tests of each file, in a random order")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say the seed, with which a failure is repeated."""
    seed = config.getoption("--shuffle")
    return None if seed is None else f"order: --shuffle {seed}"


def shuffle(items: list[pytest.Item], seed: str) -> None:
    """Shuffle in place; a file stays in one piece, as its tests share fixtures."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    rng = random.Random(seed)
    order = list(files.values())
    rng.shuffle(order)
    for tests in order:
        rng.shuffle(tests)
    items[:] = [item for tests in order for item in tests]
