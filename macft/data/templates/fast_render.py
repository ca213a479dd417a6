"""Render conversations without Jinja where the result is proven to be the same.

For each order of roles the template is rendered once with marks in place of contents. The marks record what the
template does to a content: if it only places, strips or searches it, the text between the marks is the same for every
conversation of that order in which each search finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

from jinja2 import nodes

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.templates.overlap import closing_length
from macft.errors import DataError

# how many orders of roles are kept, and how often one is met before it pays off
_MOST_ORDERS = 500
_WORTH = 3
# a template with a clock or random numbers does not always render the same text
_UNSTEADY = ("strftime_now", "random", "lipsum")
# nodes that may join texts unseen by a mark; and the filters that are safe
_UNSEEN = (nodes.Macro, nodes.AssignBlock, nodes.FilterBlock, nodes.Include, nodes.Import, nodes.FromImport)
_FILTERS = frozenset(
    [
        *("trim", "string", "length", "count", "list", "first", "last"),
        *("selectattr", "rejectattr", "default", "d", "tojson", "int"),
    ]
)
_MARK = re.compile("\ue000([0-9]+)\ue001")
_STRIPS = {"strip": str.strip, "lstrip": str.lstrip, "rstrip": str.rstrip}

Strip = tuple[str, str | None]  # (name of the method, its argument)
Span = tuple[int, int]


class Slot(NamedTuple):
    """A place for the content of a message, and how it is stripped, in order."""

    message: int
    strips: tuple[Strip, ...]


class ContentProbe(NamedTuple):
    """A text that the template searched a content for, and did not find; None: any character at all."""

    slot: Slot
    text: str | None


Items = tuple[str | Slot, ...]


@dataclass(frozen=True)
class Skeleton:
    """A conversation's text without its contents; valid where no probe finds anything."""

    items: Items
    probes: frozenset[ContentProbe]


@dataclass(frozen=True)
class JoinedText:
    """A rendered conversation, and the trained span of each assistant message by its index."""

    text: str
    spans: dict[int, Span]


@dataclass(frozen=True)
class _JoinPlan:
    items: Items
    probes: frozenset[ContentProbe]
    # (assistant message, first item of its span, characters of that item before it, and the same of its end)
    spans: tuple[tuple[int, int, int, int, int], ...]


class FastRenderer:
    """Renders conversations that have only roles and contents, with their spans."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._met: dict[tuple[str, ...], int] = {}
        self._plans: dict[tuple[str, ...], _JoinPlan | None] = {}

    def render(self, messages: Sequence[Message]) -> JoinedText | None:
        """The text and spans that Jinja would give; None where Jinja is needed."""
        if any(len(message) != 2 or not isinstance(message.get("content"), str) for message in messages):
            return None
        roles = tuple(message["role"] for message in messages)
        plan = self._plan(roles)
        return None if plan is None else _fill(plan, [message["content"] for message in messages])

    def _plan(self, roles: tuple[str, ...]) -> _JoinPlan | None:
        if roles in self._plans:
            return self._plans[roles]
        met = self._met[roles] = self._met.get(roles, 0) + 1
        if met < _WORTH or len(self._plans) >= _MOST_ORDERS:
            return None
        self._plans[roles] = _make_plan(self._template, roles)
        return self._plans[roles]


@lru_cache(maxsize=8)
def compile_template(template: ChatTemplate) -> FastRenderer | None:
    """A renderer for `template`; None if it cannot even render a question and its answer."""
    if any(word in template.source for word in _UNSTEADY) or not _can_be_followed(template.syntax()):
        return None
    return FastRenderer(template) if _make_plan(template, ("user", "assistant")) is not None else None


def skeleton(template: ChatTemplate, roles: Sequence[str], *, add_generation_prompt: bool = False) -> Skeleton | None:
    """The text of a conversation of these roles around its contents; None if it depends on them otherwise."""
    book = _Book()
    messages = [{"role": role, "content": book.mark(Slot(i, ()))} for i, role in enumerate(roles)]
    try:
        text = template.render(messages, add_generation_prompt=add_generation_prompt)
    except DataError:
        return None
    items: list[str | Slot] = []
    for i, piece in enumerate(_MARK.split(text)):
        items += [book.slots[int(piece)]] if i % 2 else [piece] * bool(piece)
    return Skeleton(tuple(items), frozenset(book.probes))


def _can_be_followed(tree: nodes.Template) -> bool:
    """Whether marks see everything done to them: nothing turns them into text unseen."""
    if next(tree.find_all(_UNSEEN), None) is not None:
        return False
    shown = [piece for output in tree.find_all(nodes.Output) for piece in output.nodes]
    raised = [piece for call in tree.find_all(nodes.Call) if _raises(call) for piece in call.args]
    seen = {id(piece) for piece in shown + raised}
    return (
        all(id(concat) in seen for concat in tree.find_all(nodes.Concat))
        and all(one.name in _FILTERS for one in tree.find_all(nodes.Filter))
        and not any(one.attr in ("join", "format", "format_map") for one in tree.find_all(nodes.Getattr))
        and not any(isinstance(mod.left, nodes.Const) for mod in tree.find_all(nodes.Mod))
    )


def _raises(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Name) and call.node.name == "raise_exception"


class _UnknownUseError(Exception):
    """A template uses a content in a way that marks do not follow."""


class _Book:
    """The slots behind the marks, and the probes of them."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.probes: set[ContentProbe] = set()

    def mark(self, slot: Slot) -> _Marked:
        self.slots.append(slot)
        return _Marked(f"\ue000{len(self.slots) - 1}\ue001", self, slot)


