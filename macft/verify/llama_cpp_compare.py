"""Compare a GGUF file in llama.cpp with the model it was made from: token ids, prompts, next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macft.backends import is_installed
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.tokenization.tokenizer import Tokenizer
from macft.engines import BACKENDS
from macft.errors import DataError
from macft.verify.llama_cpp import LlamaCpp, llama_cpp
from macft.verify.logits import TEXT, Subject, VerifyError, logits_of

# quant -> the largest mean KL(source || file) in nats: twice or more of what SmolLM2-135M has, which is small and so
# easily hurt (bare or with the quickstart's adapter, whichever is worse): f32 3e-11, f16 7e-6, bf16 6e-4, q8_0 0.02,
# q6_k 0.04, q5_k_m 0.47, q5_k_s 0.44, q4_k_m 0.18, q4_k_s 0.25, q4_0 0.88, q3_k_m 0.48. Errors in its f16 file: a wrong
# norm epsilon 0.01, rope base 0.09, order of one q_proj 0.25, of one gate_proj 0.4, no adapter 1.5. So below 8 bits
# noise hides all but the grossest.
LIMITS = {
    "f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 0.05, "q6_k": 0.1, "q5_k_m": 1.0, "q5_k_s": 1.0,
    "q4_k_m": 0.5, "q4_k_s": 0.5, "q4_0": 2.0, "q3_k_m": 1.0,
}  # fmt: skip
HELLO: tuple[Message, ...] = ({"role": "user", "content": "Hello"},)

_TEXTS = (
    TEXT,
    "  two spaces, a tab\tand\n\n\n  lines\r\n1234567 3.14159 don't WE'LL I'm\n",
    "春眠不觉晓，处处闻啼鸟。ありがとう！ 👩‍👩‍👧 ½ © ‑ … “quoted” <html>&amp;</html> {{x}}\n",
)
_CONVERSATIONS = (
    "u:What is 2 + 2?",
    "s:Answer in one word.|u:What is 2 + 2?",
    "u:Hello|a:Hi!|u:你好，今天天气怎么样？",
    "s:You are a cat.|u:Hello|a:Meow.|u:def f(x):\n    return {'x': x}|a:Meow!\n\nMeow.|u:Why?",
)
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_POSITIONS = 24
_MAX_TOKENS = 160
_ANSWER_TOKENS = 64
_LEAST = -110.0  # below it a probability underflows float32, and the server writes the lowest number


@dataclass(frozen=True)
class GgufCheck:
    """How a file does in llama.cpp; `top1` (share) and `kl` (nats, mean) are None when no engine could compare.

    `texts` and `prompts` count those with equal token ids; `warnings` are lines on prompts with others.
    """

    texts: int
    prompts: int
    warnings: tuple[str, ...]
    positions: int
    engine: str | None
    top1: float | None
    kl: float | None
    answer: str
    note: str


def verify_gguf(
    path: Path,
    source: Subject | None,
    *,
    quant: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    loras: Sequence[Path] = (),
    conversation: Sequence[Message] = HELLO,
    threads: int = 0,
    name: Path | None = None,
) -> GgufCheck:
    """Load the file in llama.cpp; compare token ids and prompts with ours, next tokens with `source`'s; answer once.

    `source` None: next tokens are not compared. `name` is what errors call the file, by default its path. Raises
    ModelError when llama.cpp does not load it, VerifyError when token ids differ or the mean KL(source || file) is
    above `LIMITS[quant]`.
    """
    name = name or path
    with llama_cpp(path, loras=loras, threads=threads, name=name) as server:
        texts = _check_token_ids(name, server, tokenizer)
        prompts, warnings = (0, []) if template is None else _compare_prompts(server, tokenizer, template)
        tokens = (_added_in_front(server) + tokenizer.encode(TEXT).ids)[:_MAX_TOKENS]
        count = max(tokenizer.vocab_size, max(tokens) + 1)
        engines = [engine for engine in BACKENDS if is_installed(engine)]
        places = _places(len(tokens), count) if source is not None and engines else []
        found = [server.next_logps(tokens[:place], count) for place in places]
        if template is not None:
            answer = server.chat(conversation, max_new_tokens=_ANSWER_TOKENS)
        else:
            answer = server.complete(str(conversation[-1]["content"]), max_new_tokens=_ANSWER_TOKENS)
    compared = f"token ids of {texts} texts are the tokenizer's, prompts of {prompts} conversations the template's"
    if not places or source is None:
        why = "no training engine is installed" if source is not None else "no source was given"
        note = f"llama.cpp loads it; {compared}; {why}, so its numbers were not compared"
        return GgufCheck(texts, prompts, tuple(warnings), 0, None, None, None, answer, note)
    engine, logits = logits_of(source, tokens[: places[-1]])
    top1, kl = _divergence(logits, places, found)
    limit = LIMITS[quant]
    said = f"next tokens at {len(places)} positions: top-1 agrees with {engine} at {top1:.1%}, KL {kl:.2g}"
    if not kl <= limit:  # NaN fails too
        raise VerifyError(
            f"{name}: verification in llama.cpp failed: {said}, expected up to {limit:g} for {quant}; do not use it, "
            "and report this"
        )
    note = f"verified in llama.cpp: {compared}; {said} ({quant}: up to {limit:g})"
    return GgufCheck(texts, prompts, tuple(warnings), len(places), engine, top1, kl, answer, note)


def _check_token_ids(name: Path, server: LlamaCpp, tokenizer: Tokenizer) -> int:
    """How many texts were compared; VerifyError for the first token that differs."""
    specials = "word".join(["", *tokenizer.special_strings[:64], ""])
    texts = [*_TEXTS, specials] if tokenizer.special_strings else list(_TEXTS)
    for text in texts:
        difference = _difference(tokenizer, tokenizer.encode(text).ids, server.tokenize(text))
        if difference:
            raise VerifyError(
                f"{name}: llama.cpp reads text differently from the tokenizer: {difference}; do not use it, and "
                "report this"
            )
    return len(texts)


def _compare_prompts(server: LlamaCpp, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, list[str]]:
    """How many prompts have our token ids, and a line for each that has others."""
    equal, warnings = 0, []
    for written in _CONVERSATIONS:
        messages = [{"role": _ROLES[turn[0]], "content": turn[2:]} for turn in written.split("|")]
        try:
            ours = template.render(messages, add_generation_prompt=True)
        except DataError:
            continue  # a role that this template refuses
        ids = tokenizer.encode(ours).ids
        # the server removes a leading BOS from the text and puts its own in front of the ids
        difference = _difference(tokenizer, ids, server.tokenize(server.apply_template(messages), add_special=True))
        if difference:
            roles = ", ".join(str(message["role"]) for message in messages)
            warnings.append(f"llama.cpp renders this prompt differently from the template ({roles}): {difference}")
        else:
            equal += 1
    return equal, warnings


def _difference(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str | None:
    """A sentence on the first different token, or None."""
    if ours == theirs:
        return None
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    named = [_named(tokenizer, ids, place) for ids in (ours, theirs)]
    before = tokenizer.decode(ours[max(0, place - 8) : place], skip_special=False)
    return f"token {place} after {before!r} is {named[1]} in llama.cpp, {named[0]} in the tokenizer"


def _named(tokenizer: Tokenizer, ids: list[int], place: int) -> str:
    return f"{ids[place]} {tokenizer.decode([ids[place]], skip_special=False)!r}" if place < len(ids) else "missing"


def _added_in_front(server: LlamaCpp) -> list[int]:
    """The BOS token, if llama.cpp puts it in front of every text."""
    bare, whole = server.tokenize("a"), server.tokenize("a", add_special=True)
    return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(bare)] == bare), [])


def _places(length: int, vocabulary: int) -> list[int]:
    """Lengths of the prefixes compared: fewer for a large vocabulary, whose distributions take the server longest."""
    count = int(np.clip(_POSITIONS * 50_000 // vocabulary, 8, _POSITIONS))
    return sorted({int(place) for place in np.linspace(min(4, length), length, count)})


def _divergence(
    logits: np.ndarray, places: Sequence[int], found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    """(share of equal likeliest tokens, mean KL(source || file)); logits [T, V], both over the ids that both have."""
    equal, divergences = 0, []
    for place, (ids, logps) in zip(places, found, strict=True):
        row = logits[place - 1].astype(np.float64)
        shared = ids < len(row)
        first = _normalized(row[ids[shared]])
        second = _normalized(np.maximum(logps[shared], _LEAST))
        equal += int(first.argmax() == second.argmax())
        divergences.append(float((np.exp(first) * (first - second)).sum()))
    return equal / len(places), float(np.mean(divergences))


def _normalized(logps: np.ndarray) -> np.ndarray:
    shifted = logps - logps.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
