"""Stream texts that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from macft.data.cache.workers import Encoder
from macft.data.formats.texts import PlainText
from macft.data.kinds import PT
from macft.data.stream import Stream
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.tokenizer import Tokenizer


class _Generated:
    """Texts that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0

    def __call__(self, _say: Any) -> Iterator[PlainText]:
        for number in range(self.count):
            self.read += 1
            yield PlainText(f"the quick brown fox {number}", f"texts.jsonl:{number + 1}")


def generated(count: int, tokenizer: Tokenizer, buffer_size: int) -> tuple[_Generated, Stream]:
    rows = _Generated(count)
    encoder = Encoder(PT, Encoding(tokenizer, None, 64), {})
    return rows, Stream(rows, encoder, packing=False, buffer_size=buffer_size, seed=0)
