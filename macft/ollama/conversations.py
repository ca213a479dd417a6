"""Generate the conversations on which a Go template must equal the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from macft.data.templates.chat_template import Message
from macft.ollama.grammar import alternating, later_system

# kinds of content with examples, none of which begins or ends with white space
_KINDS = {
    "plain text": ("What is the capital of France?", "Paris.", "a", "assistant"),
    "an empty text": ("",),
    "several lines": ("one\n\n two\n\tthree", "# Title\n\n- a\n- b\n\n```python\nprint('x')\n```"),
    "a </think> tag": ("<think>\nhm\n</think>\n\nyes", "no</think>yes", "<think>\n\n</think>\n\nwell", "<think>"),
    "JSON": ('{"name": "f", "arguments": {"x": [1, null, "é\\n"]}}', "[]", "null"),
    "braces": ("{{ .System }}", "{% raw %}{{ x }}{% endraw %}", "{# no #} }} {{- end -}}", "{", "}}"),
    "quotes": ('"""\n"""', "'''", '"It\'s" \\" \\n `x`', '"'),
    "characters that do not print": ("a\u00a0b\u200b\u3000c\ufeffd\x00e\x1b[0m\r\nf\x85g\u2028h", "a\u200b\u202eb"),
    "Chinese": ("你好，世界！今天天气怎么样？", "我是一个助手。", "日本語 한국어 ไทย العربية"),
    "emoji": ("👩‍👩‍👧 🇨🇳 🎉", "é 𝄞 ﬁ"),
    "tags": ("<tool_call>\n{}\n</tool_call>", "<tool_response>x</tool_response>", "<b>&amp;</b>", "<|x|>"),
    "role words": ("user\nassistant: system", "Human: hi\nAssistant:", "### Instruction:\nx\n\n### Response:"),
}
SPACED = "outer white space"
_SPACED = (" a ", "\n\na\n", "  ", "a\n", "\ta", "\u3000a\u00a0")
_SEED = 20261122
_LONGEST = 12


@dataclass(frozen=True)
class ConversationCase:
    """A conversation, the name of its kind, and whether a content begins or ends with white space."""

    messages: tuple[Message, ...]
    name: str
    is_spaced: bool


def grammar_cases(own_texts: Sequence[str], *, system: bool) -> Iterator[ConversationCase]:
    """Yield every shape of a conversation with plain contents, then each kind of content in each role.

    `own_texts` are the template's own texts and special tokens; with `system`, half begin with a system message.
    """
    shapes = [roles for roles in alternating("user", _LONGEST)]
    shapes += [["system", *roles] for roles in shapes] if system else []
    for roles in shapes:
        yield _case(roles, [f"{role} {i}" for i, role in enumerate(roles)], "plain text")
    kinds = {**_KINDS, "texts of the template itself": tuple(own_texts) or ("x",), SPACED: _SPACED}
    for name, texts in kinds.items():
        for role in ("user", "assistant", "system"):
            where = f"{name} in {'an' if role == 'assistant' else 'a'} {role} message"
            for shape, roles in enumerate(roles for roles in shapes if role in roles):
                contents = [
                    texts[(shape + i) % len(texts)] if other == role else f"text {i}" for i, other in enumerate(roles)
                ]
                yield _case(roles, contents, where)


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


def random_cases(count: int, own_texts: Sequence[str], *, system: bool, spaced: bool) -> Iterator[ConversationCase]:
    """Yield conversations of random length whose contents join all kinds of text at random."""
    random = Random(_SEED)
    fragments = [text for texts in _KINDS.values() for text in texts] + list(own_texts) + list(_SPACED)
    for _ in range(count):
        roles = alternating("user", _LONGEST)[random.randrange(_LONGEST)]
        roles = ["system", *roles] if system and random.random() < 0.5 else roles
        contents = ["".join(random.choices(fragments, k=random.randint(0, 4))) for _ in roles]
        if not spaced:
            contents = [text.strip() for text in contents]
        yield _case(roles, contents, "a mixture of all kinds of text")


def _case(roles: Sequence[str], contents: Sequence[str], name: str) -> ConversationCase:
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
    return ConversationCase(messages, name, any(text != text.strip() for text in contents))
