"""Put the thought of an answer where a chat template reads it, and refuse to train on an answer that loses its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from macft.data.templates.llamafactory import NAMED
from macft.errors import DataError

if TYPE_CHECKING:
    from macft.data.templates.chat_template import ChatTemplate, Message

# the key of a thought in our messages; and every key that templates and data sets use for it
THOUGHT = "reasoning_content"
THOUGHT_KEYS = (THOUGHT, "reasoning", "thinking")

# what opens and closes a thought inside a content
_TAGS = dict.fromkeys(
    (opening.strip(), closing.strip())
    for opening, closing in (slots.thought for slots in NAMED.values() if slots.thought is not None)
)


def with_thought(message: Message, tags: tuple[str, str] | None) -> Message:
    """The message with its thought in its content between `tags`, or (None) under every key that a template may read.

    Templates read one of the keys, or the first that holds something.
    """
    thought = message.get(THOUGHT)
    if not thought:
        return dict(message)
    if tags is None:
        return {**message, **dict.fromkeys(THOUGHT_KEYS, thought)}
    rest = {key: value for key, value in message.items() if key != THOUGHT}
    return {**rest, "content": f"{tags[0]}{thought}{tags[1]}{message['content']}"}


def check_thoughts(
    template: ChatTemplate, messages: Sequence[Message], turns: Sequence[int], tools: list[Any] | None = None
) -> None:
    """Raise DataError if the template leaves out the thought of one of the assistant messages `turns`."""
    if template.drops_thoughts:
        return
    marks: dict[int, str] = {}
    marked = list(messages)
    for turn in turns:
        if (message := _marked(messages[turn], mark := f"\ue000thought {turn}\ue001")) is not None:
            marks[turn], marked[turn] = mark, message
    if not marks:
        return
    text = template.render(marked, tools=tools)
    for turn, mark in marks.items():
        if mark not in text:
            keeps_last = mark in template.render(marked[: turn + 1], tools=tools)
            raise _lost(template, turn, is_field=THOUGHT in messages[turn], keeps_last=keeps_last)


def _marked(message: Message, mark: str) -> Message | None:
    """The message with `mark` in place of its thought; None if it has none."""
    if THOUGHT in message:
        return {**message, THOUGHT: mark}
    content = message["content"]
    # each tag holds one, and most contents do not
    if ">" not in content:
        return None
    for opening, closing in _TAGS:
        before, found, after = content.partition(closing)
        # some data leaves out the opening tag, which the prompt holds
        thought = before.rpartition(opening)[2]
        if found and thought.strip():
            kept = before.removesuffix(thought) + thought.replace(thought.strip(), mark)
            return {**message, "content": kept + found + after}
    return None


def _lost(template: ChatTemplate, turn: int, *, is_field: bool, keeps_last: bool) -> DataError:
    place = f"message {turn + 1} (assistant)"
    if keeps_last:
        plain = f"{template.name}_nothink"
        if plain not in NAMED and "<|im_start|>" in template.source:
            plain = "qwen3_nothink"  # ChatML that renders contents as they are
        other = f"write template: {plain}" if plain in NAMED and not is_field else "give a template that keeps it"
        return DataError(
            f"the chat template ({template.name}) leaves out the thought of {place} because other turns follow, and "
            f"the answer would be trained without it; use mask_history, split the conversation, or {other}"
        )
    if is_field:
        return DataError(
            f"the chat template ({template.name}) has no place for the thought of {place} ({', '.join(THOUGHT_KEYS)}); "
            "write it into the content as the model does, or give a template that has one"
        )
    return DataError(
        f"the chat template ({template.name}) leaves out the thought in the content of {place}; "
        "give a template that keeps it, or remove the thought"
    )
