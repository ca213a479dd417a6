"""Read SentencePiece model files (tokenizer.model), and build tokenizers that merge tokens by their scores."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from macft.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
_MODEL_TYPES = {1: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
# numbers of the fields in sentencepiece_model.proto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _IDS = 3, {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
_ADD_DUMMY_PREFIX = 3

Value = int | bytes


@dataclass(frozen=True)
class SentencePieces:
    """Texts, scores and types of the pieces by id; the types are numbered as in GGUF.

    `ids` holds the ids of unk, bos, eos and pad, as far as they exist.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    add_dummy_prefix: bool = True


def read_sentencepiece(path: Path) -> SentencePieces:
    """Read the protobuf without the sentencepiece library; ModelError if it is not one, or not of type BPE."""
    try:
        return _parse(path, path.read_bytes())
    except (struct.error, IndexError, ValueError) as error:
        raise ModelError(
            f"{path}: not a SentencePiece model ({error}); if it is a tiktoken file, put the tokenizer.json of the "
            "model beside it, otherwise download it again"
        ) from None


def sentencepiece_tokenizer(
    tokens: Sequence[str],
    scores: Sequence[float],
    is_mergeable: Sequence[bool],
    *,
    unknown: str,
    add_space_prefix: bool,
) -> Tokenizer:
    """The tokenizer without its special tokens; characters without a token become bytes "<0x..>"."""
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(tokens, scores, is_mergeable, vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Prepend, not Metaspace: llama.cpp puts the space after every special token, not only at the start
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _parse(path: Path, content: bytes) -> SentencePieces:
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    ids = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    model_type, add_dummy_prefix = 1, True
    for number, value in _fields(content):
        if number not in (_PIECES, _TRAINER, _NORMALIZER):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        if number == _PIECES:
            piece = dict(_fields(value))
            texts.append(_bytes(piece.get(_PIECE_TEXT, b"")).decode("utf-8"))
            scores.append(float(struct.unpack("<f", _bytes(piece.get(_PIECE_SCORE, bytes(4))))[0]))
            types.append(_int(piece.get(_PIECE_TYPE, 1)))
        elif number == _TRAINER:
            settings = dict(_fields(value))
            model_type = _int(settings.get(_MODEL_TYPE, model_type))
            ids |= {name: _int(settings[key]) for key, name in _IDS.items() if key in settings}
        else:
            add_dummy_prefix = bool(_int(dict(_fields(value)).get(_ADD_DUMMY_PREFIX, 1)))
    if not texts:
        raise ValueError("it holds no pieces")
    if model_type != _BPE:
        raise ModelError(
            f"{path}: a SentencePiece model of type {_MODEL_TYPES.get(model_type, model_type)}; llama.cpp can only "
            "read bpe: export a merged model instead (macft export merged)"
        )
    known = {name: id_ for name, id_ in ids.items() if 0 <= id_ < len(texts)}
    return SentencePieces(texts, scores, types, known, add_dummy_prefix)


def _fields(content: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of a protobuf message: varints as signed 64 bits, the rest as bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(content, place)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _BYTES:
            size, place = _varint(content, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {place}")
        if place + size > len(content):
            raise ValueError(f"it ends within a field at byte {place}")
        yield number, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {place} has no end")


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text was expected")
    return value


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number was expected")
    return value


def _merges(
    tokens: Sequence[str], scores: Sequence[float], is_mergeable: Sequence[bool], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first.

    SentencePiece joins the neighbors whose joint token scores best, so the score is the merge's rank. Where
    scores are equal the lower id goes first: files made without a SentencePiece model score all tokens alike.
    """
    merges = []
    for index in sorted(range(len(tokens)), key=lambda index: (-scores[index], index)):
        if is_mergeable[index]:
            token = tokens[index]
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocab and right in vocab:
                    merges.append((left, right))
    return merges
