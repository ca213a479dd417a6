"""Find the name by which llama.cpp knows how a byte-level tokenizer cuts text before merging."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from macft.errors import ModelError, join_problems
from macft.gguf.vocabulary import split_patterns
from macft.gguf.vocabulary.pre_tokenizer_hashes import HASHES
from macft.gguf.vocabulary.tokens import steps

# One name for each way to cut; of those that llama.cpp treats alike, the one that leaves spaces before punctuation.
_PREFERRED = ("llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o", "seed-coder", "smollm", "gpt-2")
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

# (what cuts the text, step by step; whether a piece that is a token is taken without merging) -> name
_Cut = tuple[tuple[str, ...], bool]
_NAMES: dict[_Cut, str] = {
    **{
        (split_patterns.PRE_TOKENIZERS[name].patterns, split_patterns.PRE_TOKENIZERS[name].whole_words): name
        for name in reversed(_PREFERRED)
    },
    ((split_patterns.tekken(*split_patterns.PUBLISHED_CASES),), True): "tekken",
    ((split_patterns.gpt4o(*split_patterns.PUBLISHED_CASES),), False): "gpt-4o",
    ((split_patterns.QWEN35,), False): "qwen35",
    (split_patterns.DEEPSEEK3, False): "deepseek-v3",
}
# Normalizers that llama.cpp leaves out: NFC does not change text that is composed already, as typed text is.
_HARMLESS = ("NFC",)


def name_of_pre_tokenizer(path: Path, core: Mapping[str, Any], ids: Sequence[int], bos: int | None) -> str:
    """The `tokenizer.ggml.pre` of a tokenizer.json with the content `core`, read from `path`.

    `ids` are those of `pre_tokenizer_hashes.TEXT` without special tokens. Published tokenizers are found by the hash
    of these ids, as llama.cpp's converter does; one with its own vocabulary by how it cuts text. Raises ModelError,
    with the regexes, when neither is known: under another name llama.cpp would silently cut text differently.
    """
    for sequence in (list(ids), [bos, *ids]):
        name = HASHES.get(hashlib.sha256(str(sequence).encode()).hexdigest())
        if name is not None:
            return name
    cuts = tuple(_cuts(core.get("pre_tokenizer")))
    is_whole = bool(core["model"].get("ignore_merges"))
    normalizers = [step for step in steps(core.get("normalizer"), "normalizers") if step.get("type") not in _HARMLESS]
    known = _NAMES.get((cuts, is_whole))
    if known is not None and not normalizers:
        return known
    shown = [f"cuts text by {cut}" for cut in cuts] or ["cuts text by nothing"]
    shown += [f"changes text before by {json.dumps(step, ensure_ascii=False)}" for step in normalizers]
    if is_whole:
        shown.append("takes pieces that are tokens without merging (ignore_merges)")
    raise ModelError(
        join_problems(
            f"{path}: llama.cpp knows no pre-tokenizer like this one, by hash or by its regular expressions; export "
            "the merged model instead (macft export merged) and run it where its own tokenizer is used",
            shown,
        )
    )


def _cuts(pre_tokenizer: Any) -> Iterable[str]:
    """The regular expressions that cut text one after the other; any other step as JSON."""
    for step in steps(pre_tokenizer, "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                yield split_patterns.GPT2
        elif kind == "Digits":
            yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
            yield split_patterns.FALCON_PUNCTUATION
        elif kind == "Split" and _is_isolating(step):
            yield _canonical(step["pattern"]["Regex"])
        else:
            yield json.dumps(step, ensure_ascii=False)


def _is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether a Split keeps its matches as pieces; inverted and removing is the same where all text matches."""
    behavior, is_inverted = step.get("behavior"), bool(step.get("invert"))
    is_regex = isinstance(step.get("pattern"), dict) and isinstance(step["pattern"].get("Regex"), str)
    return is_regex and (behavior, is_inverted) in (("Isolated", False), ("Removed", True))


def _canonical(regex: str) -> str:
    """One spelling of the same expression: contractions in any case, line ends escaped."""
    return (
        regex.replace(_ANY_CASE, split_patterns.CONTRACTION)
        .replace("\r", r"\r")
        .replace("\n", r"\n")
        .replace(r"\p{N}{1}|", r"\p{N}|")
    )
