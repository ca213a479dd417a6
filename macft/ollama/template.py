"""Derive the Go template that Ollama needs, and prove that it writes the prompts of the chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.errors import DataError
from macft.ollama import conversations, grammar
from macft.ollama.comparison import Writer, compare, excluded_sentences, sentence
from macft.ollama.conversations import ConversationCase, Kind
from macft.ollama.go import go_template
from macft.ollama.grammar import EMPTY, GIVEN, NONE, START, Grammar, NotDerivableError

# messages in the conversations that a grammar is learned from: every context occurs at two or more lengths
_LEARNED = 8
_RANDOM = 300
_CLOCK = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")
_TIME = re.compile(r"%-?[HIMSfpcXsTR]")
# what ends a turn, or marks a part of one
SPECIAL = re.compile(r"\s*(<[^<>\s]{1,80}>|\[/?[A-Z_]{2,40}\])")

_PLAIN = (
    "Proven for an optional system message and turns of user and assistant, up to the next answer or within one that "
    "was begun."
)
_COLLATED = "Ollama joins messages of one role in a row by an empty line before a TEMPLATE sees them."
_NO_END = "No special token ends an answer in this template: generation stops only where the model ends it."


@dataclass(frozen=True)
class Proof:
    """What is known of a chat template in Ollama: `go` is its TEMPLATE, or None, for the `reason` given.

    `cases` conversations were rendered by both to the same text; `limits` are sentences about what they do not cover;
    `excluded` the kinds of content for which the two differ; `date` the date in `go` where the chat template writes
    today's; `stops` the texts that end an assistant's turn; `takes_system` whether a system message reaches the prompt.
    """

    go: str | None
    reason: str | None
    cases: int
    limits: tuple[str, ...]
    stops: tuple[str, ...]
    takes_system: bool = True
    excluded: tuple[str, ...] = ()
    date: str | None = None


def prove_template(template: ChatTemplate, *, bos: str | None) -> Proof:
    """Derive a Go template and compare it with the chat template on some thousand conversations.

    `bos` is the text of the token that llama.cpp puts before a prompt by itself; the Go template does not hold it.
    """
    try:
        learned = _learn(template)
    except (NotDerivableError, DataError) as error:
        return Proof(None, sentence(error), 0, (), _stops(template, {}))
    known = learned.grammar
    stops = _stops(template, known)
    date, is_held = _date(template.source, known)
    if not is_held:
        return Proof(None, "The template writes the time, which a Go template cannot.", 0, (), stops)
    own_texts = _own_texts(known)
    system = any(context.system == GIVEN for context in known)
    main = compare(template, _go(known), conversations.grammar_cases(own_texts, system=system))
    if main.differs is None:
        random = conversations.random_cases(_RANDOM, own_texts, system=system, without=main.excluded)
        main = compare(template, _go(known), random, main)
    if main.differs is not None:
        return Proof(None, sentence(main.differs), 0, (), stops)

    shapes = _prove_shapes(template, learned, own_texts, main.excluded)
    limits = [
        _PLAIN,
        *learned.limits,
        _COLLATED,
        *excluded_sentences(main.excluded, _cause),
        *shapes.limits,
        *([f"The date in the TEMPLATE stays {date}, where the chat template writes today's."] if date else []),
        *_about_bos(shapes.grammar, bos),
        *([] if stops else [_NO_END]),
    ]
    return Proof(
        go_template(shapes.grammar, bos=bos),
        None,
        main.equal + shapes.equal,
        tuple(limits),
        stops,
        takes_system=any(len(piece) > 1 for piece in shapes.grammar.values()),
        excluded=tuple(conversations.where(*kind) for kind in main.excluded),
        date=date,
    )


def needed_stops(proof: Proof, eog_texts: Collection[str]) -> tuple[str, ...]:
    """The ends of an assistant's turn at which llama.cpp does not stop by itself: those not among `eog_texts`."""
    return tuple(stop for stop in proof.stops if stop not in eog_texts)


@dataclass(frozen=True)
class _Learned:
    """A grammar, its limits, and which further shapes of a conversation it holds."""

    grammar: Grammar
    limits: tuple[str, ...]
    system_alone: bool
    later_system: bool
    answer_first: bool


