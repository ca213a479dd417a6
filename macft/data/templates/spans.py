"""Render a conversation and find the spans of its text that are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.fast_render import compile_template
from macft.data.templates.overlap import closing_length, shared_length
from macft.data.templates.thoughts import check_thoughts
from macft.data.templates.tools import Tools, check_tools, uses_tools, with_objects
from macft.errors import DataError

# stands before an answer that a template does not render without one
_QUESTION: Message = {"role": "user", "content": "question"}


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
    `tools`, or renders a turn so differently once others follow that it cannot be found, or without its thought.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [i for i in answers[-1 if mask_history else 0 :] if messages[i].get("weight", 1)]
    unweighted = _without_weights(messages, train_on_prompt=train_on_prompt)
    if template.one_answer is not None and any(turn != answers[-1] for turn in turns):
        raise DataError(
            f"the chat template ({template.name}) can be trained on only one answer per conversation, found "
            f"{len(answers)}: {template.one_answer}; use mask_history, split the conversation, or give another "
            "template"
        )
    check_thoughts(template, with_objects(unweighted), turns, list(tools) if tools else None)
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
    later = range(turn, len(messages))
    check_thoughts(template, messages, [i for i in later if messages[i]["role"] == "assistant"])
    return _render(template, messages, None, [turn])


def _render(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools | None, turns: list[int] | None
) -> Rendered:
    """The text with the spans of the assistant messages `turns`, or (None) all of it."""
    if turns and not _writes_answers(template):
        raise DataError(
            f"the chat template ({template.name}) leaves out the text of an answer that is given as a string; "
            "give another template"
        )
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

    def attempt(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str | None:
        """The rendered text; None if the template refuses to render it."""
        try:
            return self(messages, add_generation_prompt=add_generation_prompt)
        except DataError:
            return None


@lru_cache(maxsize=16)
def _writes_answers(template: ChatTemplate) -> bool:
    """Whether what the template writes for an answer holds its content; True where it writes nothing at all."""
    render = _Renderer(template, None)
    mark = _mark(template.source)
    prompt = render.attempt([_QUESTION], add_generation_prompt=True)
    answered = render.attempt([_QUESTION, {"role": "assistant", "content": mark}])
    return prompt is None or answered is None or mark in answered or prompt.startswith(answered)


def _turn_span(render: _Renderer, messages: Sequence[Message], turn: int, full: str) -> tuple[int, int]:
    end = _end(render, messages, turn, full)
    return _begin(render, messages, turn, full, end), end


def _begin(render: _Renderer, messages: Sequence[Message], turn: int, full: str, end: int) -> int:
    """Where the generation prompt for the turn ends in `full`, even where history is rendered differently by then."""
    history = messages[:turn]
    prompt = render.attempt(history, add_generation_prompt=True) if history else None
    if prompt is None:
        return _begin_after_question(render, messages, turn, full, end)
    if full.startswith(prompt):
        return len(prompt)
    here = _end_of_message(render, history, turn - 1, prompt, add_generation_prompt=True)
    there = _end_of_message(render, messages, turn - 1, full)
    if here is None or there is None:
        return _begin_after_question(render, messages, turn, full, end)
    return there + shared_length(prompt[here:], full[there:])


def _begin_after_question(render: _Renderer, messages: Sequence[Message], turn: int, full: str, end: int) -> int:
    """The same where no history can be prompted for the turn: what is added when it answers a question begins there."""
    asked = [*messages[:turn], _QUESTION]
    prompt = render.attempt(asked, add_generation_prompt=True) or ""
    answered = render.attempt([*asked, messages[turn]]) or ""
    alone = answered[shared_length(prompt, answered) :]
    if prompt and answered and full.endswith(alone, 0, end):
        return end - len(alone)
    before = _before_content(render, messages, turn)
    if before is None or not full.startswith(before):
        raise _unplaced(render, turn)
    written = _before_content(render, [*asked, messages[turn]], turn + 1) or ""
    lead = written[shared_length(prompt, written) :] if prompt else ""
    return len(before.removesuffix(lead))


def _end(render: _Renderer, messages: Sequence[Message], turn: int, full: str) -> int:
    """Where the text that closes the turn ends in `full`, even where the turn is rendered differently by then."""
    upto = list(messages[: turn + 1])
    answered = render.attempt(upto)
    if answered is None:  # a template may want a question first
        upto = [*messages[:turn], _QUESTION, messages[turn]]
        answered = render(upto)
    elif full.startswith(answered):
        return len(answered)
    here = _end_of_message(render, upto, len(upto) - 1, answered)
    there = _end_of_message(render, messages, turn, full)
    if here is None or there is None or (length := closing_length(answered[here:], full[there:])) is None:
        raise _unplaced(render, turn)
    return there + length


def _end_of_message(
    render: _Renderer, messages: Sequence[Message], index: int, text: str, *, add_generation_prompt: bool = False
) -> int | None:
    """Where the content of a message, or the name in its last call, ends in `text`, the rendering of `messages`."""
    mark = _mark(text)
    for marked in _marked_ends(messages[index], mark):
        changed = [*messages[:index], marked, *messages[index + 1 :]]
        rendered = render.attempt(changed, add_generation_prompt=add_generation_prompt) or ""
        # a name may come again with its result
        if mark in rendered and rendered.replace(mark, "") == text:
            return rendered.index(mark)
    # the content may be changed in any way, if only what follows is the same
    replaced = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
    rendered = render.attempt(replaced, add_generation_prompt=add_generation_prompt) or ""
    _, found, after = rendered.partition(mark)
    return len(text) - len(after) if found and text.endswith(after) else None


def _marked_ends(message: Message, mark: str) -> Iterator[Message]:
    """The message with a mark at the end of what it says, before or after blanks that a template may strip."""
    if message.get("tool_calls"):
        *calls, last = message["tool_calls"]
        function = last.get("function", last)
        named = {**function, "name": f"{function.get('name', '')}{mark}"}
        yield {**message, "tool_calls": [*calls, {**last, "function": named} if "function" in last else named]}
    else:
        content = message["content"]
        kept = content.rstrip()
        yield {**message, "content": content + mark}
        yield {**message, "content": kept + mark + content[len(kept) :]}


def _before_content(render: _Renderer, messages: Sequence[Message], turn: int) -> str | None:
    """The text before the content of `turn`, however it is changed; None if the content is not rendered."""
    mark = _mark(*(str(message) for message in messages))
    replaced = [*messages[:turn], {**messages[turn], "content": mark}, *messages[turn + 1 :]]
    before, found, _ = (render.attempt(replaced) or "").partition(mark)
    return before if found else None


def _mark(*texts: str) -> str:
    """Characters that are in none of the texts, and are the same in upper and lower case."""
    mark = "\ue000\ue001"
    while any(mark in text for text in texts):
        mark += "\ue001"
    return mark


def _unplaced(render: _Renderer, turn: int) -> DataError:
    return DataError(
        f"the chat template ({render.template.name}) renders message {turn + 1} (assistant) differently once more "
        "turns follow, so what to train on cannot be told; use mask_history, split the conversation, "
        "or give another template"
    )