class _Marked(str):
    """A mark in place of a content, or (`slot` None) a text that contains marks."""

    _book: _Book
    _slot: Slot | None

    def __new__(cls, text: str, book: _Book, slot: Slot | None) -> _Marked:
        self = super().__new__(cls, text)
        self._book = book
        self._slot = slot
        return self

    def _look(self, text: str | None) -> None:
        if self._slot is None:
            raise _UnknownUseError
        self._book.probes.add(ContentProbe(self._slot, text))

    def _stripped(self, how: str, characters: str | None) -> _Marked:
        if self._slot is None:
            raise _UnknownUseError
        return self._book.mark(Slot(self._slot.message, (*self._slot.strips, (how, characters))))

    def strip(self, characters: str | None = None, /) -> _Marked:  # type: ignore[override]
        return self._stripped("strip", characters)

    def lstrip(self, characters: str | None = None, /) -> _Marked:  # type: ignore[override]
        return self._stripped("lstrip", characters)

    def rstrip(self, characters: str | None = None, /) -> _Marked:  # type: ignore[override]
        return self._stripped("rstrip", characters)

    def __contains__(self, text: Any) -> bool:
        self._look(str(text))
        return False

    def startswith(self, text: Any, *bounds: Any) -> bool:
        if bounds or not isinstance(text, str):
            raise _UnknownUseError
        self._look(text)
        return False

    endswith = startswith

    def __bool__(self) -> bool:
        if self._slot is not None:
            self._look(None)
        elif not _MARK.sub("", self):
            raise _UnknownUseError
        return True

    def __add__(self, other: str) -> _Marked:
        return _Marked(str.__add__(self, other), self._book, None)

    def __radd__(self, other: str) -> _Marked:
        return _Marked(str.__add__(other, self), self._book, None)

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        raise _UnknownUseError


def _unknown(*_: Any, **__: Any) -> NoReturn:
    raise _UnknownUseError


# everything else that a string can do
_FOLLOWED = {*vars(_Marked), "__class__", "__doc__", "__format__", "__getattribute__", "__getnewargs__", "__sizeof__"}
for _name in set(dir(str)) - set(dir(object)) - _FOLLOWED | {"__eq__", "__ne__"}:
    setattr(_Marked, _name, _unknown)


def _make_plan(template: ChatTemplate, roles: tuple[str, ...]) -> _JoinPlan | None:
    """How to render conversations of these roles; None where Jinja is needed."""
    full = skeleton(template, roles)
    if full is None:
        return None
    probes = set(full.probes)
    spans = []
    for turn in (i for i, role in enumerate(roles) if role == "assistant"):
        # no template need prompt for an answer to nothing
        prompt = skeleton(template, roles[:turn] or ("user",), add_generation_prompt=True)
        answered = skeleton(template, roles[: turn + 1])
        if prompt is None or answered is None:
            return None
        begin = _end_of(prompt.items, full.items) if turn else _begin_of_opening(template, prompt.items, full.items)
        end = _end_of_turn(answered.items, full.items, turn)
        if begin is None or end is None:
            return None
        probes |= answered.probes | (prompt.probes if turn else set())
        spans.append((turn, *begin, *end))
    plan = _JoinPlan(full.items, frozenset(probes), tuple(spans))
    return plan if _holds(template, roles, plan) else None


