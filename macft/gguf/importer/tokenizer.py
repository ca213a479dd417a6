"""Turn the tokenizer fields of a GGUF file into tokenizer.json and the small files beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from macft.errors import ModelError
from macft.files import write_json, write_text
from macft.gguf.format import GgufFile
from macft.gguf.vocabulary.sentencepiece import sentencepiece_tokenizer
from macft.gguf.vocabulary.split_patterns import PRE_TOKENIZERS, PreTokenizer
from macft.gguf.vocabulary.tokens import SPACE

log = logging.getLogger("macft")

_CUT_OUT = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)  # of a text, before anything else
_KINDS = ("gpt2", "llama", "gemma4")
# what llama.cpp takes for the end of a turn when the file does not name one
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>")
# llama.cpp goes by the name too: in Phi-3, all special tokens except these swallow the white space after them
_EATS_SPACE = ("phi-3", "phi3")
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")
# ids that llama.cpp assumes for a SentencePiece vocabulary whose file names none
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class GgufVocabulary:
    """The checked tokenizer fields; `ids` holds those of bos, eos, eot, unknown and padding that are known."""

    kind: str
    pre: PreTokenizer
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool


def read_gguf_vocabulary(source: GgufFile) -> GgufVocabulary:
    """Check the tokenizer fields; ModelError for a kind or pre-tokenizer that is not in the tables."""
    fields, path = source.fields, source.path
    kind = source.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ModelError(
            f"{path}: tokenizer.ggml.model is {kind!r}; {', '.join(map(repr, _KINDS))} can be imported: "
            "use the original model's folder instead of the .gguf file"
        )
    pre = kind if kind == "gemma4" else (source.text("tokenizer.ggml.pre") if kind == "gpt2" else None) or "default"
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: pre-tokenizer {pre!r} is none of the {len(PRE_TOKENIZERS)} that can be imported: "
            "use the original model's folder instead of the .gguf file"
        )
    tokens = _strings(source, "tokenizer.ggml.tokens")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{path}: {len(tokens) - len(set(tokens))} tokens of the vocabulary appear twice")
    types = fields.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.token_type does not hold one type for each of {len(tokens)} tokens")
    ids = dict(_SENTENCEPIECE_IDS) if kind == "llama" else {}
    for role in ("bos", "eos", "eot", "unknown", "padding"):
        token_id = source.number(f"tokenizer.ggml.{role}_token_id", ids.get(role))
        if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < len(tokens)):
            raise ModelError(f"{path}: the {role} token id {token_id} is outside the {len(tokens)} tokens")
        if token_id is not None:
            ids[role] = token_id
    ends = [index for index, token in enumerate(tokens) if token in _TURN_ENDS and types[index] in _CUT_OUT]
    if ends:
        ids.setdefault("eot", ends[0])
    adds_bos = kind == "llama" or PRE_TOKENIZERS[pre].add_bos
    return GgufVocabulary(
        kind=kind,
        pre=PRE_TOKENIZERS[pre],
        tokens=tokens,
        types=types,
        ids=ids,
        # as llama.cpp does for the first gemma4 files, which say false
        add_bos=kind == "gemma4" or bool(fields.get("tokenizer.ggml.add_bos_token", adds_bos)),
        add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    )


def write_tokenizer(source: GgufFile, vocabulary: GgufVocabulary, folder: Path) -> None:
    """Write the tokenizer files into `folder`; a chat template is kept unchanged."""
    try:
        tokenizer = _sentencepiece(source, vocabulary) if vocabulary.kind == "llama" else _bpe(source, vocabulary)
        _add_tokens(tokenizer, source, vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{source.path}: the tokenizer fields contradict each other: {error}") from None
    tokenizer.post_processor = _bos_and_eos(vocabulary)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_json(folder / "tokenizer_config.json", _tokenizer_config(source, vocabulary))
    template = source.text("tokenizer.chat_template")
    if template is not None:
        write_text(folder / "chat_template.jinja", template)


def _add_tokens(tokenizer: Tokenizer, source: GgufFile, vocabulary: GgufVocabulary) -> None:
    """Declare the control tokens and those a user defined, and check that each kept its id."""
    name = (source.text("general.name") or "").lower()
    eats_space = any(part in name for part in _EATS_SPACE)
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in _CUT_OUT:
            is_special = kind != TokenType.USER_DEFINED
            rstrip = eats_space and token not in _KEEPS_SPACE
            added = AddedToken(token, normalized=False, special=is_special, rstrip=rstrip)
            (special if is_special else plain).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    for index, token in enumerate(vocabulary.tokens):
        if tokenizer.token_to_id(token) != index:
            raise ModelError(f"{source.path}: token {token!r} is not {index} in the vocabulary")


def _bpe(source: GgufFile, vocabulary: GgufVocabulary) -> Tokenizer:
    merges = []
    for line in _strings(source, "tokenizer.ggml.merges"):
        left, space, right = line[1:].partition(" ")
        if not space:
            raise ModelError(f"{source.path}: merge {line!r} is not two tokens with a space between")
        merges.append((line[:1] + left, right))
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    pre = vocabulary.pre
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.is_raw:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(source: GgufFile, vocabulary: GgufVocabulary) -> Tokenizer:
    scores = source.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ModelError(f"{source.path}: tokenizer.ggml.scores does not hold one score for each token")
    indivisible = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
    is_mergeable = [kind not in indivisible for kind in vocabulary.types]
    if len({score for score, counts in zip(scores, is_mergeable, strict=True) if counts}) == 1:
        log.warning(
            "%s: all its tokens have one score, as when a converter found no tokenizer.model: text is cut as by the "
            "original tokenizer, and llama.cpp may cut it differently with this file",
            source.path,
        )
    return sentencepiece_tokenizer(
        vocabulary.tokens,
        scores,
        is_mergeable,
        unknown=vocabulary.tokens[vocabulary.ids["unknown"]],
        add_space_prefix=bool(source.fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _bos_and_eos(vocabulary: GgufVocabulary) -> processors.TemplateProcessing | None:
    bos = vocabulary.tokens[vocabulary.ids["bos"]] if vocabulary.add_bos and "bos" in vocabulary.ids else ""
    eos = vocabulary.tokens[vocabulary.ids["eos"]] if vocabulary.add_eos and "eos" in vocabulary.ids else ""
    if not (bos or eos):
        return None
    order = [bos] * bool(bos) + ["$A"] + [eos] * bool(eos)
    special = {token: vocabulary.tokens.index(token) for token in (bos, eos) if token}
    return processors.TemplateProcessing(single=order, special_tokens=list(special.items()))


def _tokenizer_config(source: GgufFile, vocabulary: GgufVocabulary) -> dict[str, Any]:
    names = {_ROLES[role]: vocabulary.tokens[index] for role, index in vocabulary.ids.items() if role in _ROLES}
    architecture = source.fields.get("general.architecture")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.fields.get(f"{architecture}.context_length"),
    }


def _strings(source: GgufFile, key: str) -> list[str]:
    value = source.fields.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelError(f"{source.path}: {key} is missing or not a list of strings, which was expected")
    return value
