"""Generate the conversations on which a Go template must equal the chat template."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from macft.data.templates.chat_template import Message
from macft.ollama.grammar import alternating, later_system

EMPTY, THOUGHTS, TOOLS = "an empty text", "<think> or </think>", "<tool_call> or <tool_response>"
OWN, SPACED, WIDE = "the template's own tags", "outer white space", "outer white space beyond ASCII"
_TOGETHER = "tags, thoughts and white space together"
# kinds of content with examples, none of which begins or ends with white space
_KINDS = {
    "plain text": ("What is the capital of France?", "Paris.", "a", "assistant"),
    EMPTY: ("",),
    "several lines": ("one\n\n two\n\tthree", "# Title\n\n- a\n- b\n\n```python\nprint('x')\n```"),
    THOUGHTS: ("<think>\nhm\n</think>\n\nyes", "no</think>yes", "<think>\n\n</think>\n\nwell", "<think>"),
    "JSON": ('{"name": "f", "arguments": {"x": [1, null, "é\\n"]}}', "[]", "null"),
    "braces": ("{{ .System }}", "{% raw %}{{ x }}{% endraw %}", "{# no #} }} {{- end -}}", "{", "}}"),
    "quotes": ('"""\n"""', "'''", '"It\'s" \\" \\n `x`', '"'),
    "characters that do not print": ("a\u00a0b\u200b\u3000c\ufeffd\x00e\x1b[0m\r\nf\x85g\u2028h", "a\u200b\u202eb"),
    "Chinese": ("你好，世界！今天天气怎么样？", "我是一个助手。", "日本語 한국어 ไทย العربية"),
    "emoji": ("👩‍👩‍👧 🇨🇳 🎉", "é 𝄞 ﬁ"),
    TOOLS: ("<tool_call>\n{}\n</tool_call>", "<tool_response>x</tool_response>"),
    "tags": ("<b>&amp;</b>", "<|x|>"),
    "role words": ("user\nassistant: system", "Human: hi\nAssistant:", "### Instruction:\nx\n\n### Response:"),
}
# what plain chat seldom holds: a template may treat it by a rule of its own and be equal in all other contents
_SELDOM = {EMPTY, THOUGHTS, TOOLS, OWN, SPACED, WIDE}
_SPACED, _WIDE = (" a ", "\n\na\n", "  ", "a\n", "\ta"), ("\u3000a\u00a0", "a\u3000")
_ROLES = ("user", "assistant", "system")
_SEED = 20261122
_LONGEST = 12

Kind = tuple[str, str]  # (what a content holds, the role of its message)


@dataclass(frozen=True)
class ConversationCase:
    """A conversation, the name of what it is about, and the kind of content in it that plain chat seldom holds."""

    messages: tuple[Message, ...]
    name: str
    seldom: Kind | None = None


def grammar_cases(own_texts: Sequence[str], *, system: bool) -> Iterator[ConversationCase]:
    """Yield every shape of a conversation with plain contents, then each kind of content in each role.

    `own_texts` are the template's own texts and special tokens; with `system`, half begin with a system message.
    """
    shapes = [roles for roles in alternating("user", _LONGEST)]
    shapes += [["system", *roles] for roles in shapes] if system else []
    for roles in shapes:
        yield _case(roles, [f"{role} {i}" for i, role in enumerate(roles)], "plain text")
    for name, texts in _kinds(own_texts).items():
        for role in _ROLES:
            for shape, roles in enumerate(roles for roles in shapes if role in roles):
                contents = [
                    texts[(shape + i) % len(texts)] if other == role else f"text {i}" for i, other in enumerate(roles)
                ]
                yield _case(roles, contents, where(name, role), (name, role) if name in _SELDOM else None)


def where(kind: str, *roles: str) -> str:
    """The kind of content and the messages it stands in, in words."""
    articles = [f"{'an' if role == 'assistant' else 'a'} {role}" for role in roles]
    return kind if kind == _TOGETHER else f"{kind} in {' or '.join(articles)} message"


def system_alone_cases(own_texts: Sequence[str], without: Collection[Kind]) -> Iterator[ConversationCase]:
    """Yield conversations of nothing but a system message, with every kind of content but those of `without`."""
    for name, texts in _kinds(own_texts).items():
        if (name, "system") not in without:
            yield from (_case(["system"], [text], "a system message alone") for text in texts)


def later_system_cases() -> Iterator[ConversationCase]:
    """Yield conversations with system messages after the first message."""
    for roles in later_system(7):
        for opening in ([], ["system"]):
            shape = [*opening, *roles]
            yield _case(shape, [f"{role} {i}" for i, role in enumerate(shape)], "a later system message")
            yield _case(shape, ["" if role == "system" else role for role in shape], "an empty later system message")


def answer_first_cases(*, system: bool) -> Iterator[ConversationCase]:
    """Yield conversations that begin with an answer, or with one after the opening system message."""
    for roles in alternating("assistant", 8)[1:]:
        for opening in ([], ["system"]) if system else ([],):
            shape = [*opening, *roles]
            yield _case(shape, [f"{role} {i}" for i, role in enumerate(shape)], "an answer as the first message")


def random_cases(
    count: int, own_texts: Sequence[str], *, system: bool, without: Collection[Kind]
) -> Iterator[ConversationCase]:
    """Yield conversations of random length whose contents join at random all kinds of text but those of `without`.

    Every other one holds only what plain chat holds.
    """
    random = Random(_SEED)
    kinds = _kinds(own_texts)
    for i in range(count):
        left_out = {*without, *((kind, role) for kind in _SELDOM for role in _ROLES if i % 2)}
        roles = alternating("user", _LONGEST)[random.randrange(_LONGEST)]
        roles = ["system", *roles] if system and random.random() < 0.5 else roles
        contents = [_joined(random, role, kinds, left_out) for role in roles]
        yield _case(roles, contents, "a mixture of all kinds of text", None if i % 2 else (_TOGETHER, "any"))


def _joined(random: Random, role: str, kinds: Mapping[str, Sequence[str]], without: Collection[Kind]) -> str:
    texts = [text for kind, texts in kinds.items() if (kind, role) not in without for text in texts]
    text = "".join(random.choices(texts, k=random.randint(0, 4)))
    text = text.strip() if {(SPACED, role), (WIDE, role)} & {*without} else text
    return "a" if (EMPTY, role) in without and not text.strip() else text


def _kinds(own_texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {**_KINDS, OWN: tuple(own_texts) or ("x",), SPACED: _SPACED, WIDE: _WIDE}


def _case(roles: Sequence[str], contents: Sequence[str], name: str, seldom: Kind | None = None) -> ConversationCase:
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
    return ConversationCase(messages, name, seldom)
