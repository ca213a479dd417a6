"""Compare how two rendered texts begin, without cutting a marker such as <|im_end|> in two."""

from __future__ import annotations

import re
from collections.abc import Sequence

# a marker that is not closed yet, and a text that ends with a whole one
_OPEN = re.compile(r"[<\[][^<>\[\]\s]*$")
_WHOLE = re.compile(r"[>\]]\s*$")


def common_length(left: Sequence[object], right: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    if right[: len(left)] == left:
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def shared_length(left: str, right: str) -> int:
    """How many characters two texts begin with alike, up to a marker in which they part."""
    length = common_length(left, right)
    cut = _OPEN.search(left[:length]) if length < min(len(left), len(right)) else None
    return cut.start() if cut else length


def closing_length(tail: str, text: str) -> int | None:
    """How much of `tail`, the text after an answer that ends a conversation, also closes the answer before `text`.

    None if it is closed by another marker there.
    """
    length = shared_length(tail, text)
    return length if length == len(tail) or _WHOLE.search(tail[:length]) else None
