"""Read the scored vocabulary of a SentencePiece tokenizer, whose scores rank the merges in llama.cpp."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken

from macft.data.tokenization.tokenizer import Tokenizer, read_settings, special_texts
from macft.errors import ModelError
from macft.gguf.vocabulary.sentencepiece import SentencePieces, read_sentencepiece, sentencepiece_tokenizer
from macft.gguf.vocabulary.tokens import Added, Prefix, Tokens, Vocabulary, added_tokens, mark_added, steps, tokens_of

logger = logging.getLogger("macft")

PADDING_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ROLES = {"unk_token": "unk", "bos_token": "bos", "eos_token": "eos", "pad_token": "pad"}
_WHOLE = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)


def vocabulary_with_byte_fallback(
    folder: Path, core: Mapping[str, Any], tokenizer: Tokenizer, merges: list[tuple[str, str]]
) -> Vocabulary:
    """The vocabulary of a tokenizer.json with the content `core`, which holds merges and no scores.

    The scores are those of tokenizer.model, if it is there and has the same vocabulary. Otherwise a token scores
    minus the rank of the first merge that makes it: such files were made from scores, best first.
    """
    path = folder / "tokenizer.json"
    settings, vocabulary = read_settings(folder), tokenizer.vocabulary
    tokens = tokens_of(vocabulary)
    added = added_tokens(folder, core, settings, vocabulary)
    pieces = _pieces_of_same(folder, tokens, added)
    if pieces is None:
        scores = _scores_of_merges(tokens.texts, merges)
        _warn_of_other_merges(path, tokens.texts, merges)
        for id_, text in enumerate(tokens.texts):
            if _BYTE.fullmatch(text):
                tokens.types[id_] = TokenType.BYTE
        unknown = vocabulary.get(str(core["model"].get("unk_token")))
    else:
        rest = len(tokens.texts) - len(pieces.texts)
        scores = [*pieces.scores, *[_ADDED_SCORE] * rest]
        tokens.types[: len(pieces.types)] = map(TokenType, pieces.types)
        unknown = pieces.ids.get("unk")
    mark_added(tokens, added)
    if unknown is not None:
        tokens.types[unknown] = TokenType.UNKNOWN
    _check_bytes(path, tokens)
    ids = pieces.ids if pieces else {}
    return Vocabulary(
        folder, "llama", tokens, "default", tokenizer, vocabulary, settings, core,
        scores=scores, prefix=_prefix(core), piece_ids=ids,
    )  # fmt: skip


def vocabulary_of_pieces(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of tokenizer.model, and of the tokens added in the JSON files beside it."""
    path = folder / "tokenizer.model"
    pieces = read_sentencepiece(path)
    settings = read_settings(folder)
    vocabulary = {text: id_ for id_, text in enumerate(pieces.texts)}
    added = added_tokens(folder, None, settings, vocabulary)
    rest = 1 + max([len(pieces.texts) - 1, *added]) - len(pieces.texts)
    tokens = Tokens([*pieces.texts, *[""] * rest], [*map(TokenType, pieces.types), *[TokenType.UNUSED] * rest])
    _check_bytes(path, tokens)
    space = settings.get("add_prefix_space")
    if str(config.get("model_type", "")).startswith("gemma"):
        space = False  # the code of gemma's tokenizer adds none, whatever the file says
    has_prefix = pieces.add_dummy_prefix if space is None else bool(space)
    special_map = {role: pieces.texts[pieces.ids[name]] for role, name in _ROLES.items() if name in pieces.ids}
    special_map |= special_texts(settings)
    tokenizer = _tokenizer(folder, pieces, added, special_map, has_prefix)
    mark_added(tokens, {id_: token for id_, token in added.items() if id_ != pieces.ids.get("unk")})
    for id_, text in enumerate(tokens.texts):
        if tokens.types[id_] == TokenType.USER_DEFINED:
            tokens.texts[id_] = text.replace("▁", " ")
    scores = [*pieces.scores, *(_ADDED_SCORE if text else PADDING_SCORE for text in tokens.texts[len(pieces.texts) :])]
    return Vocabulary(
        folder, "llama", tokens, "default", tokenizer, tokenizer.vocabulary, settings, None,
        scores=scores, prefix="always" if has_prefix else "never", piece_ids=pieces.ids,
    )  # fmt: skip


def _tokenizer(
    folder: Path, pieces: SentencePieces, added: Mapping[int, Added], special_map: dict[str, str], has_prefix: bool
) -> Tokenizer:
    core = sentencepiece_tokenizer(
        pieces.texts, pieces.scores, [kind not in _WHOLE for kind in pieces.types],
        unknown=pieces.texts[pieces.ids.get("unk", 0)], add_space_prefix=has_prefix,
    )  # fmt: skip
    controls = {id_: Added(text, True) for id_, text in enumerate(pieces.texts) if pieces.types[id_] in _WHOLE[:2]}
    for id_, token in sorted({**controls, **added}.items()):
        core.add_tokens([AddedToken(token.text, special=token.is_special, normalized=False)])
        if core.token_to_id(token.text) != id_:
            raise ModelError(f"{folder}: the added token {token.text!r} is {id_}, but ids before it are missing")
    return Tokenizer(core, special_map=special_map, eos_ids=frozenset(), files={})


def _pieces_of_same(folder: Path, tokens: Tokens, added: Mapping[int, Added]) -> SentencePieces | None:
    """tokenizer.model, unless it is missing or its pieces are not the tokens of tokenizer.json."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    pieces = read_sentencepiece(path)
    problems = [id_ for id_, text in enumerate(pieces.texts[: len(tokens.texts)]) if text != tokens.texts[id_]]
    problems = [id_ for id_ in problems if id_ not in added]
    if not problems and len(pieces.texts) <= len(tokens.texts):
        return pieces
    logger.warning(
        "%s: its %d pieces are not the %d tokens of tokenizer.json: the scores are taken from the merges there",
        path,
        len(pieces.texts),
        len(tokens.texts),
    )
    return None


def _scores_of_merges(texts: list[str], merges: list[tuple[str, str]]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, len(merges))) for text in texts]


def _warn_of_other_merges(path: Path, texts: list[str], merges: list[tuple[str, str]]) -> None:
    """llama.cpp joins any two tokens into a third; files that do not stem from SentencePiece may lack such merges."""
    known, joined = set(texts), {left + right for left, right in merges}
    count = sum(1 for text in joined for cut in range(1, len(text)) if text[:cut] in known and text[cut:] in known)
    if count > len(set(merges)):
        logger.warning(
            "%s: llama.cpp joins tokens in %d ways more than this tokenizer does, so it may cut some text differently; "
            "put the tokenizer.model of the model beside it, if there is one",
            path,
            count - len(set(merges)),
        )


def _check_bytes(path: Path, tokens: Tokens) -> None:
    count = len({f"<0x{byte:02X}>" for byte in range(256)}.difference(tokens.texts))
    if count:
        raise ModelError(f"{path}: {count} of the 256 byte tokens are missing (<0x00> to <0xFF>); llama.cpp needs them")


def _prefix(core: Mapping[str, Any]) -> Prefix:
    """Where this tokenizer.json puts a space that is not in the text."""
    for step in [*steps(core.get("normalizer"), "normalizers"), *steps(core.get("pre_tokenizer"), "pretokenizers")]:
        if step.get("type") == "Prepend":
            return "always"
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return "first" if scheme == "first" else "always" if scheme == "always" else "never"
    return "never"
