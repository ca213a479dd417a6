"""Learn the texts that a chat template puts between the contents of a conversation, if they follow from the roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from macft.data.templates.chat_template import ChatTemplate, Message

NONE, EMPTY, GIVEN = "none", "empty", "given"  # the system message that opens a conversation
START, END = "", "end"
# the last message, the one before it, and all others can be told apart
FAR = 3

_SYSTEM = "zqs0qz"
_CUT = "zqcutqz"

# The text before a content, cut where the system's content stands in it: system.join(piece) is what is written.
Piece = tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """A place in a conversation: before the content of `role`, or at its END.

    `before` is the role of the message before it. A system message that opens a conversation is not a message of its
    own here but part of the text before the first one, as templates may put it anywhere. `left` counts the messages
    from here on, up to FAR.
    """

    system: str
    before: str
    role: str
    left: int


Grammar = Mapping[Context, Piece]


class NotDerivableError(Exception):
    """The text between contents does not follow from the Context; the message says where."""


def expected(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """The prompt, up to where an answer begins or the last answer goes on.

    Raises DataError when the template refuses the conversation.
    """
    if messages[-1]["role"] != "assistant":
        return template.render(messages, add_generation_prompt=True)
    begun = {**messages[-1], "content": messages[-1]["content"] + _CUT}
    text = template.render([*messages[:-1], begun])
    if text.count(_CUT) != 1:
        raise NotDerivableError("the template does not write the last answer exactly once and unchanged")
    return text[: text.index(_CUT)]


def contexts(messages: Sequence[Message]) -> list[Context]:
    """One for each message after the opening system message, and one for the END if an answer is to begin there."""
    system, turns = _opening(messages)
    state = NONE if system is None else GIVEN if system else EMPTY
    found, before = [], START
    for i, message in enumerate(turns):
        found.append(Context(state, before, message["role"], min(len(turns) - i, FAR)))
        before = message["role"]
    if before != "assistant":
        found.append(Context(state, before, END, 0))
    return found


def render(grammar: Grammar, messages: Sequence[Message]) -> str:
    """What the grammar writes for a conversation; KeyError for a context it does not know."""
    system, turns = _opening(messages)
    pieces = [(system or "").join(grammar[context]) for context in contexts(messages)]
    contents = [message["content"] for message in turns] + [""]
    return "".join(piece + content for piece, content in zip(pieces, contents, strict=False))


def learn(template: ChatTemplate, conversations: Iterable[Sequence[str]], system: str, known: Grammar) -> Grammar:
    """`known`, with the pieces that these conversations (given as roles) show.

    Raises NotDerivableError when one context shows two texts, DataError when the template refuses a conversation.
    """
    grammar = dict(known)
    for roles in conversations:
        messages = [{"role": role, "content": f"zq{role[0]}{i}qz"} for i, role in enumerate(roles, 1)]
        if system != NONE:
            messages.insert(0, {"role": "system", "content": _SYSTEM if system == GIVEN else ""})
        pieces = _between(expected(template, messages), messages[system != NONE :])
        for context, piece in zip(contexts(messages), pieces, strict=False):
            other = grammar.setdefault(context, piece)
            # an empty system message may be known as a given one
            if other != piece and not (system == EMPTY and "".join(other) == "".join(piece)):
                what = "the generation prompt" if context.role == END else f"the text before {_a(context.role)} message"
                raise NotDerivableError(f"{what} depends on more than the roles and the places of its neighbors")
    return _as_given(grammar)


def alternating(first: str, longest: int) -> list[list[str]]:
    """The roles of conversations of 1 to `longest` messages in which two roles take turns."""
    pair = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [[pair[i % 2] for i in range(count)] for count in range(1, longest + 1)]


def later_system(longest: int) -> list[list[str]]:
    """The roles of conversations with a system message somewhere after the first message."""
    return [
        [*roles[:place], "system", *roles[place:]]
        for roles in alternating("user", longest)
        for place in range(1, len(roles) + 1)
    ]


def with_answer_first(grammar: Grammar) -> Grammar:
    """Extend a grammar to conversations that begin with an answer, as if an empty question came first.

    Ollama produces such conversations when it drops the oldest messages of one that is too long.
    """
    extended = dict(grammar)
    for context in grammar:
        if context.before == "user" and context.role == "assistant":
            first = Context(context.system, START, "user", min(context.left + 1, FAR))
            if first in grammar:
                answer = Context(context.system, START, "assistant", context.left)
                extended[answer] = _joined(grammar[first], grammar[context])
    return extended


def with_system_alone(grammar: Grammar) -> Grammar:
    """Extend a grammar to a conversation of nothing but a system message, as if an empty question followed it."""
    extended = dict(grammar)
    for system in (GIVEN, EMPTY):
        question, end = Context(system, START, "user", 1), Context(system, "user", END, 0)
        if question in grammar and end in grammar:
            extended[Context(system, START, END, 0)] = _joined(grammar[question], grammar[end])
    return extended


def _opening(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def _between(text: str, turns: Sequence[Message]) -> list[Piece]:
    pieces, start = [], 0
    for message in turns:
        content = message["content"]
        place = text.find(content, start)
        if place < 0 or text.count(content) != 1:
            role = _a(message["role"])
            raise NotDerivableError(f"the template does not write the content of {role} message once, in its order")
        pieces.append(tuple(text[start:place].split(_SYSTEM)))
        start = place + len(content)
    return [*pieces, tuple(text[start:].split(_SYSTEM))]


def _as_given(grammar: dict[Context, Piece]) -> Grammar:
    # an empty system message that is written like any other needs no separate case
    for context, piece in grammar.items():
        given = grammar.get(Context(GIVEN, context.before, context.role, context.left))
        if context.system == EMPTY and given is not None and "".join(given) == "".join(piece):
            grammar[context] = given
    return grammar


def _joined(left: Piece, right: Piece) -> Piece:
    return (*left[:-1], left[-1] + right[0], *right[1:])


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
