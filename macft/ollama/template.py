"""Derive the Go template that Ollama needs, and prove that it writes the prompts of the chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from macft.data.templates.chat_template import ChatTemplate
from macft.errors import DataError
from macft.ollama import conversations, grammar
from macft.ollama.conversations import ConversationCase
from macft.ollama.go import go_template
from macft.ollama.grammar import EMPTY, GIVEN, NONE, START, Grammar, NotDerivableError

# messages in the conversations that a grammar is learned from: every context occurs at two or more lengths
_LEARNED = 8
_RANDOM = 300
_SPECIAL = re.compile(r"\s*(<[^<>\s]{1,80}>|\[/?[A-Z_]{2,40}\])")

_PLAIN = (
    "Proven for an optional system message and turns of user and assistant, up to the next answer or within one that "
    "was begun."
)
_COLLATED = "Ollama joins messages of one role in a row by an empty line before any template sees them."
_NO_END = "No special token ends an answer in this template: generation stops only where the model ends it."


@dataclass(frozen=True)
class Proof:
    """What is known of a chat template in Ollama: `go` is its TEMPLATE, or None, for the `reason` given.

    `cases` conversations were rendered by both to the same text; `limits` are sentences about what they do not cover;
    `stops` the texts that end an assistant's turn; `takes_system` whether a system message reaches the prompt.
    """

    go: str | None
    reason: str | None
    cases: int
    limits: tuple[str, ...]
    stops: tuple[str, ...]
    takes_system: bool = True


def prove_template(template: ChatTemplate, *, bos: str | None) -> Proof:
    """Derive a Go template and compare it with the chat template on some thousand conversations.

    `bos` is the text of the token that llama.cpp puts before a prompt by itself; the Go template does not hold it.
    """
    try:
        known, learned_limits, later_system, answer_first = _learn(template)
    except (NotDerivableError, DataError) as error:
        return Proof(None, _sentence(error), 0, (), _stops(template, {}))
    stops = _stops(template, known)
    if _writes_date(template.source, known):
        return Proof(None, "The template writes today's date, which a Go template cannot.", 0, (), stops)
    own_texts = _own_texts(known)
    system = any(context.system == GIVEN for context in known)
    limits = [_PLAIN, *learned_limits, _COLLATED]

    main = _compare(template, known, conversations.grammar_cases(own_texts, system=system))
    if main.differs is not None:
        return Proof(None, main.differs, 0, (), stops)
    if main.spaced is not None:
        limits.append(f"Equal only for contents without outer white space, as Go cannot trim: {main.spaced}")
    random = conversations.random_cases(_RANDOM, own_texts, system=system, spaced=main.spaced is None)
    mixed = _compare(template, known, random)
    if mixed.differs is not None or mixed.spaced is not None:
        return Proof(None, mixed.differs or mixed.spaced, 0, (), stops)
    cases = main.equal + mixed.equal

    proven = known
    later = _compare(template, proven, conversations.later_system_cases()) if later_system else None
    if later is None or later.differs is not None:
        proven = {c: piece for c, piece in proven.items() if "system" not in (c.role, c.before)}
        limits.append("A system message after the first message is left out.")
    answers = _compare(template, proven, conversations.answer_first_cases(system=system)) if answer_first else None
    if answers is None or answers.differs is not None:
        limits.append("A conversation that begins with an answer is written as if an empty question came first.")
        kept = {c: piece for c, piece in proven.items() if (c.before, c.role) != (START, "assistant")}
        proven = grammar.with_answer_first(kept)
    cases += sum(found.equal for found in (later, answers) if found is not None and found.differs is None)

    limits += [*_overridden(template.source), *_about_bos(proven, bos), *([] if stops else [_NO_END])]
    takes_system = any(len(piece) > 1 for piece in proven.values())
    return Proof(go_template(proven, bos=bos), None, cases, tuple(limits), stops, takes_system)


def needed_stops(proof: Proof, eog_texts: Collection[str]) -> tuple[str, ...]:
    """The ends of an assistant's turn at which llama.cpp does not stop by itself: those not among `eog_texts`."""
    return tuple(stop for stop in proof.stops if stop not in eog_texts)


