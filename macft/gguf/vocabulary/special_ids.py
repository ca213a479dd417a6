"""Choose the special token ids of a GGUF file: BOS, the ends of generation and the other roles."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from macft.data.templates.chat_template import ChatTemplate, template_end_ids
from macft.data.tokenization.tokenizer import read_json
from macft.errors import DataError, ModelError
from macft.gguf.format import Field
from macft.gguf.vocabulary.tokens import Vocabulary

logger = logging.getLogger("macft")

# role -> (its name in tokenizer.json's neighbors and config.json, its name in GGUF, misspelled there)
_ROLES = {"bos": "bos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
# texts that end generation in llama.cpp whatever the file says (llama-vocab.cpp)
ENDS_BY_TEXT = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
_SLOTS = ("eot", "eom")
_QUESTION = [{"role": "user", "content": "question"}]


def special_fields(
    vocabulary: Vocabulary, config: Mapping[str, Any], template: ChatTemplate | None
) -> dict[str, Field]:
    """`tokenizer.ggml.*_token_id`, `add_bos_token`, `add_eos_token` and `add_space_prefix`.

    The end of generation. Model, generation settings, tokenizer and template may each name other tokens: a base
    model says <|endoftext|>, the ChatML it was tuned with ends turns by <|im_end|>. All of them end generation
    here. eos_token_id is the one that ends a rendered assistant turn, since every program heeds it; without a
    template, or where that ends turns without a special token, it is the tokenizer's. The others, first those that
    llama.cpp does not know by their text, become eot_token_id and eom_token_id, the only further ones that it
    reads; eos_token_ids lists them all for the programs that read it.

    BOS. llama.cpp puts it before every prompt if add_bos_token says so, and removes it from what the template
    wrote. The model has been trained on what the template writes, so it is false when that begins without BOS.
    """
    ends = end_ids(vocabulary, config, template)
    ids = _role_ids(vocabulary, config)
    fields: dict[str, Field] = {}
    for role, name in _ROLES.items():
        if role in ids:
            fields[f"tokenizer.ggml.{name}_token_id"] = ids[role]
        if role == "bos":
            fields["tokenizer.ggml.eos_token_id"] = ends[0]
    for slot, id_ in zip(_SLOTS, ends[1:], strict=False):
        fields[f"tokenizer.ggml.{slot}_token_id"] = id_
    if len(ends) > 1:
        fields["tokenizer.ggml.eos_token_ids"] = np.array(ends, dtype=np.int32)
    opening = _opening(vocabulary, template)
    fields["tokenizer.ggml.add_bos_token"] = _adds_bos(vocabulary, opening)
    if template is not None or _adds(vocabulary, "eos") is not None:
        # after a rendered prompt it would end the answer before it begins
        fields["tokenizer.ggml.add_eos_token"] = template is None and bool(_adds(vocabulary, "eos"))
    if vocabulary.kind == "llama":
        fields["tokenizer.ggml.add_space_prefix"] = _adds_space(vocabulary, opening)
    return fields


def end_ids(vocabulary: Vocabulary, config: Mapping[str, Any], template: ChatTemplate | None) -> list[int]:
    """Every id that ends generation, the one for eos_token_id first; ModelError when nothing names one."""
    known = len(vocabulary.tokens.texts)
    named = vocabulary.tokenizer.special_map.get("eos_token")
    own = vocabulary.ids.get(named) if named is not None else None
    if own is None:
        own = (vocabulary.piece_ids or {}).get("eos")
    turn = template_end_ids(template, vocabulary.tokenizer) if template is not None else frozenset()
    given = [*_listed(config, "eos"), *_listed(read_json(vocabulary.folder / "generation_config.json"), "eos")]
    found = list(dict.fromkeys(id_ for id_ in [*turn, own, *given] if id_ is not None and 0 <= id_ < known))
    if not found:
        raise ModelError(
            f"{vocabulary.folder}: nothing says which token ends an answer (eos_token in tokenizer_config.json, "
            "eos_token_id in config.json or generation_config.json); without it llama.cpp takes token 11"
        )
    texts = vocabulary.tokens.texts
    first, others = found[0], sorted(found[1:], key=lambda id_: texts[id_] in ENDS_BY_TEXT)
    lost = [texts[id_] for id_ in others[len(_SLOTS) :] if texts[id_] not in ENDS_BY_TEXT]
    if lost:
        logger.warning(
            "a GGUF file has room for three ends of generation: llama.cpp will not stop at %s", ", ".join(lost)
        )
    return [first, *others]


def embedded_template(vocabulary: Vocabulary, fields: Mapping[str, Field], template: ChatTemplate) -> str:
    """The template's text for the file; where it reads bos_token or eos_token, with the texts it was trained with.

    llama.cpp gives it the texts of bos_token_id and eos_token_id, or of token 11 where there is no BOS.
    """
    lines = []
    for name in ("bos_token", "eos_token"):
        id_ = fields.get(f"tokenizer.ggml.{name}_id")
        given = vocabulary.tokens.texts[id_] if isinstance(id_, int) else None
        trained = vocabulary.tokenizer.special_map.get(name)
        if name in template.source and given != trained:
            lines.append(f"{{%- set {name} = {json.dumps(trained or '', ensure_ascii=False)} -%}}")
    return "".join(lines) + template.source


def _role_ids(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, int]:
    """The id of each role: the tokenizer's own, else the model's if that is one number within the vocabulary."""
    ids: dict[str, int] = {}
    known = vocabulary.ids
    for role in _ROLES:
        own = known.get(vocabulary.tokenizer.special_map.get(f"{role}_token", ""))
        listed = [] if own is not None else _listed(config, role)
        fallback = (vocabulary.piece_ids or {}).get(role)
        id_ = own if own is not None else fallback if fallback is not None else listed[0] if len(listed) == 1 else None
        if id_ is not None and 0 <= id_ < len(vocabulary.tokens.texts):
            ids[role] = id_
    return ids


def _listed(source: Mapping[str, Any], role: str) -> list[int]:
    """`{role}_token_id` of a configuration, one or several, at its top or under text_config."""
    value = source.get(f"{role}_token_id")
    if value is None and isinstance(source.get("text_config"), dict):
        value = source["text_config"].get(f"{role}_token_id")
    return [id_ for id_ in (value if isinstance(value, list) else [value]) if type(id_) is int]


def _opening(vocabulary: Vocabulary, template: ChatTemplate | None) -> int | None:
    """The special token that a rendered conversation begins with; -1 for any other, None without a template."""
    if template is None:
        return None
    try:
        text = template.render(_QUESTION, add_generation_prompt=True)
    except DataError:
        return None
    ids = vocabulary.tokenizer.encode(text).ids[:1]
    return ids[0] if ids and ids[0] in vocabulary.tokenizer.special_ids else -1


def _adds_bos(vocabulary: Vocabulary, opening: int | None) -> bool:
    bos = vocabulary.ids.get(vocabulary.tokenizer.special_map.get("bos_token", ""))
    if bos is None or (opening is not None and opening != bos):
        return False
    declared = _adds(vocabulary, "bos")
    # the code of SentencePiece's tokenizers adds it unless told otherwise
    return vocabulary.core is None and vocabulary.kind == "llama" if declared is None else declared


def _adds(vocabulary: Vocabulary, role: str) -> bool | None:
    """Whether encoding adds BOS or EOS: as the settings say, else the TemplateProcessing of tokenizer.json."""
    declared = vocabulary.settings.get(f"add_{role}_token")
    if isinstance(declared, bool):
        return declared
    processor = (vocabulary.core or {}).get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            edge = step["single"][0 if role == "bos" else -1]
            return bool(edge.get("SpecialToken", {}).get("id") == vocabulary.tokenizer.special_map.get(f"{role}_token"))
    return None


def _adds_space(vocabulary: Vocabulary, opening: int | None) -> bool:
    """llama.cpp puts a space at the start and after every special token, or nowhere; some models only at the start.

    Such a model puts none into a chat that begins with a special token, so nowhere is right.
    """
    if vocabulary.prefix == "first":
        return opening in (None, -1)
    return vocabulary.prefix == "always"
