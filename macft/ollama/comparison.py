"""Compare what a chat template writes for generated conversations with what something else writes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.errors import DataError
from macft.ollama import grammar
from macft.ollama.conversations import SPACED, WIDE, ConversationCase, Kind, where
from macft.ollama.grammar import NotDerivableError


@dataclass(frozen=True)
class Writer:
    """Something else that writes prompts, and what it is called in a sentence; an empty text where it cannot."""

    name: str
    write: Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Comparison:
    """How many conversations are equal, where those of seldom contents are not, and the first other difference."""

    equal: int = 0
    excluded: Mapping[Kind, str] = field(default_factory=dict)
    differs: str | None = None


def compare(
    template: ChatTemplate, other: Writer, cases: Iterable[ConversationCase], before: Comparison | None = None
) -> Comparison:
    """Compare up to the first difference, after what was found `before`; those of a seldom kind are only noted."""
    equal, excluded = (before.equal, dict(before.excluded)) if before is not None else (0, {})
    for case in cases:
        difference = _difference(template, other, case)
        if difference is None:
            equal += 1
        elif case.seldom is None:
            return Comparison(equal, excluded, f"with {case.name}{difference}")
        else:
            excluded.setdefault(case.seldom, difference)
    return Comparison(equal, excluded)


def excluded_sentences(excluded: Mapping[Kind, str], cause: Callable[[str], str] = lambda _: "") -> list[str]:
    """One sentence for each kind of content that differs, with its first difference; `cause` opens one with a reason.

    White space beyond ASCII is named only where the other is equal.
    """
    roles: dict[str, list[str]] = {}
    for kind, role in excluded:
        if kind != WIDE or (SPACED, role) not in excluded:
            roles.setdefault(kind, []).append(role)
    return [
        sentence(f"{cause(kind)}not equal with {where(kind, *found)}{excluded[kind, found[0]]}")
        for kind, found in roles.items()
    ]


def sentence(text: object) -> str:
    """The text with a capital letter at its start and one full stop at its end."""
    ended = f"{str(text).rstrip('.')}."
    return f"{ended[:1].upper()}{ended[1:]}"


def _difference(template: ChatTemplate, other: Writer, case: ConversationCase) -> str | None:
    """How the two differ, as the rest of a sentence, or None."""
    try:
        asked = grammar.expected(template, case.messages)
    except (DataError, NotDerivableError) as error:
        return f": {error}"
    written = other.write(case.messages)
    if written == asked:
        return None
    pairs = enumerate(zip(asked, written, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(asked), len(written)))
    shown = slice(max(0, same - 10), same + 20)
    return f", the template writes {asked[shown]!r} and {other.name} {written[shown]!r}"
