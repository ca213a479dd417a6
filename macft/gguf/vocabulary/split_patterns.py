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
QWEN35 = rf"{CONTRACTION}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
# of the letters beyond ASCII llama.cpp does not tell upper case from lower
LLAMA_CPP_CASES = (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])")
PUBLISHED_CASES = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")


def tekken(upper: str, lower: str) -> str:
    """Mistral's pattern, with these expressions for an upper and a lower case letter."""
    return rf"{_START}{upper}*{lower}+|{_START}{upper}+{lower}*|\p{{N}}|{_REST_WITH_SLASH}"


def gpt4o(upper: str, lower: str) -> str:
    """OpenAI's pattern, with these expressions for an upper and a lower case letter."""
    words = rf"{_START}{upper}*{lower}+{CONTRACTION}?|{_START}{upper}+{lower}*{CONTRACTION}?"
    return rf"{words}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: each pattern cuts the pieces of the one before it."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is taken without merging
    add_bos: bool = False  # when the file does not say


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), PreTokenizer((_LLAMA3,), True, True)
    ),
    "tekken": PreTokenizer((tekken(*LLAMA_CPP_CASES),), True, True),
    "gpt-4o": PreTokenizer((gpt4o(*LLAMA_CPP_CASES),)),
    "seed-coder": PreTokenizer((_SEED,)),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    "glm4": PreTokenizer((_LLAMA3,), True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), PreTokenizer((_QWEN2,))),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), PreTokenizer((GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((r"\p{N}", GPT2)),
    ),
    "falcon": PreTokenizer((FALCON_PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
}
