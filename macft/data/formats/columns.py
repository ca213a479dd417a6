"""Map the keys of rows to what they mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

Style = Literal["alpaca", "conversation", "completion", "preference", "text"]


@dataclass(frozen=True)
class MessageKeys:
    """How a format writes one message: its two keys, and its role names with their meanings.

    The meanings are system, user, assistant, tool, and function (an assistant whose content is tool calls).
    """

    role: str
    content: str
    roles: Mapping[str, str]
    is_tagged: bool = False  # whether it comes from `tags` in dataset_info.json

    def names_of(self, *meanings: str) -> str:
        """The format's own names for these meanings."""
        return " or ".join(name for name, meaning in self.roles.items() if meaning in meanings)


PLAIN = MessageKeys(
    "role", "content", {role: role for role in ("system", "user", "assistant", "tool")} | {"function": "tool"}
)
SHAREGPT = MessageKeys(
    "from",
    "value",
    {"human": "user", "gpt": "assistant", "system": "system", "function_call": "function", "observation": "tool"},
)

# the columns of alpaca rows, and their default keys
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
SIDES = ("chosen", "rejected")
# what may stand beside the messages, or question and answer, of every format
BESIDE = {"system": "system", "history": "history", "tools": "tools", "functions": "functions"}

# keys that may hold a missing column, most likely first
_LIKELY = {
    "prompt": ("instruction", "prompt", "question", "query", "problem", "input"),
    "query": ("input", "query", "question"),
    "response": ("output", "response", "answer", "completion", "target", "solution"),
    "messages": ("conversations", "messages", "conversation", "dialog"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "chosen": ("chosen", "accepted", "preferred"),
    "rejected": ("rejected", "rejected_response"),
}


@dataclass(frozen=True)
class RowFormat:
    """How to read the rows of a data set; `columns` maps each meaning to its key."""

    name: str
    style: Style
    columns: Mapping[str, str]
    naming: MessageKeys | None = None  # None: inferred from each list of messages
    alternates: bool = False  # whether questions and answers must take turns
    is_declared: bool = False  # whether dataset_info.json says so
    unmapped: Mapping[str, str] = field(default_factory=dict)  # key to meaning, of keys that `columns` left out
    ignored: tuple[str, ...] = ()  # keys left out on purpose

    @property
    def keys(self) -> frozenset[str]:
        """The keys that are read."""
        return frozenset(self.columns.values())

    def missing(self, column: str, row: Collection[str]) -> str:
        """The problem of a row without the key of this column: its keys, and which of them may be meant."""
        key = self.columns[column]
        likely = likely_key(column, key, [name for name in row if name not in self.keys])
        found = ", ".join(row) or "none"
        if self.is_declared:
            hint = f'; map it: "columns": {{"{column}": "{likely}"}}' if likely else ""
            return f'no "{key}", to which dataset_info.json maps {column}; found the keys {found}{hint}'
        if self.style == "conversation":
            return f'no "{key}"; found the keys {found}'
        needed = [self.columns[name] for name in self.needed]
        expected = f"{', '.join(needed[:-1])} and {needed[-1]}" if len(needed) > 1 else needed[0]
        hint = f"; if {likely} is meant, rename it or map it in dataset_info.json" if likely else ""
        name = self.name.removesuffix(" preference")
        return f'no "{key}"; {"an" if name[0] in "aeiou" else "a"} {name} row needs {expected}, found {found}{hint}'

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns without which a row is invalid."""
        question = "prompt" if "prompt" in self.columns else "query"
        answers = SIDES if "chosen" in self.columns else ("response",)
        if self.style == "conversation":
            return ("messages",) if answers == ("response",) else ("messages", *SIDES)
        return (question,) if self.style == "text" else (question, *answers)


def likely_key(column: str, key: str, names: Sequence[str]) -> str | None:
    """The name that may stand for `key`: the most similar one, else the most usual for the column."""
    near = get_close_matches(key, names, n=1, cutoff=0.75)
    return near[0] if near else next((name for name in _LIKELY[column] if name in names), None)


def recognize_format(keys: Collection[str]) -> RowFormat | None:
    """The format of conversations with these keys; None if it is unknown."""
    if "messages" in keys:
        return RowFormat("messages", "conversation", {"messages": "messages", **BESIDE}, PLAIN)
    if "instruction" in keys and ("output" in keys or "chosen" not in keys):
        return RowFormat("alpaca", "alpaca", ALPACA | BESIDE)
    if set(SIDES) <= set(keys):
        return None
    if "conversations" in keys:
        columns = {"messages": "conversations", **BESIDE}
        return RowFormat("ShareGPT", "conversation", columns, alternates=True)
    if "completion" in keys and "prompt" in keys:
        columns = {"prompt": "prompt", "response": "completion", **BESIDE}
        return RowFormat("prompt and completion", "completion", columns)
    for prompt in ("query", "prompt"):
        if prompt in keys and "response" in keys:
            columns = {"prompt": prompt, "response": "response", **BESIDE}
            return RowFormat(f"{prompt} and response", "alpaca", columns)
    return None


# every key that a recognized format reads: no other column of a table is read from disk
KNOWN_KEYS = frozenset(
    {"messages", "conversations", "prompt", "completion", "query", "response", "text", *SIDES}
    | {*ALPACA.values(), *BESIDE.values()}
)


def message_keys_of(messages: Any) -> MessageKeys:
    """The keys of a list of messages, inferred from the first one."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return PLAIN if isinstance(first, dict) and "role" in first and "from" not in first else SHAREGPT
