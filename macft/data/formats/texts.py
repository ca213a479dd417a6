"""Read texts for continued pre-training from the rows of a data file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from macft.data.formats.columns import RowFormat, recognize_format
from macft.data.formats.conversations import optional_text, refuse_ranking
from macft.data.formats.messages import RowErrors, check_text
from macft.data.formats.reader import DataRow, RowReader
from macft.data.sources.resolve import DataSource
from macft.errors import DataError


@dataclass(frozen=True)
class PlainText(DataRow):
    """One text; `source` is its file:line."""

    text: str
    source: str

    messages = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """See DataRow."""
        return (self.text,)

    @property
    def identity(self) -> Any:
        """See DataRow."""
        return self.text


def holds_texts(source: DataSource, keys: Collection[str]) -> bool:
    """Whether a data set with these keys in its first row is meant to be read as texts."""
    if source.row_format is not None:
        return source.row_format.style == "alpaca" and "response" not in source.row_format.columns
    return "text" in keys and recognize_format(keys) is None


def _check_source(source: DataSource) -> DataSource:
    refuse_ranking(source)
    row_format = source.row_format
    if row_format is None:
        return source
    if row_format.style != "alpaca":
        raise DataError(f"{source.name}: holds conversations, stage: pt needs texts; set stage: sft")
    # answers and all other columns are ignored
    columns = {key: name for key, name in row_format.columns.items() if key in ("prompt", "query")}
    return replace(source, row_format=replace(row_format, name="text", style="text", columns=columns, unmapped={}))


def _recognize(at: str, row: dict[str, Any]) -> RowFormat:
    if "text" in row:
        return RowFormat("text", "text", {"prompt": "text"})
    raise DataError(
        f"{at}: found the keys {', '.join(row) or 'none'}; stage: pt needs text, or a key that dataset_info.json "
        'maps: "columns": {"prompt": KEY}; to train on answers set stage: sft'
    )


def _read(row_format: RowFormat, row: dict[str, Any], source: str, errors: RowErrors) -> PlainText | None:
    if row_format.style == "conversation":
        errors.problems.append(f"stage: pt needs texts, found {row_format.name} rows; set stage: sft")
        return None
    # alpaca rows of an entry in dataset_info.json: the prompt, then the query
    column = row_format.needed[0]
    key = row_format.columns[column]
    if key not in row:
        errors.problems.append(row_format.missing(column, row))
        return None
    below = optional_text(row_format, row, "query", errors)
    text = "\n".join(filter(None, (check_text(row[key], f'"{key}"', errors), below)))
    return None if errors.problems else PlainText(text, source)


TEXTS: RowReader[PlainText] = RowReader(_check_source, _recognize, _read, lambda *_: None)
