"""A data file in; a digest of what it holds, and its number of rows, remembered until the file changes, out."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.data.sources.tables import count_table
from macft.data.sources.text import kind
from macft.files import cache_dir, write_json

_BLOCK = 1 << 20
# a file that has only just changed can change again without a new date
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Contents:
    """`digest` of all bytes; `rows` None: only reading it tells."""

    digest: str
    rows: int | None


def contents(path: Path) -> Contents:
    """What a file holds; read only if its size or date is not that of the last time. Raises OSError."""
    stat = path.stat()
    place = str(path.resolve())
    known = _known()
    match known.get(place):
        case [int(size), int(changed), str(digest), int() | None as rows] if [size, changed] == [
            stat.st_size,
            stat.st_mtime_ns,
        ]:
            return Contents(digest, rows)
    found = _read(path)
    if time.time() - stat.st_mtime > _SETTLED_SECONDS:
        # without it the file is read again the next time
        with suppress(OSError):
            write_json(_memory(), _known() | {place: [stat.st_size, stat.st_mtime_ns, found.digest, found.rows]})
    return found


def _memory() -> Path:
    return cache_dir() / "data" / "files.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(_memory().read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _read(path: Path) -> Contents:
    digest = hashlib.sha256()
    line_ends = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            line_ends += block.count(b"\n")
    has_lines = path.suffix == kind(path) and path.suffix in (".jsonl", ".txt", ".csv")
    return Contents(digest.hexdigest(), line_ends if has_lines else count_table(path))
