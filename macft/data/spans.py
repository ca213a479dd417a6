"""A chat template and a conversation in; its rendered text with the character spans trained on out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.data.template import ChatTemplate, Message
from macft.errors import DataError


@dataclass(frozen=True)
class Rendered:
    """Rendered text and the [start, end) character spans of it that are trained on, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render_with_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Rendered:
    """Render once; a trained span is what the template adds when an assistant turn is appended.

    With `mask_history` only the last assistant turn is trained, with `train_on_prompt` all text.
    Raises DataError when the template refuses the conversation, or renders a turn so differently
    once others follow that its place cannot be told.
    """
    full = template.render(messages)
    if train_on_prompt:
        return Rendered(full, ((0, len(full)),))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if mask_history:
        turns = turns[-1:]
    return Rendered(full, tuple(_turn_span(template, messages, turn, full) for turn in turns))


def render_turn(template: ChatTemplate, messages: Sequence[Message], turn: int) -> Rendered:
    """Render once, with the span of the assistant message `turn` alone; errors as `render_with_spans`."""
    full = template.render(messages)
    return Rendered(full, (_turn_span(template, messages, turn, full),))


def _turn_span(template: ChatTemplate, messages: Sequence[Message], turn: int, full: str) -> tuple[int, int]:
    up_to_turn = template.render(messages[: turn + 1])
    prompt = _generation_prompt(template, messages[:turn])
    if full.startswith(up_to_turn):
        if prompt is None:
            return _content_bounds(template, messages[: turn + 1], turn, up_to_turn)[0], len(up_to_turn)
        return _common_prefix(prompt, full), len(up_to_turn)

    # the template renders an earlier turn otherwise once more follows, e.g. without its thinking
    begin, end = _content_bounds(template, messages, turn, full)
    before, tail = _around_content(template, messages[: turn + 1], turn, up_to_turn)
    if not up_to_turn.endswith(tail) or not full.startswith(tail, end):
        raise _unplaced(template, turn)
    if prompt is None:
        return begin, end + len(tail)
    if full.startswith(prompt):
        return len(prompt), end + len(tail)
    lead = before[_common_prefix(prompt, up_to_turn) :]
    return begin - len(lead) if full.endswith(lead, 0, begin) else begin, end + len(tail)


def _generation_prompt(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """What the model is given before the turn; None where the template has no prompt without a user."""
    try:
        return template.render(messages, add_generation_prompt=True)
    except DataError:
        return None


def _content_bounds(template: ChatTemplate, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """Where the content of `turn` lies in `text`, the rendering of `messages`, whatever became of it."""
    before, after = _around_content(template, messages, turn, text)
    end = len(text) - len(after)
    if not text.startswith(before) or not text.endswith(after) or end < len(before):
        raise _unplaced(template, turn)
    return len(before), end


def _around_content(template: ChatTemplate, messages: Sequence[Message], turn: int, text: str) -> tuple[str, str]:
    """What is rendered before and after the content of `turn`, found by putting a mark in its place."""
    mark = "\ue000answer\ue001"
    while mark in text:
        mark += "\ue001"
    marked = [*messages[:turn], {**messages[turn], "content": mark}, *messages[turn + 1 :]]
    before, found, after = template.render(marked).partition(mark)
    if not found:
        raise _unplaced(template, turn)
    return before, after


def _unplaced(template: ChatTemplate, turn: int) -> DataError:
    return DataError(
        f"the chat template ({template.name}) renders message {turn + 1} (assistant) differently once more "
        "turns follow, so what to train on cannot be told; use mask_history, split the conversation, "
        "or give another template"
    )


def _common_prefix(left: str, right: str) -> int:
    if right.startswith(left):
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
