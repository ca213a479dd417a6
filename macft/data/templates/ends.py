"""Close answers after which a chat template writes no token that ends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.data.notes import Note
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.spans import Rendered
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError

_ANSWER, _NEXT = "macft-answer", "macft-next"
_CALL = {"type": "function", "id": "probe0001", "function": {"name": "probe", "arguments": {"key": _ANSWER}}}
_QUESTION: Message = {"role": "user", "content": "question"}
_SAID: Message = {"role": "assistant", "content": _ANSWER}
_CALLED: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_ASKED: Message = {"role": "user", "content": _NEXT}
_RESULT: Message = {"role": "tool", "content": _NEXT, "name": "probe", "tool_call_id": "probe0001"}


@dataclass(frozen=True)
class AnswerEnd:
    """What stands after an answer: `text` is added where the template writes nothing, else empty.

    `is_marker`: it also opens the next turn, so earlier answers have it too. `lacks_token`: nothing that could be
    added ends it, or the template's `written` end is no token.
    """

    text: str = ""
    is_marker: bool = False
    lacks_token: bool = False
    written: str = ""


@dataclass(frozen=True)
class AnswerEnds:
    """The end of an answer in words, and of one that calls tools."""

    said: AnswerEnd
    called: AnswerEnd

    def after(self, message: Message) -> AnswerEnd:
        """The end of this assistant message."""
        return self.called if message.get("tool_calls") else self.said


def find_ends(template: ChatTemplate, tokenizer: Tokenizer) -> AnswerEnds:
    """How answers end, found by rendering one alone and one that another turn follows."""
    said = _end(template, tokenizer, _SAID, _ASKED)
    # what follows a call also closes the call, so only the plain answer shows whether a turn is ended
    return AnswerEnds(said, _end(template, tokenizer, _CALLED, _RESULT) if said.text else AnswerEnd())


def _end(template: ChatTemplate, tokenizer: Tokenizer, answer: Message, following: Message) -> AnswerEnd:
    tail = _after_answer(template, [_QUESTION, answer])
    ends = tokenizer.special_ids | tokenizer.eos_ids
    if tail is None or any(id_ in ends for id_ in tokenizer.encode(tail).ids):
        return AnswerEnd()
    if tail.strip() and answer is _SAID:
        return AnswerEnd(lacks_token=True, written=tail)
    rest = (_after_answer(template, [_QUESTION, answer, following]) or "").removeprefix(tail)
    encoded = tokenizer.encode(rest.partition(_NEXT)[0])
    # models whose template closes nothing stop at the marker of the next turn
    if encoded.ids and encoded.ids[0] in tokenizer.eos_ids:
        return AnswerEnd(rest[: encoded.ends[0]], is_marker=True)
    eos = tokenizer.special_map.get("eos_token", "")
    return AnswerEnd(eos, lacks_token=not eos)


def _after_answer(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """What is rendered after the answer; None if the template refuses it, or has no place for it."""
    try:
        _, found, tail = template.render(messages).rpartition(_ANSWER)
    except DataError:
        return None
    return tail if found else None


def close_answers(rendered: Rendered, messages: Sequence[Message], ends: AnswerEnds) -> Rendered:
    """The trained spans with the tokens that end them: the next turn's marker, or text added after the last answer."""
    is_open = bool(messages) and messages[-1]["role"] == "assistant"
    added = ends.after(messages[-1]).text if is_open else ""
    markers = {end.text for end in (ends.said, ends.called) if end.is_marker}
    if not added and not markers:
        return rendered
    text = rendered.text + added

    def closed(end: int) -> int:
        if end == len(rendered.text):
            # of a last answer that is not trained on, the end is not either
            return len(text) if is_open and messages[-1].get("weight", 1) else end
        return end + next((len(marker) for marker in markers if text.startswith(marker, end)), 0)

    return Rendered(text, tuple((start, closed(end)) for start, end in rendered.spans))


def end_notes(template: ChatTemplate, tokenizer: Tokenizer) -> list[Note]:
    """What there is to say about a template after whose answers no token stands that ends them."""
    end = find_ends(template, tokenizer).said
    name = f"the chat template ({template.name})"
    if end.lacks_token:
        written = (
            f"writes only {end.written.strip()!r}, no token of this tokenizer," if end.written else "writes no end"
        )
        return [
            Note(
                f"{name} {written} after an answer, and generation stops at nothing that is trained: the model will "
                "not learn to stop; give a template that ends answers with a token, such as template: empty"
            )
        ]
    if end.is_marker:
        text = f"{name} writes no end after an answer: the marker of the next turn, {end.text}, is trained as its end"
        return [Note(text, is_warning=False)]
    if end.text:
        return [
            Note(
                f"{name} writes no end after an answer: {end.text} is added after the last one of a conversation; "
                "earlier answers are trained without an end"
            )
        ]
    return []
