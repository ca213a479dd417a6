"""Compare the token ids of llama.cpp with the tokenizer's: over scripts, white space, and around every added token."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from macft.data.tokenization.tokenizer import Tokenizer
from macft.verify.llama_cpp import LlamaCpp
from macft.verify.logits import TEXT, VerifyError

# Composed characters only, as typed text has them: llama.cpp leaves out the normalizer (NFC) that composes others.
TEXTS = (
    TEXT,
    "  two spaces, a tab\tand\n\n\n  lines\r\n1234567 3.14159 don't WE'LL I'm\n",
    "春眠不觉晓，处处闻啼鸟。ありがとう！ 👩‍👩‍👧 ½ © ‑ … “quoted” <html>&amp;</html> {{x}}\n",
    "Привет, как дела? Καλημέρα κόσμε! שלום עולם. مرحبا بالعالم، كيف الحال؟ გამარჯობა. Բարեւ։",
    "안녕하세요 세계! カタカナとひらがな。繁體中文字，「引號」；㐀𠀀 你好world你好",
    "Straße, naïve café, Zażółć gęślą jaźń, İstanbul, Tiếng Việt, smørrebrød, ẞ",
    "0 7 12 345 6789 12345 678901 1,000,000.50 2026-11-27 0x1F x1y22z333 ٠١٢ ४५६ １２３ Ⅷ ½²³",
    " ",
    "a b  c   d    e     f \t \t\tg\u00a0h\u3000i\u2003j\u200bk\ufeffl   ",
    "a\nb\n\nc\n\n\nd \n e  \n  f\n\n",
    "a\r\nb\r\n\r\nc \r\n d\r\ne\rf\n\r\ng\r\n",
    "😀 🎉🎉 👍🏽 🇨🇳🇩🇪 ❤️ 1️⃣ 👨‍👩‍👧‍👦 ✓ → ∑ € ™ ▁ ▁▁a",
    "I'm you're HE'S we'LL 'tis ''quoted'' it’s don’t O'Neil 'S 'd",
    "def f(x: int) -> str:\r\n    return f'{x!r}' # ok\n<a href=\"https://x.org/?q=1&r=%20\">a_b-c</a> $x^2 ~`|`~ ==->",
    "HelloWorld helloWorld XMLHttpRequest iPhone15 snake_case a.b.c/d\\e @user #tag 50% c++ ...!!!???",
)  # fmt: skip
# Its letters are followed by marks, which llama.cpp's source does not count as letters for these pre-tokenizers.
MARKED_TEXT = "नमस्ते दुनिया। สวัสดีชาวโลก বাংলা ভাষা தமிழ் மொழி"
WITHOUT_MARKS = ("tekken", "gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie")

_AROUND = ("x{}x", "。{}。", "x{0}{0}x")
_SPACED = ("x {} x", "x\n{}\nx", "x  {}\t\tx", "x\r\n{}\r\nx")
_FORMS = (*_AROUND, *_SPACED)
_BATCH = 32
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenCheck:
    """How many texts had equal ids; `added` counts tokens that had them in each of theirs, `warnings` names others.

    `keeping` are the tokens beside which llama.cpp keeps white space that the tokenizer drops.
    """

    texts: int
    added: int
    keeping: tuple[str, ...]
    warnings: tuple[str, ...]


def check_token_ids(
    server: LlamaCpp, tokenizer: Tokenizer, fields: Mapping[str, Any], *, name: Path, opening: str = ""
) -> TokenCheck:
    """Compare the ids of all texts; VerifyError with the text and its first token that differs.

    `fields` are the file's, and `opening` goes before every text: the special token that a chat begins with. White
    space beside a special token that drops it is no error, and marks are a warning where llama.cpp's source knows none.
    """
    added = _Added(server, tokenizer, name, opening, "▁" if fields.get("tokenizer.ggml.model") == "llama" else " ")
    tokens = [token for token in tokenizer.added_tokens if token.content]
    keeping = added.keeping_space(tokens)
    equal, warnings = 0, []
    for text in (*TEXTS, MARKED_TEXT):
        difference = ids_difference(tokenizer, server, opening + text)
        if difference is None:
            equal += 1
            continue
        pre = fields.get("tokenizer.ggml.pre")
        if text != MARKED_TEXT or pre not in WITHOUT_MARKS:
            raise VerifyError(_refusal(name, difference, opening + text))
        warnings.append(
            f"llama.cpp cuts words with marks (Hindi, Thai, Bengali, Tamil) differently from this tokenizer: its {pre} "
            "pre-tokenizer knows no marks; in these scripts answers may be worse than in training"
        )
    return TokenCheck(equal, len(tokens) - len(keeping), tuple(keeping), tuple(warnings))


def ids_difference(tokenizer: Tokenizer, server: LlamaCpp, text: str) -> str | None:
    """A sentence on the first token of `text` that differs, or None."""
    return first_difference(tokenizer, tokenizer.encode(text).ids, server.tokenize(text))


def first_difference(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str | None:
    """A sentence on the first different token, or None."""
    if ours == theirs:
        return None
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    named = [_named(tokenizer, ids, place) for ids in (ours, theirs)]
    before = tokenizer.decode(ours[max(0, place - 8) : place], skip_special=False)
    return f"token {place} after {before!r} is {named[1]} in llama.cpp, {named[0]} in the tokenizer"


@dataclass(frozen=True)
class _Added:
    """What the texts around an added token are compared with; `space` is how a SentencePiece token writes a space."""

    server: LlamaCpp
    tokenizer: Tokenizer
    name: Path
    opening: str
    space: str

    def keeping_space(self, tokens: Sequence[AddedToken]) -> list[str]:
        """The tokens beside which llama.cpp keeps white space that the tokenizer drops."""
        keeping = []
        for start in range(0, len(tokens), _BATCH):
            batch = tokens[start : start + _BATCH]
            together = self.opening + "".join(self.text(token, form) for token in batch for form in _FORMS)
            difference = ids_difference(self.tokenizer, self.server, together)
            if difference is None:
                continue
            kept = [token.content for token in batch if self.keeps_space(token)]
            if not kept:
                raise VerifyError(_refusal(self.name, difference, together))
            keeping += kept
        return keeping

    def keeps_space(self, token: AddedToken) -> bool:
        """Whether ids differ by white space that the token drops; VerifyError for any other difference."""
        for form in _FORMS:
            text = self.opening + self.text(token, form)
            difference = ids_difference(self.tokenizer, self.server, text)
            if difference and (token.lstrip or token.rstrip) and form in _SPACED:
                return True
            if difference:
                flags = ", ".join(flag for flag in _FLAGS if getattr(token, flag)) or "no flags"
                said = f"around the added token {token.content!r} ({flags}) {difference}"
                raise VerifyError(_refusal(self.name, said, text))
        return False

    def text(self, token: AddedToken, form: str) -> str:
        """The token in its surroundings, as it is typed."""
        return form.format(unicodedata.normalize("NFC", token.content.replace(self.space, " ")))


def _refusal(name: Path, difference: str, text: str) -> str:
    return f"{name}: llama.cpp reads text differently from the tokenizer: {difference}; the text is {text!r}"


def _named(tokenizer: Tokenizer, ids: list[int], place: int) -> str:
    return f"{ids[place]} {tokenizer.decode([ids[place]], skip_special=False)!r}" if place < len(ids) else "missing"
