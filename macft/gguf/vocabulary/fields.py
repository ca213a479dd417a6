"""Write the `tokenizer.*` and `general.sampling.*` fields of a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from macft.data.templates.chat_template import ChatTemplate, has_template, load_template
from macft.data.tokenization.tokenizer import read_json
from macft.errors import ModelError
from macft.gguf.format import Field
from macft.gguf.vocabulary.pieces import PADDING_SCORE
from macft.gguf.vocabulary.special_ids import embedded_template, special_fields
from macft.gguf.vocabulary.tokens import Vocabulary

# generation_config.json -> general.sampling.*, and the type that llama.cpp reads
_SAMPLING: dict[str, tuple[str, Callable[[Any], np.generic]]] = {
    "top_k": ("top_k", np.int32),
    "top_p": ("top_p", np.float32),
    "min_p": ("min_p", np.float32),
    "temperature": ("temp", np.float32),
    "repetition_penalty": ("penalty_repeat", np.float32),
}


def tokenizer_fields(
    vocabulary: Vocabulary, config: Mapping[str, Any], *, template: str | None, vocab_rows: int
) -> dict[str, Field]:
    """Every `tokenizer.ggml.*` field and `tokenizer.chat_template`, in the order in which llama.cpp's converter writes.

    `template` is the text of the chat template that the model was trained with; None takes the folder's own, if it has
    one. The vocabulary is padded to `vocab_rows`, the rows of the embedding, with unused tokens. What `special_fields`
    says of BOS and of the end of generation follows from the template. Raises ModelError when the vocabulary is larger
    than `vocab_rows`, and when nothing says what ends an answer.
    """
    chat = _chat_template(vocabulary, template)
    special = special_fields(vocabulary, config, chat)
    texts = _padded(vocabulary, vocab_rows)
    rest = vocab_rows - len(vocabulary.tokens.texts)
    types = [*vocabulary.tokens.types, *[TokenType.UNUSED] * rest]
    fields: dict[str, Field] = {
        "tokenizer.ggml.model": vocabulary.kind,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": texts,
    }
    if vocabulary.scores is not None:
        scores = [*vocabulary.scores, *[PADDING_SCORE] * rest]
        fields["tokenizer.ggml.scores"] = np.array(scores, dtype=np.float32)
    fields["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
    if vocabulary.merges is not None:
        fields["tokenizer.ggml.merges"] = vocabulary.merges
    fields |= special
    if chat is not None:
        fields["tokenizer.chat_template"] = embedded_template(vocabulary, special, chat)
    return fields


def required_name(vocabulary: Vocabulary) -> str | None:
    """What `general.name` must contain so that special tokens swallow the white space after them, or None.

    llama.cpp has no field for it: it does so only for Phi-3, which it knows by this part of the name.
    """
    added = (vocabulary.core or {}).get("added_tokens") or []
    swallows = any(token.get("rstrip") and token.get("special") for token in added if isinstance(token, dict))
    has_end = any(token.get("content") == "</s>" for token in added if isinstance(token, dict))
    return "phi3" if swallows and has_end else None


def sampling_fields(folder: Path) -> dict[str, Field]:
    """`general.sampling.*` from generation_config.json: llama.cpp's defaults where a request says nothing."""
    given = read_json(folder / "generation_config.json")
    fields: dict[str, Field] = {}
    for name, (key, kind) in _SAMPLING.items():
        value = given.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fields[f"general.sampling.{key}"] = kind(value)
    if "general.sampling.penalty_repeat" in fields:
        # transformers penalizes all tokens of the context, llama.cpp by default the last 64
        fields["general.sampling.penalty_last_n"] = np.int32(-1)
    return fields


def _chat_template(vocabulary: Vocabulary, given: str | None) -> ChatTemplate | None:
    special_map = vocabulary.tokenizer.special_map
    if given is not None:
        return ChatTemplate(given, name="the template", special_map=special_map)
    return load_template(vocabulary.folder, special_map) if has_template(vocabulary.folder) else None


def _padded(vocabulary: Vocabulary, rows: int) -> list[str]:
    """The texts, all different: gaps and rows beyond the vocabulary become [PAD...]."""
    texts = vocabulary.tokens.texts
    if len(texts) > rows:
        raise ModelError(
            f"{vocabulary.folder}: the tokenizer has {len(texts)} tokens, the embedding {rows} rows; take the "
            "tokenizer that the model was trained with, or resize the embedding"
        )
    taken = set(texts)
    padded = []
    for id_ in range(rows):
        text = texts[id_] if id_ < len(texts) else ""
        if not text:
            text = f"[PAD{id_}]"
            while text in taken:
                text = f"[{text}]"
        padded.append(text)
    twice = [text for text, count in Counter(padded).items() if count > 1]
    if twice:
        raise ModelError(f"{vocabulary.folder}: tokens appear twice in the vocabulary: {twice[:5]}")
    return padded
