"""Where the checkout and the tests' own files lie."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TESTS = CHECKOUT / "tests"
FIXTURES = TESTS / "fixtures"
