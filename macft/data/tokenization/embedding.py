"""Refuse tokens for which the model's embedding has no row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.report import RefusedError
from macft.data.tokenization.table import Table
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError


def check_table(table: Table, sources: Sequence[str], encoding: Encoding) -> None:
    """Raise RefusedError for rows of a table, which come from the places `sources`, that hold such a token."""
    rows = encoding.embedding_rows
    if rows is None:
        return
    places = np.flatnonzero(table.tokens >= rows)
    owners = (np.searchsorted(table.offsets, places, side="right") - 1) // table.width
    problems: dict[str, tuple[str, int]] = {}
    # each row counts once, for the first such token in it
    for owner, at in zip(*np.unique(owners, return_index=True), strict=True):
        problem = _problem(int(table.tokens[places[at]]), encoding.tokenizer, rows)
        first, count = problems.get(problem, (sources[owner], 0))
        problems[problem] = (first, count + 1)
    if problems:
        raise RefusedError(problems)


def check_input(ids: Sequence[int], tokenizer: Tokenizer, rows: int | None) -> None:
    """Raise DataError if an input of a model whose embedding has this many rows holds such a token."""
    outside = next((id_ for id_ in ids if rows is not None and id_ >= rows), None)
    if outside is not None and rows is not None:
        raise DataError(_problem(outside, tokenizer, rows))


def _problem(id_: int, tokenizer: Tokenizer, rows: int) -> str:
    return (
        f"the token {tokenizer.decode([id_], skip_special=False)!r} has the id {id_}, but the model's embedding has "
        f"{rows} rows, for ids up to {rows - 1}; take it out of the text, or name a model that its tokenizer fits"
    )
