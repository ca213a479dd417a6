"""Render a conversation and find the spans of its text that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.fast_render import compile_template
from macft.data.templates.llamafactory import NAMED
from macft.data.templates.tools import Tools, check_tools, uses_tools, with_objects
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
    tools: Tools | None = None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Rendered:
    """Render once; a trained span is what the template adds when an assistant turn is appended.

    With `mask_history` only the last assistant turn is trained, with `train_on_prompt` all text, an answer of weight 0
    never. Raises DataError when a weight cannot be heeded, when the template refuses the conversation, has no place for
    `tools`, or renders a turn so differently once others follow that it cannot be found.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [i for i in answers[-1 if mask_history else 0 :] if messages[i].get("weight", 1)]
    unweighted = _without_weights(messages, train_on_prompt=train_on_prompt)
    if template.one_answer is not None and any(turn != answers[-1] for turn in turns):
        plain = f"{template.name}_nothink"
        other = f"write template: {plain}" if plain in NAMED else "give another template"
        raise DataError(
            f"the chat template ({template.name}) can be trained on only one answer per conversation, found "
            f"{len(answers)}: {template.one_answer}; use mask_history, split the conversation, or {other}"
        )
    untrained = [i for i in answers if not messages[i].get("weight", 1)]
    if not (train_on_prompt and untrained):
        return _render(template, unweighted, tools, None if train_on_prompt else turns)
    rendered = _render(template, unweighted, tools, untrained)
    borders = [0, *(border for span in rendered.spans for border in span), len(rendered.text)]
    return Rendered(rendered.text, tuple(zip(borders[::2], borders[1::2], strict=True)))


def _without_weights(messages: Sequence[Message], *, train_on_prompt: bool) -> Sequence[Message]:
    """The messages as the template takes them. Raises DataError for the weight of one that is not an answer."""
    if not any("weight" in message for message in messages):
        return messages
    for i, message in enumerate(messages, 1):
        if message["role"] != "assistant" and message.get("weight", train_on_prompt) != train_on_prompt:
            why = (
                "is marked as trained on, but only answers are; remove the mark, or set train_on_prompt"
                if message["weight"]
                else "is marked as not trained on, but train_on_prompt trains on all but answers of weight 0; unset it"
            )
            raise DataError(f"message {i} ({message['role']}) {why}")
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def render_turn(template: ChatTemplate, messages: Sequence[Message], turn: int) -> Rendered:
    """Render once, with the span of only the assistant message `turn`; errors as `render_with_spans`."""
    return _render(template, messages, None, [turn])


def _render(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools | None, turns: list[int] | None
) -> Rendered:
    """The text with the spans of the assistant messages `turns`, or (None) all of it."""
    if uses_tools(messages, tools):
        check_tools(template, messages, tools)
        messages = with_objects(messages)
    elif (fast := compile_template(template)) is not None and (made := fast.render(messages)) is not None:
        spans = ((0, len(made.text)),) if turns is None else tuple(made.spans[turn] for turn in turns)
        return Rendered(made.text, spans)
    render = _Renderer(template, list(tools) if tools else None)
    full = render(messages)
    if turns is None:
        return Rendered(full, ((0, len(full)),))
    return Rendered(full, tuple(_turn_span(render, messages, turn, full) for turn in turns))


@dataclass(frozen=True)
class _Renderer:
    template: ChatTemplate
    tools: list[dict[str, Any]] | None

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, tools=self.tools)


def _turn_span(render: _Renderer, messages: Sequence[Message], turn: int, full: str) -> tuple[int, int]:
    up_to_turn = render(messages[: turn + 1])
    prompt = _generation_prompt(render, messages[:turn])
    if full.startswith(up_to_turn):
        if prompt is None:
            return _content_bounds(render, messages[: turn + 1], turn, up_to_turn)[0], len(up_to_turn)
        return common_length(prompt, full), len(up_to_turn)

    # the template renders an earlier turn differently once more follow, e.g. without its thinking
    begin, end = _content_bounds(render, messages, turn, full)
    before, tail = _around_content(render, messages[: turn + 1], turn, up_to_turn)
    if not up_to_turn.endswith(tail) or not full.startswith(tail, end):
        raise _unplaced(render, turn)
    if prompt is None:
        return begin, end + len(tail)
    if full.startswith(prompt):
        return len(prompt), end + len(tail)
    lead = before[common_length(prompt, up_to_turn) :]
    return begin - len(lead) if full.endswith(lead, 0, begin) else begin, end + len(tail)


def _generation_prompt(render: _Renderer, messages: Sequence[Message]) -> str | None:
    """The model's prompt for the turn; None if the template refuses to prompt without a user message."""
    try:
        return render(messages, add_generation_prompt=True)
    except DataError:
        return None


def _content_bounds(render: _Renderer, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """The bounds of the content of `turn` in `text`, the rendering of `messages`, however it is changed."""
    before, after = _around_content(render, messages, turn, text)
    end = len(text) - len(after)
    if not text.startswith(before) or not text.endswith(after) or end < len(before):
        raise _unplaced(render, turn)
    return len(before), end


def _around_content(render: _Renderer, messages: Sequence[Message], turn: int, text: str) -> tuple[str, str]:
    """The text before and after the content of `turn`, found by rendering a mark in its place."""
    mark = "\ue000answer\ue001"
    while mark in text:
        mark += "\ue001"
    marked = [*messages[:turn], {**messages[turn], "content": mark}, *messages[turn + 1 :]]
    before, found, after = render(marked).partition(mark)
    if not found:
        raise _unplaced(render, turn)
    return before, after


def _unplaced(render: _Renderer, turn: int) -> DataError:
    return DataError(
        f"the chat template ({render.template.name}) renders message {turn + 1} (assistant) differently once more "
        "turns follow, so what to train on cannot be told; use mask_history, split the conversation, "
        "or give another template"
    )


def common_length(left: Sequence[object], right: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    if right[: len(left)] == left:
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
