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


def _cut_of(pre: split_patterns.PreTokenizer) -> _Cut:
    return pre.patterns, pre.whole_words


_NAMES: dict[_Cut, str] = {
    **{_cut_of(split_patterns.PRE_TOKENIZERS[name]): name for name in reversed(_PREFERRED)},
    ((split_patterns.tekken(*split_patterns.PUBLISHED_CASES),), True): "tekken",
    ((split_patterns.gpt4o(*split_patterns.PUBLISHED_CASES),), False): "gpt-4o",
    ((split_patterns.QWEN35,), False): "qwen35",
    (split_patterns.DEEPSEEK3, False): "deepseek-v3",
}
# Names that llama.cpp's source treats as it treats the first; `split_patterns` says it of those that are imported.
_ALIKE = {
    "gpt-2": ("a.x-4.0", "gigachat", "granite-docling", "jina-v2-de", "jina-v2-es", "mellum", "modern-bert"),
    "llama-bpe": ("falcon-h1", "jina-v5-nano", "midm-2.0"),
    "qwen2": ("f2llmv2", "grok-2", "kormo", "solar-open"),
    "gpt-4o": ("kanana2", "llama4", "minimax-m2", "talkie"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "smollm": ("mellum2",),
}
# name -> the name of `_NAMES` that cuts alike
_CUTS_AS: dict[str, str] = {
    **{name: known for name, pre in split_patterns.PRE_TOKENIZERS.items() if (known := _NAMES.get(_cut_of(pre)))},
    **{name: name for name in _NAMES.values()},
    **{name: known for known, names in _ALIKE.items() for name in names},
}
# Normalizers that llama.cpp leaves out: NFC does not change text that is composed already, as typed text is.
_HARMLESS = ("NFC",)


def name_of_pre_tokenizer(path: Path, core: Mapping[str, Any], ids: Sequence[int], bos: int | None) -> str:
    """The `tokenizer.ggml.pre` of a tokenizer.json with the content `core`, read from `path`.

    Known rules decide. Where they have several names, and where llama.cpp's source has others than tokenizer.json, the
    name is that of the published tokenizer, found by the hash of `ids`: those of `pre_tokenizer_hashes.TEXT` without
    special tokens. Raises ModelError, with the regexes, when neither is known: under another name llama.cpp would
    silently cut text differently.
    """
    cuts = tuple(_cuts(core.get("pre_tokenizer")))
    is_whole = bool(core["model"].get("ignore_merges"))
    normalizers = [step for step in steps(core.get("normalizer"), "normalizers") if step.get("type") not in _HARMLESS]
    known = _NAMES.get((cuts, is_whole))
    published = _published(ids, bos)
    if known is None and published is not None:
        return published
    if known is not None and not normalizers:
        return published if published is not None and _CUTS_AS.get(published) == known else known
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


def _published(ids: Sequence[int], bos: int | None) -> str | None:
    """The name by which llama.cpp's converter knows the tokenizer with these ids of its text."""
    hashes = (hashlib.sha256(str(sequence).encode()).hexdigest() for sequence in (list(ids), [bos, *ids]))
    return next((HASHES[found] for found in hashes if found in HASHES), None)


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
