"""Encode texts with a model's tokenizer, place the tokens in the text, and decode them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from macft.errors import MissingPackageError, ModelError
from macft.files import write_bytes

logger = logging.getLogger("macft")

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# the split of Qwen2's published tokenizer.json
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids; `ends[i]` is the index after the last character of token i in the encoded text.

    Tokens that share one character (bytes of it) all end after that character.
    """

    ids: list[int]
    ends: list[int]

    def token_after(self, border: int) -> tuple[int, bool]:
        """(index of the first token that ends after the character `border`, whether it begins before it)."""
        at = bisect_right(self.ends, border)
        begin = self.ends[at - 1] if at > 0 else 0
        return at, at < len(self.ends) and begin < border


@dataclass(frozen=True)
class Placed:
    """Token ids, and for each border (first token that ends after it, whether that token begins before it)."""

    ids: list[int]
    borders: list[tuple[int, bool]]


class Tokenizer:
    """Encodes without adding special tokens; those typed in the text stay special.

    `opening_ids` and `closing_ids` are what the post-processor puts around a text that is the whole input, such as BOS
    and EOS; `opening` is the text of the former.
    """

    def __init__(
        self,
        core: Any,
        *,
        special_map: dict[str, str],
        eos_ids: frozenset[int],
        files: dict[str, bytes],
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self.opening_ids, self.closing_ids = _around(core)
        self.opening = "".join(core.id_to_token(id_) for id_ in self.opening_ids)
        # a byte-level post-processor trims blanks off the offsets, which would move the loss mask
        core.post_processor = None
        self._core = core
        self._files = files
        self.special_map = special_map
        self.eos_ids = eos_ids
        added: dict[int, Any] = core.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.special_strings = tuple(token.content for _, token in sorted(added.items()) if token.special)
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's text with its id."""
        return dict(self._core.get_vocab(with_added_tokens=True))

    @cached_property
    def last_id(self) -> int:
        """The largest id of any token."""
        return max(self.vocabulary.values(), default=-1)

    @property
    def added_tokens(self) -> list[AddedToken]:
        """The tokens that are cut out of a text before anything else, by id, with their flags."""
        return [token for _, token in sorted(self._core.get_added_tokens_decoder().items())]

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the tokens of a text and the special tokens of a template depend on."""
        parts = [self._core.to_str(), json.dumps(self.special_map, sort_keys=True), str(sorted(self.eos_ids))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def opened(self, text: str) -> str:
        """`text` as a whole input, which begins with the opening."""
        return text if text.startswith(self.opening) else self.opening + text

    def encode(self, text: str, *, is_input: bool = False) -> Encoded:
        """Token ids of `text`, and where each token ends in it (in characters).

        `is_input`: the text is a whole input. What follows its opening then gets the tokens that it has without it:
        SentencePiece's tokenizers put a space before the first word of a text, but not before one after a token.
        """
        start = self._start(text, is_input)
        return self._encoded(self._core.encode(text[start:], add_special_tokens=False), start)

    def encode_batch(self, texts: Sequence[str], *, is_input: bool = False) -> list[Encoded]:
        """`encode` for many texts, on all cores."""
        starts, encoded = self._encode_after_openings(texts, is_input)
        return [self._encoded(one, start) for one, start in zip(encoded, starts, strict=True)]

    def place_batch(
        self, texts: Sequence[str], borders: Sequence[Sequence[int]], *, is_input: bool = False
    ) -> list[Placed]:
        """`encode_batch` that locates only the tokens around the `borders` (characters) of each text."""
        starts, encoded = self._encode_after_openings(texts, is_input)
        placed = []
        for one, start, expected in zip(encoded, starts, borders, strict=True):
            before = self.opening_ids if start else ()
            found = [_token_after(one, border - start) if border >= start else (0, border > 0) for border in expected]
            places = zip(found, expected, strict=True)
            shifted = [(at + len(before) * (border >= start), inside) for (at, inside), border in places]
            placed.append(Placed([*before, *one.ids] if before else one.ids, shifted))
        return placed

    def _start(self, text: str, is_input: bool) -> int:
        """The characters of the opening that a whole input begins with."""
        return len(self.opening) if is_input and self.opening and text.startswith(self.opening) else 0

    def _encode_after_openings(self, texts: Sequence[str], is_input: bool) -> tuple[list[int], list[Any]]:
        starts = [self._start(text, is_input) for text in texts]
        rests = [text[start:] for text, start in zip(texts, starts, strict=True)]
        return starts, self._core.encode_batch(rests, add_special_tokens=False)

    def _encoded(self, encoding: Any, start: int) -> Encoded:
        encoded = _encoded(encoding)
        if not start:
            return encoded
        ends = [*[start] * len(self.opening_ids), *(start + end for end in encoded.ends)]
        return Encoded([*self.opening_ids, *encoded.ids], ends)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that do not form a character become U+FFFD."""
        text: str = self._core.decode([int(id_) for id_ in ids], skip_special_tokens=skip_special)
        return text

    def save(self, folder: Path) -> None:
        """Write the files this tokenizer was read from into `folder`, each whole or not at all."""
        for name, content in self._files.items():
            write_bytes(folder / name, content)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder in HF or MLX layout.

    Raises ModelError when its files are missing or damaged, MissingPackageError when only
    transformers can read them and it is not installed.
    """
    # set explicitly, so that a later fork does not warn; our forked children never tokenize
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    files = _read_files(folder)
    settings = read_json(folder / "tokenizer_config.json")
    special_map = special_texts(read_settings(folder))
    core = _load_core(folder, files, settings, special_map)
    return Tokenizer(core, special_map=special_map, eos_ids=_eos_ids(folder, core, special_map), files=files)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file; empty when there is no such file; ModelError when damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}, expected an object; fetch the model again")
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    return {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}


def special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token, eos_token and so on, as far as they are set."""
    texts = {name: _token_text(settings.get(name)) for name in _NAMED}
    return {name: text for name, text in texts.items() if text is not None}


def _around(core: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before a text, and those after it."""
    alone = core.encode("a", add_special_tokens=False).ids
    whole = core.encode("a").ids
    before = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
    return tuple(whole[:before]), tuple(whole[before + len(alone) :])


def _encoded(encoding: Any) -> Encoded:
    return Encoded(encoding.ids, [end for _, end in encoding.offsets])


def _token_after(encoding: Any, border: int) -> tuple[int, bool]:
    """`Encoded.token_after` without the offsets of all tokens, which cost more to read than the ids."""
    count = len(encoding)
    token = encoding.char_to_token(border)
    if token is None:
        # after the last token, or at a character that no token covers
        if count == 0 or encoding.token_to_chars(count - 1)[1] <= border:
            return count, False
        return _encoded(encoding).token_after(border)
    begin = encoding.token_to_chars(token - 1)[1] if token > 0 else 0
    return token, begin < border


def _read_files(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a tokenizer is read from a model's folder")
    return {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}


def _token_text(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _load_core(folder: Path, files: dict[str, bytes], settings: dict[str, Any], special_map: dict[str, str]) -> Any:
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if "tokenizer.json" in files:
        core = _parse_core(folder / "tokenizer.json", files["tokenizer.json"])
    elif {"vocab.json", "merges.txt"} <= files.keys() and kind in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        core = _byte_level_bpe(folder, kind, bool(settings.get("add_prefix_space")))
    elif files.keys() & {"vocab.json", "tokenizer.model"}:
        return _through_transformers(folder)
    else:
        raise ModelError(
            f"{folder}: no tokenizer; looked for tokenizer.json, vocab.json with merges.txt, "
            "tokenizer.model; copy the tokenizer files of the model into this folder"
        )
    _add_tokens(folder, core, _added_tokens(folder, settings))
    # a token with a special role is special, even if tokenizer.json has it as a plain word
    known = _added_texts(core)
    roles = [text for text in special_map.values() if text not in known and core.token_to_id(text) is not None]
    core.add_special_tokens(roles)
    if "tokenizer.json" not in files:
        _surround(core, settings, special_map)
    return core


def _surround(core: Any, settings: Mapping[str, Any], special_map: Mapping[str, str]) -> None:
    """Add what puts BOS and EOS around an input, where only the settings ask for it."""
    asked = [special_map.get(f"{role}_token") if settings.get(f"add_{role}_token") else None for role in ("bos", "eos")]
    bos, eos = ([text] if text is not None and core.token_to_id(text) is not None else [] for text in asked)
    if bos or eos:
        tokens = [(text, core.token_to_id(text)) for text in (*bos, *eos)]
        core.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=tokens)


def _parse_core(path: Path, content: bytes) -> Any:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(f"{path}: not a tokenizer ({error}); fetch the model again") from None


def _byte_level_bpe(folder: Path, kind: str, add_prefix_space: bool) -> Any:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(
            f"{folder}: vocab.json and merges.txt do not make a tokenizer ({error}); fetch them again"
        ) from None
    core = tokenizers.Tokenizer(model)
    core.decoder = decoders.ByteLevel()
    if kind == "GPT2Tokenizer":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        return core
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    return core


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[int, Any]]:
    """(id, token) by rising id, from tokenizer_config.json or the older added_tokens.json."""
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    found: dict[int, Any] = {}
    try:
        for text, id_ in read_json(folder / "added_tokens.json").items():
            found[int(id_)] = AddedToken(text, special=True, normalized=False)
        for key, token in (settings.get("added_tokens_decoder") or {}).items():
            given = {flag: bool(token[flag]) for flag in flags if flag in token}
            found[int(key)] = AddedToken(token["content"], **given)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{folder}: the added tokens in tokenizer_config.json or added_tokens.json are not of the form "
            'id -> {"content": ...}; fetch the model again'
        ) from None
    return sorted(found.items())


def _add_tokens(folder: Path, core: Any, added: list[tuple[int, Any]]) -> None:
    known = _added_texts(core)
    for id_, token in added:
        if token.content in known:
            continue
        core.add_tokens([token])
        if core.token_to_id(token.content) != id_:
            raise ModelError(
                f"{folder}: the added token {token.content!r} got id {core.token_to_id(token.content)}, "
                f"tokenizer_config.json says {id_}; the tokenizer files do not belong to one model"
            )


def _added_texts(core: Any) -> set[str]:
    return {token.content for token in core.get_added_tokens_decoder().values()}


def _through_transformers(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackageError(
            f"{folder}: has no tokenizer.json, so reading its tokenizer needs transformers: pip install transformers"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return loaded.backend_tokenizer
    except Exception as error:  # a foreign loader can raise anything
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{folder}: transformers cannot read this tokenizer ({reason}); add a tokenizer.json"
        ) from None


def _eos_ids(folder: Path, core: Any, special_map: dict[str, str]) -> frozenset[int]:
    """Every id that ends generation, according to the model's files."""
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    sources = [config, read_json(folder / "generation_config.json")]
    if isinstance(text_config, dict):
        sources.append(text_config)
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(id_ for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int))
    if "eos_token" in special_map:
        id_ = core.token_to_id(special_map["eos_token"])
        if id_ is None:
            logger.warning("%s: the eos_token %r is not in the vocabulary", folder, special_map["eos_token"])
        else:
            ids.add(id_)
    return frozenset(ids)
