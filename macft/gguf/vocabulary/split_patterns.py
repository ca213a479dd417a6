"""List the regular expressions by which llama.cpp's pre-tokenizers cut text before merging."""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_START = r"[^\r\n\p{L}\p{N}]?"
_WORDS = rf"{_START}\p{{L}}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_REST_WITH_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_QWEN2 = rf"{CONTRACTION}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_SEED = rf"{CONTRACTION}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_LINES = r"[^\n]+|\n+"
QWEN35 = rf"{CONTRACTION}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
# Latin, Greek, Cyrillic, Armenian and Georgian letters and a few more, as DeepSeek's tokenizer.json lists them
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# white space of other scripts is white space to llama.cpp, also where a published range holds it
_DEEPSEEK_CJK = "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?(?:(?!\\s)[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002])+",
    r"\s+$",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
# groups of three from the right; llama.cpp leaves the first one with the text before it
_DIGITS_FROM_RIGHT = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|(?:(?!\\s)[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f])+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
# each cut stands before a number of digits that three divides
_SUPERBPE_CUTS = r"(?=(?:[0-9]{3})+(?![0-9]))[0-9]{3}(?:(?!(?:[0-9]{3})+(?![0-9])).)*"
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_JAIS2 = rf"{CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|" + "|".join(
    [*(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")), r"\s"]
)
_EXAONE_MOE = (
    rf"{CONTRACTION}|{_START}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORDS}|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
)
# of the letters beyond ASCII llama.cpp does not tell upper case from lower
LLAMA_CPP_CASES = (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])")
_LLAMA_CPP_CASES_WITH_MARKS = (r"(?:(?=[\p{L}\p{M}])[^a-z])", r"(?:(?=[\p{L}\p{M}])[^A-Z])")
_NO_CASES = (r"[\p{L}\p{M}]", r"[\p{L}\p{M}]")
PUBLISHED_CASES = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")


def tekken(upper: str, lower: str) -> str:
    """Mistral's pattern, with these expressions for an upper and a lower case letter."""
    return rf"{_START}{upper}*{lower}+|{_START}{upper}+{lower}*|\p{{N}}|{_REST_WITH_SLASH}"


def gpt4o(upper: str, lower: str) -> str:
    """OpenAI's pattern, with these expressions for an upper and a lower case letter."""
    return rf"{_cased_words(upper, lower)}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"


def _cased_words(upper: str, lower: str) -> str:
    return rf"{_START}{upper}*{lower}+{CONTRACTION}?|{_START}{upper}+{lower}*{CONTRACTION}?"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: each pattern cuts the pieces of the one before it.

    `is_raw`: tokens hold characters, with "▁" for a space and "<0x..>" for bytes, not the alphabet of byte-level BPE.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is taken without merging
    add_bos: bool = False  # when the file does not say
    is_raw: bool = False


_GPT2_NAMES = (
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de",
    "gigachat", "a.x-4.0", "mellum", "modern-bert", "granite-docling",
)  # fmt: skip
_QWEN2_NAMES = (
    "qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "f2llmv2", "grok-2", "solar-open",
)  # fmt: skip
_LLAMA3_NAMES = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "falcon-h1", "midm-2.0", "jina-v5-nano",
)  # fmt: skip
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")

# By `tokenizer.ggml.pre`; gemma4 is the name of a kind of tokenizer, which has no other.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(_LLAMA3_NAMES, PreTokenizer((_LLAMA3,), True, True)),
    "tekken": PreTokenizer((tekken(*LLAMA_CPP_CASES),), True, True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), PreTokenizer((gpt4o(*LLAMA_CPP_CASES),))),
    "granite-embed-multi-97m": PreTokenizer((gpt4o(*_LLAMA_CPP_CASES_WITH_MARKS),), True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), PreTokenizer((_DIGITS_FROM_RIGHT, gpt4o(*_NO_CASES)))),
    "youtu": PreTokenizer((_YOUTU_ASIAN, rf"{_cased_words(*_NO_CASES)}|\p{{N}}|{_REST_WITH_SLASH}"), True),
    "seed-coder": PreTokenizer((_SEED,)),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    "glm4": PreTokenizer((_LLAMA3,), True),
    "jais-2": PreTokenizer((_JAIS2,)),
    **dict.fromkeys(_QWEN2_NAMES, PreTokenizer((_QWEN2,))),
    "qwen35": PreTokenizer((QWEN35,)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", rf"{CONTRACTION}|{_WORDS}|\p{{N}}+|{_REST}"), True),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), PreTokenizer((_BAILING,))),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    **dict.fromkeys(_GPT2_NAMES, PreTokenizer((GPT2,))),
    **dict.fromkeys(_DIGIT_NAMES, PreTokenizer((r"\p{N}", GPT2))),
    "falcon": PreTokenizer((FALCON_PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(_CHAMELEON, False, True),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), PreTokenizer((_BLOOM,))),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", _SUPERBPE_CUTS)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), PreTokenizer(DEEPSEEK3)),
    "afmoe": PreTokenizer((_DIGITS_FROM_RIGHT, _AFMOE_ASIAN, DEEPSEEK3[2])),
    "gemma4": PreTokenizer((_LINES,), add_bos=True, is_raw=True),
}
