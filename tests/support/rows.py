"""Write the rows of data files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_lines(path: Path, *rows: object) -> Path:
    """One row a line, as JSON."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


WORDS = ("the", " quick", " brown fox", "\n", "你好", " one two three", ".", " jumps over the lazy dog")


def write_texts(path: Path, count: int = 12) -> Path:
    """Texts of different lengths, one a row."""
    rng = np.random.default_rng(4)
    rows = ["".join(rng.choice(WORDS, int(rng.integers(3, 30)))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path
