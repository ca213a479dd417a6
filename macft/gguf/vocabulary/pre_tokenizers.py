"""A byte-level tokenizer in; the name by which llama.cpp knows how it cuts text before merging out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from macft.errors import ModelError, join_problems
from macft.gguf.importer.tokenizer import PRE_TOKENIZERS
from macft.gguf.vocabulary.pre_tokenizer_hashes import HASHES

# One name for each way to cut; of those that llama.cpp treats alike, the one that leaves spaces before punctuation.
_PREFERRED = ("llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o", "seed-coder", "smollm", "gpt-2")
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
_GPT4O = rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTION}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# (what cuts the text, step by step; whether a piece that is a token is taken without merging) -> name
_Cut = tuple[tuple[str, ...], bool]
_NAMES: dict[_Cut, str] = {
    **{(PRE_TOKENIZERS[name].patterns, PRE_TOKENIZERS[name].whole_words): name for name in reversed(_PREFERRED)},
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((_QWEN35,), False): "qwen35",
    (_DEEPSEEK3, False): "deepseek-v3",
}
# Normalizers that llama.cpp leaves out: NFC alone changes no text that is composed already, as typed text is.
_HARMLESS = ("NFC",)


def name_of_pre_tokenizer(path: Path, core: Mapping[str, Any], ids: Sequence[int], bos: int | None) -> str:
    """The `tokenizer.ggml.pre` of a tokenizer.json with the content `core`, read from `path`.

    `ids` are those of `pre_tokenizer_hashes.TEXT` without special tokens. Published tokenizers are found by the hash
    of these ids, as llama.cpp's converter does it; one with a vocabulary of its own by how it cuts text. ModelError,
    with the regexes, when neither is known: under another name llama.cpp would cut text otherwise, and say nothing.
    """
    for sequence in (list(ids), [bos, *ids]):
        name = HASHES.get(hashlib.sha256(str(sequence).encode()).hexdigest())
        if name is not None:
            return name
    cuts = tuple(_cuts(core.get("pre_tokenizer")))
    is_whole = bool(core["model"].get("ignore_merges"))
    normalizers = [name for name in _normalizers(core.get("normalizer")) if name not in _HARMLESS]
    known = _NAMES.get((cuts, is_whole))
    if known is not None and not normalizers:
        return known
    shown = [f"cuts text by {cut}" for cut in cuts] or ["cuts text by nothing"]
    shown += [f"changes text before by {name}" for name in normalizers]
    if is_whole:
        shown.append("takes pieces that are tokens without merging (ignore_merges)")
    raise ModelError(
        join_problems(
            f"{path}: llama.cpp knows no pre-tokenizer like this one, by hash or by its regular expressions; export "
            "the merged model instead (macft export merged) and run it where its own tokenizer is used",
            shown,
        )
    )


def _cuts(step: Any) -> Iterable[str]:
    """The regular expressions that cut text one after the other; what is none by its name and settings."""
    if step is None:
        return
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step.get("pretokenizers", []):
            yield from _cuts(inner)
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        if step.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits":
        yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
        yield r"[\p{P}\$\+<=>\^~\|`]+"
    elif kind == "Split" and _is_isolating(step):
        yield _canonical(step["pattern"]["Regex"])
    else:
        yield json.dumps(step, ensure_ascii=False)


def _is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether a Split keeps what it matches as pieces; inverted and removing is the same where all text matches."""
    behavior, is_inverted = step.get("behavior"), bool(step.get("invert"))
    is_regex = isinstance(step.get("pattern"), dict) and isinstance(step["pattern"].get("Regex"), str)
    return is_regex and (behavior, is_inverted) in (("Isolated", False), ("Removed", True))


def _canonical(regex: str) -> str:
    """One spelling of the same expression: contractions in any case, line ends escaped."""
    return (
        regex.replace(_ANY_CASE, _CONTRACTION)
        .replace("\r", r"\r")
        .replace("\n", r"\n")
        .replace(r"\p{N}{1}|", r"\p{N}|")
    )


def _normalizers(step: Any) -> Iterable[str]:
    if step is None:
        return
    if step.get("type") == "Sequence":
        for inner in step.get("normalizers", []):
            yield from _normalizers(inner)
    elif step.get("type") in _HARMLESS:
        yield step["type"]
    else:
        yield json.dumps(step, ensure_ascii=False)
