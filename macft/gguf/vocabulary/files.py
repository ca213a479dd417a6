"""Read the vocabulary that llama.cpp needs from the tokenizer files of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer, read_json, read_settings
from macft.errors import ModelError
from macft.gguf.vocabulary.pieces import vocabulary_of_pieces, vocabulary_with_byte_fallback
from macft.gguf.vocabulary.pre_tokenizer_hashes import TEXT
from macft.gguf.vocabulary.pre_tokenizers import name_of_pre_tokenizer
from macft.gguf.vocabulary.tokens import Vocabulary, added_tokens, mark_added, tokens_of

# the classes whose code says how text is cut, which vocab.json and merges.txt do not
_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
_READABLE = "tokenizer.json, tokenizer.model, vocab.json with merges.txt"


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read the tokenizer files of a folder; ModelError that names what is missing, unknown or contradictory."""
    if (folder / "tokenizer.json").is_file():
        return _of_tokenizer_json(folder)
    if (folder / "tokenizer.model").is_file():
        return vocabulary_of_pieces(folder, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _of_vocab_and_merges(folder)
    raise ModelError(
        f"{folder}: found no tokenizer to export; looked for {_READABLE}; copy the tokenizer files of the model "
        "into this folder"
    )


def _of_tokenizer_json(folder: Path) -> Vocabulary:
    path = folder / "tokenizer.json"
    core = read_json(path)
    model = core.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ModelError(
            f"{path}: its model is of type {kind}; llama.cpp needs a BPE that is byte-level or falls back to bytes"
        )
    tokenizer, merges = load_tokenizer(folder), _pairs(path, model["merges"])
    if model.get("byte_fallback"):
        return vocabulary_with_byte_fallback(folder, core, tokenizer, merges)
    if "'ByteLevel'" not in str(core.get("pre_tokenizer")):
        raise ModelError(f"{path}: its BPE is neither byte-level nor falls back to bytes, as llama.cpp needs it")
    bos = tokenizer.vocabulary.get(tokenizer.special_map.get("bos_token", ""))
    pre = name_of_pre_tokenizer(path, core, tokenizer.encode(TEXT).ids, bos)
    return _byte_level(folder, core, tokenizer, merges, pre)


def _of_vocab_and_merges(folder: Path) -> Vocabulary:
    name = str(read_settings(folder).get("tokenizer_class", "")).removesuffix("Fast")
    if name not in _CLASSES:
        raise ModelError(
            f"{folder}: vocab.json with merges.txt of tokenizer_class {name or 'unknown'} does not say how text is cut "
            f"(known: {', '.join(_CLASSES)}); add the tokenizer.json of the model"
        )
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = _pairs(folder / "merges.txt", [line for line in lines if line and not line.startswith("#version")])
    return _byte_level(folder, None, load_tokenizer(folder), merges, _CLASSES[name])


def _byte_level(
    folder: Path, core: Mapping[str, Any] | None, tokenizer: Tokenizer, merges: list[tuple[str, str]], pre: str
) -> Vocabulary:
    settings, ids = read_settings(folder), tokenizer.vocabulary
    tokens = tokens_of(ids)
    # U+2581 is a character like any other here: llama.cpp's converter makes a space of it, which matches other texts
    mark_added(tokens, added_tokens(folder, core, settings, ids), space=" ")
    # a space separates the two, so a space within one is written as in byte-level tokens
    lines = [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]
    return Vocabulary(folder, "gpt2", tokens, pre, tokenizer, ids, settings, core, merges=lines)


def _pairs(path: Path, merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; in tokenizer.json they are pairs or, before transformers 4.45, strings."""
    found: list[Any] = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    if not all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str) for pair in found):
        raise ModelError(f"{path}: a merge is not two tokens; download it again")
    return found
