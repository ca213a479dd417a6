"""Name the keys of rows that would change what is trained on, but are not read."""

from __future__ import annotations

from typing import Any

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
RATINGS = ("label", "kto_tag")
# whether something is trained on: OpenAI says weight, axolotl train, ms-swift loss
MARKS = ("weight", "train", "training", "loss", "loss_weight", "loss_scale")
_OTHERS = {
    "train_detail": "parts of an answer cannot be left out of training; remove it, or split the message",
    "chat_template_kwargs": "rows have no settings; set enable_thinking in the configuration, and remove it",
    "reasoning_content": "a thought is read only inside its message; give the answer as one, or remove it",
    "system_prompt": "it is not read; rename it to system, or map it in dataset_info.json",
}
_SAID = {"true": True, "false": False, "0": 0, "0.0": 0, "1": 1, "1.0": 1}
# keys of a table that are read only to find out whether they hold anything
LOOKED_AT = frozenset({*MEDIA, *RATINGS, *MARKS, *_OTHERS})


def as_mark(value: Any) -> Any:
    """The number or the truth that a text says, which is all that CSV can hold; any other value as it is."""
    return _SAID.get(value.strip().lower(), value) if isinstance(value, str) else value


def lost_key(key: str, value: Any) -> str | None:
    """Why a row cannot be trained on without this key; None if nothing depends on it."""
    if value is None or (not value and not isinstance(value, bool | int | float)):
        return None
    if key in MEDIA:
        return f'"{key}": only text is trained on; remove it, or the row'
    mark = as_mark(value)
    if key in MARKS and isinstance(mark, bool | int | float) and mark != 1:
        return f'"{key}": found {value!r}: rows are not weighted, only messages are, by 0 or 1; remove it, or the row'
    return f'"{key}": {_OTHERS[key]}' if key in _OTHERS else None


def lost_key_or_rating(key: str, value: Any) -> str | None:
    """`lost_key` for rows that are trained on whatever their rating; in many formats a label may be anything else."""
    # 0 and 1 may be classes
    is_rating = isinstance(as_mark(value), bool)
    if key in RATINGS and is_rating:
        return f'"{key}": rates the answer, which would be trained on all the same; set stage: kto, or remove it'
    return lost_key(key, value)