def _learn(template: ChatTemplate) -> tuple[Grammar, list[str], bool, bool]:
    """(the grammar, its limits, whether it holds later system messages, whether answers that come first)."""
    limits = []
    shapes = grammar.alternating("user", _LEARNED)
    known = grammar.learn(template, shapes, NONE, {})
    states = [NONE, GIVEN, EMPTY]
    try:
        known = grammar.learn(template, shapes, GIVEN, known)
    except DataError as error:
        limits.append(f"{_sentence(error)} Ollama passes system messages anyway: they are left out.")
        states = [NONE]
    else:
        known = grammar.learn(template, shapes, EMPTY, known)
        if all(len(piece) == 1 for piece in known.values()):
            limits.append("The template leaves system messages out.")
    known, later_system = _more(template, grammar.later_system(5), states, known)
    known, answer_first = _more(template, grammar.alternating("assistant", _LEARNED), states, known)
    return known, limits, later_system, answer_first


def _more(
    template: ChatTemplate, shapes: Sequence[Sequence[str]], states: Sequence[str], known: Grammar
) -> tuple[Grammar, bool]:
    """`known`, extended by these conversations unless the template refuses them or writes them by another rule."""
    more = known
    try:
        for state in states:
            more = grammar.learn(template, shapes, state, more)
    except (DataError, NotDerivableError):
        return known, False
    return more, True


@dataclass
class _Comparison:
    equal: int = 0
    differs: str | None = None
    spaced: str | None = None


def _compare(template: ChatTemplate, known: Grammar, cases: Iterable[ConversationCase]) -> _Comparison:
    """Compare up to the first difference; those of contents with outer white space are noted and passed over."""
    found = _Comparison()
    for case in cases:
        try:
            asked = grammar.expected(template, case.messages)
        except (DataError, NotDerivableError) as error:
            found.differs = f"With {case.name}: {_sentence(error)}"
            return found
        covered = all(context in known for context in grammar.contexts(case.messages))
        written = grammar.render(known, case.messages) if covered else ""
        if written == asked:
            found.equal += 1
            continue
        difference = f"with {case.name}, the template {_first_difference(asked, written)}."
        if not case.is_spaced:
            found.differs = difference[0].upper() + difference[1:]
            return found
        found.spaced = found.spaced or difference
    return found


def _first_difference(asked: str, written: str) -> str:
    pairs = enumerate(zip(asked, written, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(asked), len(written)))
    shown = slice(max(0, same - 10), same + 20)
    return f"writes {asked[shown]!r} where only roles and contents give {written[shown]!r}"


def _writes_date(source: str, known: Grammar) -> bool:
    if "strftime_now" not in source:
        return False
    patterns = re.findall(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)", source)
    if len(patterns) != source.count("strftime_now("):
        return True
    texts = "\0".join(part for piece in known.values() for part in piece)
    return any(datetime.now().strftime(double or single) in texts for double, single in patterns)


def _own_texts(known: Grammar) -> list[str]:
    texts = {part.strip() for piece in known.values() for part in piece if len(part) < 200}
    texts |= {special for text in texts for special in _SPECIAL.findall(text)}
    return sorted(texts - {""})


def _stops(template: ChatTemplate, known: Grammar) -> tuple[str, ...]:
    answer = "zqanswerqz"
    question = {"role": "user", "content": "question"}
    try:
        tails = [template.render([question, {"role": "assistant", "content": answer}]).partition(answer)[2]]
    except DataError:
        tails = []
    tails += [piece[0] for context, piece in known.items() if (context.before, context.role) == ("assistant", "user")]
    ends = [special[1] for tail in tails if (special := _SPECIAL.match(tail))]
    return tuple(dict.fromkeys(ends))


def _overridden(source: str) -> list[str]:
    has_tools = "tools" in source or "tool_call" in source
    has_thinking = "<think>" in source and "</think>" in source
    what = " and ".join(["tools"] * has_tools + ["thinking"] * has_thinking)
    if not what:
        return []
    return [
        f"{what.capitalize()}, which the chat template knows, are not in the Go template; for their sake Ollama 0.30 "
        "and later render with the chat template in the GGUF instead, unless OLLAMA_GO_TEMPLATE=1 is set."
    ]


def _about_bos(known: Grammar, bos: str | None) -> list[str]:
    starts = [piece[0] for context, piece in known.items() if context.before == START]
    if bos is None or all(start.startswith(bos) for start in starts):
        return []
    return [f"Before every prompt llama.cpp puts {bos}, which the template does not: write add_bos_token as false."]


def _sentence(error: Exception) -> str:
    text = str(error).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
