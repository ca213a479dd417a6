"""Format counts and sizes for messages."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: int) -> str:
    """A number of bytes as people read it: `12 kB`, `3.4 MB`, `1.2 GB`."""
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.0f} kB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
