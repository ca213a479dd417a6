"""Hold the tokens of a vocabulary with their types, and mark those that were added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import TokenType

from macft.data.tokenization.tokenizer import Tokenizer, read_json, special_texts
from macft.errors import ModelError, join_problems

SPACE = "▁"
# tokens that must not show in an answer, though some models do not call them special
_CONTROL_LIKE = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_FORMS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))

Prefix = Literal["always", "first", "never"]


@dataclass(frozen=True)
class Added:
    """A token that is cut out of the text before anything else."""

    text: str
    is_special: bool


@dataclass
class Tokens:
    """Texts and types by id; a gap in the vocabulary is an empty text."""

    texts: list[str]
    types: list[TokenType]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens by id, and what the files beside them say; `kind` is llama.cpp's name: gpt2, or llama (SentencePiece).

    `merges` belong to gpt2, `scores` and `prefix` to llama: `prefix` tells whether a space goes before the text,
    and whether after every special token too. `ids` are the tokenizer's by text, `core` is the content of
    tokenizer.json, if there is one, and `piece_ids` are the ids of unk, bos, eos and pad in tokenizer.model.
    """

    folder: Path
    kind: Literal["gpt2", "llama"]
    tokens: Tokens
    pre: str
    tokenizer: Tokenizer
    ids: Mapping[str, int]
    settings: Mapping[str, Any]
    core: Mapping[str, Any] | None
    merges: list[str] | None = None
    scores: list[float] | None = None
    prefix: Prefix = "never"
    piece_ids: Mapping[str, int] | None = None


def tokens_of(vocabulary: Mapping[str, int]) -> Tokens:
    """The tokens of a vocabulary by id, all of type NORMAL."""
    size = 1 + max(vocabulary.values(), default=-1)
    tokens = Tokens([""] * size, [TokenType.UNUSED] * size)
    for text, id_ in vocabulary.items():
        tokens.texts[id_] = text
        tokens.types[id_] = TokenType.NORMAL
    return tokens


def added_tokens(
    folder: Path, core: Mapping[str, Any] | None, settings: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> dict[int, Added]:
    """The added tokens by id: those of tokenizer.json, then of the two older places, then those that have a role.

    transformers 5 saves them only in tokenizer.json. ModelError when two files name one id differently.
    """
    older = {id_: Added(text, True) for text, id_ in read_json(folder / "added_tokens.json").items()}
    try:
        decoder = settings.get("added_tokens_decoder") or {}
        older |= {int(id_): Added(token["content"], bool(token.get("special"))) for id_, token in decoder.items()}
        entries = (core or {}).get("added_tokens") or []
        newer = {int(token["id"]): Added(token["content"], bool(token.get("special"))) for token in entries}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{folder}: the added tokens are not of the form that transformers writes") from None
    problems = [
        f"{id_} is {token.text!r} in tokenizer.json, {older[id_].text!r} in another"
        for id_, token in newer.items()
        if id_ in older and older[id_].text != token.text
    ]
    problems += [
        f"{id_} is {token.text!r} in the added tokens, which is {vocabulary[token.text]} in the vocabulary"
        for id_, token in {**older, **newer}.items()
        if vocabulary.get(token.text, id_) != id_
    ]
    if problems:
        raise ModelError(join_problems(f"{folder}: the tokenizer files do not belong to one model", problems))
    roles = [vocabulary[text] for text in special_texts(settings).values() if text in vocabulary]
    texts = {id_: text for text, id_ in vocabulary.items() if id_ in roles}
    return {**older, **newer, **{id_: Added(text, True) for id_, text in texts.items()}}


def steps(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in tokenizer.json; `key` is where a sequence of them holds its own."""
    if not isinstance(step, dict):
        return []
    return (
        [inner for one in step.get(key, []) for inner in steps(one, key)] if step.get("type") == "Sequence" else [step]
    )


def mark_added(tokens: Tokens, added: Mapping[int, Added], *, space: str = SPACE) -> None:
    """Give the added tokens their texts and types; `space` is how user-defined ones write a space, as text does not."""
    for id_, token in added.items():
        if token.is_special or _looks_special(token.text):
            tokens.texts[id_], tokens.types[id_] = token.text, TokenType.CONTROL
        else:
            tokens.texts[id_], tokens.types[id_] = token.text.replace(space, " "), TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter makes it a control token, whatever its file says."""
    return text in _CONTROL_LIKE or any(
        text.startswith(start) and text.endswith(end) and len(text) >= len(start + end) for start, end in _CONTROL_FORMS
    )
