"""Make a tokenizer that merges as SentencePiece does from its scored tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE


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
