"""A table of tokenized rows in; what became of them, plural and in warnings, out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from macft.data.formats.conversations import Conversation
from macft.data.tokenization.table import ANSWER_CUT, EMPTIED, SHORTENED, Table
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, join_problems

logger = logging.getLogger("macft")


@dataclass
class TokenizeReport:
    """What became of the examples: counts of examples, except for the last three."""

    examples: int = 0
    kept: int = 0
    # nothing trained on in them (of a pair: in one of its rows): left out
    without_target: int = 0
    # lost user text to fit cutoff_len
    shortened: int = 0
    # of those shortened: lost all of it
    emptied: int = 0
    # an answer lost its end
    answer_cut: int = 0
    special_in_content: int = 0
    # tokens on both sides of a trained span's border
    boundary_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0


def count_rows(report: TokenizeReport, table: Table, indices: np.ndarray) -> None:
    """Fill in what happened to the rows `indices`; those left out for any reason count as `without_target`."""
    columns = table.columns[indices]
    report.examples = len(columns)
    report.kept = int((columns["skip_reason"] == 0).sum())
    report.without_target = report.examples - report.kept
    report.shortened = int((columns["flags"] & SHORTENED > 0).sum())
    report.emptied = int((columns["flags"] & EMPTIED > 0).sum())
    report.answer_cut = int((columns["flags"] & ANSWER_CUT > 0).sum())
    report.special_in_content = int((columns["special"] >= 0).sum())
    report.boundary_tokens = int(columns["boundary_tokens"].sum())
    report.tokens = int(table.totals[indices].sum())
    report.trained_tokens = int(columns["trained"].sum())


@dataclass(frozen=True)
class RowWarnings:
    """Warnings about the rows `indices` of a table: one for all that something happened to, which names the first."""

    noun: str
    table: Table
    indices: np.ndarray

    def flag(self, flag: int, what: str) -> None:
        """Of the rows with this flag."""
        self._warn(self.table.columns["flags"][self.indices] & flag > 0, what)

    def skip_reason(self, skip_reason: int, what: str) -> None:
        """Of the rows with this skip_reason."""
        self._warn(self.table.columns["skip_reason"][self.indices] == skip_reason, what)

    def special(self, tokenizer: Tokenizer) -> None:
        """Of special tokens in texts."""
        special = self.table.columns["special"][self.indices]
        text = tokenizer.special_strings[special[special >= 0][0]] if (special >= 0).any() else ""
        self._warn(special >= 0, "hold special tokens in their text, which stay special", f"{text} in ")

    def _warn(self, which: np.ndarray, what: str, before: str = "") -> None:
        count = int(which.sum())
        if count:
            first = self.table.source(int(self.indices[np.argmax(which)]))
            logger.warning("%d of %d %s %s (first: %s%s)", count, len(which), self.noun, what, before, first)


class SpecialTokens:
    """The special tokens of a tokenizer, to be found in texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._numbers = {text: i for i, text in enumerate(tokenizer.special_strings)}
        self._pattern = re.compile("|".join(map(re.escape, self._numbers)))

    def in_text(self, text: str) -> list[str]:
        """All of them, in order."""
        return self._pattern.findall(text) if self._numbers else []

    def first_in(self, example: Conversation) -> int:
        """The number of the first one in an example; -1: there is none."""
        for message in example.messages:
            if found := self.in_text(message["content"]):
                return self._numbers[found[0]]
        return -1


def special_in_content(examples: Sequence[Conversation], tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """(source, tokens) of each example whose text holds special tokens, which stay special."""
    special = SpecialTokens(tokenizer)
    found: list[tuple[str, list[str]]] = []
    for example in examples:
        hits = dict.fromkeys(hit for message in example.messages for hit in special.in_text(message["content"]))
        if hits:
            found.append((example.source, list(hits)))
    return found


class RefusedError(DataError):
    """The template refuses conversations; `problems`: cause -> (where the first stands, how many there are)."""

    def __init__(self, problems: Mapping[str, tuple[str, int]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        lines = [f"{first}{and_others(count)}: {cause}" for cause, (first, count) in self.problems.items()]
        total = sum(count for _, count in self.problems.values())
        return lines[0] if len(lines) == 1 else join_problems(f"{total} examples cannot be rendered", lines)


def and_others(count: int) -> str:
    """How many more there are than the first, in words."""
    return f" and {count - 1} more" if count > 1 else ""
