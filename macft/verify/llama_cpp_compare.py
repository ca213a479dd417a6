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
from macft.gguf.format import read_gguf
from macft.verify.llama_cpp import LlamaCpp, llama_cpp
from macft.verify.llama_cpp_tokens import check_token_ids, first_difference
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

    `texts`, `added` (tokens, each in texts of its own) and `prompts` count those with equal token ids; `warnings` are
    lines on those with others.
    """

    texts: int
    added: int
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
        fields, opening = read_gguf(path).fields, _opening(tokenizer, template)
        read = check_token_ids(server, tokenizer, fields, name=name, opening=opening)
        prompts, others = (0, []) if template is None else _compare_prompts(server, tokenizer, template)
        if read.keeping and not _drops_space(server, tokenizer, template, read.keeping):
            others.insert(0, _space_warning(read.keeping))
        tokens = (_added_in_front(server) + tokenizer.encode(TEXT).ids)[:_MAX_TOKENS]
        count = max(tokenizer.vocab_size, max(tokens) + 1)
        engines = [engine for engine in BACKENDS if is_installed(engine)]
        places = _places(len(tokens), count) if source is not None and engines else []
        found = [server.next_logps(tokens[:place], count) for place in places]
        if template is not None:
            answer = server.chat(conversation, max_new_tokens=_ANSWER_TOKENS)
        else:
            answer = server.complete(str(conversation[-1]["content"]), max_new_tokens=_ANSWER_TOKENS)
    warnings = (*others, *read.warnings)
    compared = (
        f"token ids of {read.texts} texts and around {read.added} added tokens are the tokenizer's, "
        f"prompts of {prompts} conversations the template's"
    )
    if not places or source is None:
        why = "no training engine is installed" if source is not None else "no source was given"
        note = f"llama.cpp loads it; {compared}; {why}, so its numbers were not compared"
        return GgufCheck(read.texts, read.added, prompts, warnings, 0, None, None, None, answer, note)
    engine, logits = logits_of(source, tokens[: places[-1]])
    top1, kl = _divergence(logits, places, found)
    limit = LIMITS[quant]
    said = f"next tokens at {len(places)} positions: top-1 agrees with {engine} at {top1:.1%}, KL {kl:.2g}"
    if not kl <= limit:  # NaN fails too
        raise VerifyError(
            f"{name}: verification in llama.cpp failed: {said}, expected up to {limit:g} for {quant}: please "
            "report this"
        )
    judged = "compared in llama.cpp, with differences (see the warnings)" if warnings else "verified in llama.cpp"
    note = f"{judged}: {compared}; {said} ({quant}: up to {limit:g})"
    return GgufCheck(read.texts, read.added, prompts, warnings, len(places), engine, top1, kl, answer, note)


def _compare_prompts(server: LlamaCpp, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, list[str]]:
    """How many prompts have our token ids, and a line for each that has others."""
    equal, warnings = 0, []
    for written in _CONVERSATIONS:
        messages = [{"role": _ROLES[turn[0]], "content": turn[2:]} for turn in written.split("|")]
        try:
            difference = _prompt_difference(server, tokenizer, template, messages)
        except DataError:
            continue  # a role that this template refuses
        if difference:
            roles = ", ".join(str(message["role"]) for message in messages)
            warnings.append(f"llama.cpp renders this prompt differently from the template ({roles}): {difference}")
        else:
            equal += 1
    return equal, warnings


def _prompt_difference(
    server: LlamaCpp, tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> str | None:
    """A sentence on the first token of a prompt that differs, or None; DataError where the template refuses it."""
    ids = tokenizer.encode(template.render(messages, add_generation_prompt=True)).ids
    # the server removes a leading BOS from the text and puts its own in front of the ids
    return first_difference(tokenizer, ids, server.tokenize(server.apply_template(messages), add_special=True))


def _drops_space(server: LlamaCpp, tokenizer: Tokenizer, template: ChatTemplate | None, tokens: Sequence[str]) -> bool:
    """Whether the template in the file writes no white space beside these tokens: prompts then have the right ids."""
    if template is None:
        return False
    content = "".join(f" \n x {token} \n y" for token in tokens) + " \n "
    try:
        return _prompt_difference(server, tokenizer, template, [{"role": "user", "content": content}]) is None
    except DataError:
        return False


def _space_warning(tokens: Sequence[str]) -> str:
    listed = ", ".join(tokens[:5]) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")
    return (
        f"llama.cpp keeps the white space beside {listed}, which the tokenizer drops: contents that begin or end with "
        "some there are read with tokens that training did not have"
    )


def _opening(tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    """The special token that a chat begins with; none if it would drop the white space that a text begins with."""
    if template is None:
        return ""
    try:
        ids = tokenizer.encode(template.render(HELLO, add_generation_prompt=True)).ids[:1]
    except DataError:
        return ""
    text = tokenizer.decode(ids, skip_special=False)
    return next((token.content for token in tokenizer.added_tokens if token.content == text and not token.rstrip), "")


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