def _end_of(start: Items, items: Items) -> tuple[int, int] | None:
    """(item, characters of it) where `start` ends in `items`; None if `items` start differently."""
    if not start:
        return 0, 0
    last = len(start) - 1
    if last >= len(items) or start[:last] != items[:last]:
        return None
    mine, theirs = start[last], items[last]
    if isinstance(mine, str) and isinstance(theirs, str) and theirs.startswith(mine):
        return last, len(mine)
    return (last + 1, 0) if mine == theirs else None


def _begin_of_opening(template: ChatTemplate, prompt: Items, items: Items) -> tuple[int, int] | None:
    """Where an answer that opens a conversation begins, by what is written between `prompt`, a question's, and it."""
    answered = skeleton(template, ("user", "assistant"))
    if answered is None:
        return None
    before, here = _before(answered.items, 1), _before(items, 0)
    if not before or not here or not prompt or before[:-1] != prompt[:-1]:
        return None
    asked, written, opening = prompt[-1], before[-1], here[-1]
    if not isinstance(asked, str) or not isinstance(written, str) or not isinstance(opening, str):
        return None
    if not written.startswith(asked):
        return None
    return len(here) - 1, len(opening.removesuffix(written[len(asked) :]))


def _before(items: Items, message: int) -> Items:
    """The items before the first slot of a message."""
    places = [i for i, item in enumerate(items) if isinstance(item, Slot) and item.message == message]
    return items[: places[0]] if places else ()


def _end_of_turn(answered: Items, items: Items, turn: int) -> tuple[int, int] | None:
    """Where the turn that ends `answered` ends in `items`, although it may be rendered differently there."""
    if (end := _end_of(answered, items)) is not None:
        return end
    places = [
        [i for i, item in enumerate(each) if isinstance(item, Slot) and item.message == turn]
        for each in (answered, items)
    ]
    if [len(found) for found in places] != [1, 1]:
        return None
    here, there = places[0][0] + 1, places[1][0] + 1
    if (end := _end_of(answered[here:], items[there:])) is not None:
        return there + end[0], end[1]
    mine, theirs = answered[here:], items[there : there + 1]
    if len(mine) != 1 or not isinstance(mine[0], str) or not theirs or not isinstance(theirs[0], str):
        return None
    length = closing_length(mine[0], theirs[0])
    return None if length is None else (there, length)


def _fill(plan: _JoinPlan, contents: Sequence[str]) -> JoinedText | None:
    for slot, text in plan.probes:
        content = _stripped(contents[slot.message], slot.strips)
        if not content if text is None else text in content:
            return None
    pieces = [item if isinstance(item, str) else _stripped(contents[item.message], item.strips) for item in plan.items]
    starts = [0, *accumulate(map(len, pieces))]
    spans = {turn: (starts[a] + b, starts[c] + d) for turn, a, b, c, d in plan.spans}
    return JoinedText("".join(pieces), spans)


def _stripped(content: str, strips: tuple[Strip, ...]) -> str:
    for how, characters in strips:
        content = _STRIPS[how](content, characters)
    return content


# contents that a template may treat specially
_ODD = ("", " ", "\n a \n", "a", '"<&>\\ {{ x }}', "你好 \t", "[x]", "0")


def _holds(template: ChatTemplate, roles: tuple[str, ...], plan: _JoinPlan) -> bool:
    """Whether Jinja renders odd contents as the plan does."""
    for shift in range(len(_ODD)):
        contents = [_ODD[(shift + 3 * i) % len(_ODD)] for i in range(len(roles))]
        filled = _fill(plan, contents)
        if filled is None:
            continue
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            if template.render(messages) != filled.text:
                return False
        except DataError:
            return False
    return True
