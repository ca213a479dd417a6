"""Count what happened to the rows during tokenization, and warn about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from macft.data.formats.reader import DataRow
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.table import ANSWER_CUT, EMPTIED, IDENTICAL, SHORTENED, Table
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, join_problems


@dataclass
class TokenizeReport:
    """What happened to the examples, in numbers of examples (or tokens, where named so), and warnings about it."""

    examples: int = 0
    kept: int = 0
    # left out: nothing to train on (in a pair: in one of its rows)
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
    warnings: tuple[str, ...] = field(default=(), compare=False)


def count_rows(report: TokenizeReport, table: Table, indices: np.ndarray) -> None:
    """Fill in the counts of the rows `indices`; those left out for any reason count as `without_target`."""
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
class SkipReason:
    """Why a row is not trained on, phrased for many rows and for one; `{cutoff_len}` stands for the setting."""

    of_rows: str
    of_row: str
    is_refusal: bool = False  # training stops instead of leaving the row out


@dataclass
class RowWarnings:
    """Counts what happened to the rows of any number of tables, and where it happened first."""

    noun: str
    reasons: Sequence[SkipReason]
    encoding: Encoding
    rows: int = 0
    _found: dict[str | int, tuple[int, str]] = field(default_factory=dict)

    def count(self, table: Table, indices: np.ndarray) -> None:
        """Add the rows `indices` of a table."""
        columns = table.columns[indices]
        self.rows += len(columns)
        for flag in (SHORTENED, EMPTIED, ANSWER_CUT, IDENTICAL):
            self._add(flag, columns["flags"] & flag > 0, table, indices)
        for number, reason in enumerate(self.reasons, start=1):
            self._add(reason.of_rows, columns["skip_reason"] == number, table, indices)
        special = columns["special"]
        first = special[special >= 0][:1]
        text = self.encoding.tokenizer.special_strings[first[0]] if len(first) else ""
        self._add(_SPECIAL, special >= 0, table, indices, f"{text} in ")

    def _add(self, what: str | int, which: np.ndarray, table: Table, indices: np.ndarray, before: str = "") -> None:
        if which.any():
            first = f"{before}{table.source(int(indices[np.argmax(which)]))}"
            count, first = self._found.get(what, (0, first))
            self._found[what] = (count + int(which.sum()), first)

    def lines(self) -> tuple[str, ...]:
        """A sentence for everything that happened to some row."""
        emptied, _ = self._found.get(EMPTIED, (0, ""))
        of_them = f", {emptied} of them all of it" if emptied else ""
        sentences: dict[str | int, str] = {
            _SPECIAL: _SPECIAL,
            SHORTENED: f"lost user text to fit cutoff_len {{cutoff_len}}{of_them}",
            ANSWER_CUT: "lost the end of an answer to fit cutoff_len {cutoff_len}",
            **{reason.of_rows: reason.of_rows for reason in self.reasons},
            IDENTICAL: "have the same tokens on both sides, so they show no preference",
        }
        cutoff_len = self.encoding.cutoff_len
        return tuple(
            f"{count} of {self.rows} {self.noun}s {sentence.format(cutoff_len=cutoff_len)} (first: {first})"
            for what, sentence in sentences.items()
            for count, first in [self._found.get(what, (0, ""))]
            if count
        )


def fill_report(
    report: TokenizeReport,
    table: Table,
    indices: np.ndarray,
    noun: str,
    reasons: Sequence[SkipReason],
    encoding: Encoding,
) -> None:
    """Fill in the counts of the rows `indices`, and the warnings about them."""
    count_rows(report, table, indices)
    warnings = RowWarnings(noun, reasons, encoding)
    warnings.count(table, indices)
    report.warnings = warnings.lines()


_SPECIAL = "hold special tokens in their text, which stay special"


class SpecialTokens:
    """Finds the special tokens of a tokenizer in texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._numbers = {text: i for i, text in enumerate(tokenizer.special_strings)}
        self._pattern = re.compile("|".join(map(re.escape, self._numbers)))

    def in_text(self, text: str) -> list[str]:
        """All of them, in order."""
        return self._pattern.findall(text) if self._numbers else []

    def first_in(self, row: DataRow) -> int:
        """The number of the first one in a row; -1 if there is none."""
        for text in row.texts:
            if found := self.in_text(text):
                return self._numbers[found[0]]
        return -1

    def all_in(self, row: DataRow) -> list[str]:
        """All of them in a row, each once."""
        return list(dict.fromkeys(found for text in row.texts for found in self.in_text(text)))


class RefusedError(DataError):
    """The template or the embedding refuses rows; `problems`: cause -> (place of the first, how many there are)."""

    def __init__(self, problems: Mapping[str, tuple[str, int]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        lines = [f"{first}{and_others(count)}: {cause}" for cause, (first, count) in self.problems.items()]
        total = sum(count for _, count in self.problems.values())
        return lines[0] if len(lines) == 1 else join_problems(f"{total} examples cannot be trained on", lines)


def and_others(count: int) -> str:
    """` and 2 more` after the first of 3; empty after a single one."""
    return f" and {count - 1} more" if count > 1 else ""