def _learn(template: ChatTemplate) -> _Learned:
    limits = []
    shapes = grammar.alternating("user", _LEARNED)
    known = grammar.learn(template, shapes, NONE, {})
    states = [NONE, GIVEN, EMPTY]
    try:
        known = grammar.learn(template, shapes, GIVEN, known)
    except DataError as error:
        limits.append(f"{sentence(error)} Ollama passes system messages anyway: they are left out.")
        states = [NONE]
    else:
        known = grammar.learn(template, shapes, EMPTY, known)
        if all(len(piece) == 1 for piece in known.values()):
            limits.append("The template leaves system messages out.")
    known, system_alone = _more(template, [[]], states[1:], known)
    known, later_system = _more(template, grammar.later_system(5), states, known)
    known, answer_first = _more(template, grammar.alternating("assistant", _LEARNED), states, known)
    return _Learned(known, tuple(limits), system_alone, later_system, answer_first)


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


@dataclass(frozen=True)
class _Shapes:
    """A grammar of all shapes that reach Ollama, how many cases of the further ones are proven, and limits."""

    grammar: Grammar
    equal: int
    limits: tuple[str, ...]


def _prove_shapes(
    template: ChatTemplate, learned: _Learned, own_texts: Sequence[str], without: Collection[Kind]
) -> _Shapes:
    """Keep what was learned of further shapes where it is proven; else write them as the nearest that is."""
    proven, equal, limits = dict(learned.grammar), 0, []
    states = {context.system for context in proven}

    def holds(is_learned: bool, cases: Iterable[ConversationCase]) -> bool:
        nonlocal equal
        found = compare(template, _go(proven), cases) if is_learned else None
        equal += found.equal if found is not None and found.differs is None else 0
        return found is not None and found.differs is None

    if not holds(learned.later_system, conversations.later_system_cases()):
        proven = {c: piece for c, piece in proven.items() if "system" not in (c.role, c.before)}
        limits.append("A system message after the first message is left out.")
    if GIVEN in states and not holds(learned.system_alone, conversations.system_alone_cases(own_texts, without)):
        limits.append("A system message alone is written as if an empty question followed it.")
        proven = dict(grammar.with_system_alone(proven))
    if not holds(learned.answer_first, conversations.answer_first_cases(system=GIVEN in states)):
        limits.append("A conversation that begins with an answer is written as if an empty question came first.")
        kept = {c: piece for c, piece in proven.items() if (c.before, c.role) != (START, "assistant")}
        proven = dict(grammar.with_answer_first(kept))
    return _Shapes(proven, equal, tuple(limits))


def _go(known: Grammar) -> Writer:
    def write(messages: Sequence[Message]) -> str:
        covered = all(context in known for context in grammar.contexts(messages))
        return grammar.render(known, messages) if covered else ""

    return Writer("the TEMPLATE", write)


def _cause(kind: str) -> str:
    return "Go cannot trim: " if kind in (conversations.SPACED, conversations.WIDE) else ""


def _date(source: str, known: Grammar) -> tuple[str | None, bool]:
    """(Today's date as the template writes it, if it does; whether that is all it writes of the time.)"""
    if "strftime_now" not in source:
        return None, True
    patterns = [one or two for one, two in _CLOCK.findall(source)]
    if len(patterns) != source.count("strftime_now(") or any(_TIME.search(pattern) for pattern in patterns):
        return None, False
    texts = "\0".join(part for piece in known.values() for part in piece)
    dates = [datetime.now().strftime(pattern) for pattern in patterns]
    return next((date for date in dates if date in texts), None), True


def _own_texts(known: Grammar) -> list[str]:
    texts = {part.strip() for piece in known.values() for part in piece if len(part) < 200}
    texts |= {special for text in texts for special in SPECIAL.findall(text)}
    return sorted(texts - {""})


def _stops(template: ChatTemplate, known: Grammar) -> tuple[str, ...]:
    answer = "zqanswerqz"
    question = {"role": "user", "content": "question"}
    try:
        tails = [template.render([question, {"role": "assistant", "content": answer}]).partition(answer)[2]]
    except DataError:
        tails = []
    tails += [piece[0] for context, piece in known.items() if (context.before, context.role) == ("assistant", "user")]
    ends = [special[1] for tail in tails if (special := SPECIAL.match(tail))]
    return tuple(dict.fromkeys(ends))


def _about_bos(known: Grammar, bos: str | None) -> list[str]:
    starts = [piece[0] for context, piece in known.items() if context.before == START]
    if bos is None or all(start.startswith(bos) for start in starts):
        return []
    return [f"Before every prompt llama.cpp puts {bos}, which the template does not: write add_bos_token as false."]
