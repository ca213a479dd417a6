"""Read single answers that are each rated desirable or not from the rows of a data file, and check them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from macft.data.formats.columns import RowFormat, recognize_format
from macft.data.formats.conversations import EXAMPLES, Example, refuse_pairs, refuse_ranking
from macft.data.formats.lost import RATINGS, as_mark, lost_key
from macft.data.formats.messages import RowErrors
from macft.data.formats.reader import RowReader
from macft.data.sources.resolve import DataSource
from macft.data.sources.rows import kind_of
from macft.errors import DataError

_ACCEPTED = (
    "a conversation (messages, prompt and completion, ...) and its rating, true or false, under label or kto_tag"
)


@dataclass(frozen=True)
class FeedbackExample(Example):
    """A conversation whose last answer is rated."""

    is_desirable: bool = True

    @property
    def identity(self) -> Any:
        """See DataRow."""
        return self.messages, self.tools, self.is_desirable

    @property
    def opposite(self) -> Any:
        """See DataRow."""
        return self.messages, self.tools, not self.is_desirable


def holds_feedback(source: DataSource, keys: Collection[str]) -> bool:
    """Whether a data set with these keys in its first row holds rated answers."""
    if source.row_format is not None:
        return "kto_tag" in source.row_format.columns
    # in other formats a label may be anything
    has_label = "label" in keys and ("messages" in keys or {"prompt", "completion"} <= set(keys))
    return "kto_tag" in keys or has_label


def _check_source(source: DataSource) -> DataSource:
    refuse_ranking(source)
    if source.row_format is not None and "kto_tag" not in source.row_format.columns:
        raise DataError(
            f"{source.name}: the columns in dataset_info.json map no kto_tag, the rating that stage: kto needs; add "
            '"kto_tag": KEY'
        )
    return source


def _recognize(at: str, row: dict[str, Any]) -> RowFormat:
    row_format = recognize_format(row)
    rating = next((key for key in RATINGS if key in row), None)
    if row_format is not None and rating is not None:
        columns = {**row_format.columns, "kto_tag": rating}
        return replace(row_format, name=f"rated {row_format.name}", columns=columns)
    refuse_pairs(at, row)
    raise DataError(f"{at}: found the keys {', '.join(row) or 'none'}; stage: kto needs {_ACCEPTED}")


def _read(row_format: RowFormat, row: dict[str, Any], source: str, errors: RowErrors) -> FeedbackExample | None:
    example = EXAMPLES.read(row_format, row, source, errors)
    key = row_format.columns["kto_tag"]
    rating = as_mark(row.get(key))
    if key not in row:
        errors.problems.append(f'no "{key}", the rating; found the keys {", ".join(row) or "none"}')
    elif not isinstance(rating, bool):
        shown = repr(rating) if isinstance(rating, str | int | float) else kind_of(rating)
        errors.problems.append(f'"{key}": found {shown}, expected true (desirable) or false')
    if example is not None:
        _check_answer(example, errors)
    if errors.problems or example is None:
        return None
    return FeedbackExample(example.messages, source, example.tools, bool(rating))


def _check_answer(example: Example, errors: RowErrors) -> None:
    *prompt, last = example.messages or ({"role": "", "content": ""},)
    if last["role"] != "assistant":
        found = f"ends in a {last['role']} message" if last["role"] else "holds no message"
        errors.problems.append(f"{found}, expected the rated answer")
    elif not last["content"].strip() and not last.get("tool_calls"):
        errors.problems.append("the rated answer is empty")
    elif not prompt:
        errors.problems.append("there is no prompt before the rated answer")


FEEDBACK: RowReader[FeedbackExample] = RowReader(_check_source, _recognize, _read, lost_key, frozenset(RATINGS))
