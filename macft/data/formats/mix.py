"""Concatenate or interleave several data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from macft.errors import ConfigError

T = TypeVar("T")

# turns drawn at once: the block size of the datasets library, so that the order is the same
_BLOCK = 1000
STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")


def mix(
    parts: Sequence[Iterable[T]], strategy: str = "concat", probs: Sequence[float] | None = None, seed: int = 42
) -> Iterator[T]:
    """The examples of all parts as LLaMA-Factory's `mix_strategy` orders them.

    concat: one part after the other. interleave_under: in turns, or drawn by `probs`, until the first part is
    exhausted; interleave_over: until all are, restarting exhausted parts; interleave_once: until all are, without
    restarting. Parts may be iterated several times. Raises ConfigError for arguments that do not go together.
    """
    check_mix(len(parts), strategy, probs)
    if strategy == "concat" or len(parts) == 1:
        for part in parts:
            yield from part
    else:
        yield from _interleaved(parts, strategy, probs, seed)


def check_mix(count: int, strategy: str, probs: Sequence[float] | None) -> None:
    """Raise ConfigError unless `count` data sets can be mixed in this way."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"mix_strategy: found {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if probs is None:
        return
    if strategy == "concat":
        raise ConfigError("interleave_probs: has no effect with mix_strategy concat; remove it, or interleave")
    if len(probs) != count:
        raise ConfigError(f"interleave_probs: found {len(probs)} numbers, expected one for each of {count} data sets")
    if any(p < 0 for p in probs) or abs(sum(probs) - 1) > 1e-6:
        raise ConfigError(
            f"interleave_probs: found {', '.join(map(str, probs))}, expected numbers of at least 0 that add up to 1"
        )


def _turns(count: int, probs: Sequence[float] | None, seed: int) -> Iterator[int]:
    """The indices of the parts whose turn it is, endlessly."""
    if probs is None:
        while True:
            yield from range(count)
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(count, size=_BLOCK, p=probs).tolist()


def _interleaved(parts: Sequence[Iterable[T]], strategy: str, probs: Sequence[float] | None, seed: int) -> Iterator[T]:
    streams = [_Ahead(part) for part in parts]
    exhausted: set[int] = set()
    # parts that are never drawn need not be exhausted
    drawn = {i for i in range(len(parts)) if probs is None or probs[i] > 0}
    for turn in _turns(len(parts), probs, seed):
        if not (strategy == "interleave_once" and turn in exhausted):
            if streams[turn].is_over:
                streams[turn] = _Ahead(parts[turn])
            if streams[turn].is_over:
                raise ConfigError("mix_strategy: one of the data sets has no examples; remove it")
            yield streams[turn].take()
            if streams[turn].is_over:
                exhausted.add(turn)
        ends = bool(exhausted) if strategy == "interleave_under" else exhausted == drawn
        # without probabilities, finish the current round
        if ends and (probs is not None or turn == len(parts) - 1):
            return


class _Ahead(Generic[T]):
    """A stream that knows whether it is over."""

    def __init__(self, part: Iterable[T]) -> None:
        self._items = iter(part)
        self._next: list[T] = self._take()

    def _take(self) -> list[T]:
        for item in self._items:
            return [item]
        return []

    @property
    def is_over(self) -> bool:
        return not self._next

    def take(self) -> T:
        [item] = self._next
        self._next = self._take()
        return item
