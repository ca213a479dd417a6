"""A GGUF file in; what real llama.cpp says of it, and how far that is from the source model, out."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from macft.backends import BACKENDS
from macft.backends import is_installed as engine_is_installed
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, MissingPackageError, ModelError
from macft.verify.logits import TEXT, Subject, VerifyError, source_logits

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
_LEAST = -110.0  # below it a probability is no float32, and the server writes the lowest number there is


@dataclass(frozen=True)
class GgufCheck:
    """What llama.cpp made of a file. `top1` (share) and `kl` (nats, mean) are None when no engine could compare.

    `texts` and `prompts` have equal token ids; `warnings` are lines on prompts that have not.
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


class LlamaCpp:
    """llama.cpp's server with one model, in a process of its own."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], path: Path) -> None:
        self._place = address.removeprefix("http://")
        self._process = process
        self._path = path

    def post(self, route: str, content: dict[str, Any]) -> Any:
        """The JSON answer of a route; ModelError with llama.cpp's reason when there is none."""
        # http.client, as urllib would go through a proxy that the environment names
        connection = http.client.HTTPConnection(self._place, timeout=3600)
        try:
            connection.request("POST", route, json.dumps(content), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            value = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _ended(self._process) or str(error) or type(error).__name__
            raise ModelError(f"{self._path}: llama.cpp gave no answer at {route}: {reason}") from None
        finally:
            connection.close()
        if answer.status != 200:
            reason = value.get("error", {}).get("message", value) if isinstance(value, dict) else value
            raise ModelError(f"{self._path}: llama.cpp refuses {route}: {reason}")
        return value

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text are special."""
        content = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", content)["tokens"])

    def apply_template(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, by the file's own template, as llama.cpp renders it."""
        return str(self.post("/apply-template", {"messages": list(messages)})["prompt"])

    def next_logps(self, tokens: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` likeliest next tokens: ids int64 [count] and log-probabilities float64 [count]."""
        # the server is silent where the likeliest token is a part of a character: another is forced on it, which
        # leaves the probabilities before sampling as they are
        bias = [[self.tokenize("a")[-1], 1e6]]
        content = {"prompt": list(tokens), "n_predict": 1, "n_probs": count, "logit_bias": bias, "temperature": 0.0}
        top = self.post("/completion", content)["completion_probabilities"][0]["top_logprobs"]
        ids = np.array([entry["id"] for entry in top], dtype=np.int64)
        return ids, np.array([entry["logprob"] for entry in top], dtype=np.float64)

    def complete(self, prompt: str, *, max_new_tokens: int) -> str:
        """The greedy continuation of a text."""
        content = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0.0, "repeat_penalty": 1.0}
        return str(self.post("/completion", content)["content"])

    def chat(self, messages: Sequence[Message], *, max_new_tokens: int) -> str:
        """The greedy answer in a conversation, as clients of the chat endpoint get it."""
        content = {"messages": list(messages), "max_tokens": max_new_tokens, "temperature": 0.0, "repeat_penalty": 1.0}
        return str(self.post("/v1/chat/completions", content)["choices"][0]["message"]["content"])


def is_installed() -> bool:
    """Whether the package that carries llama.cpp is there."""
    return find_spec("xllamacpp") is not None


@contextmanager
def llama_cpp(path: Path, *, loras: Sequence[Path] = (), context: int = 1024, threads: int = 0) -> Iterator[LlamaCpp]:
    """llama.cpp with the model at `path`; `threads` 0 leaves their number to it.

    A process of its own: its words do not reach the terminal, a crash of it is an error line here, and its
    memory is given back. Raises ModelError with llama.cpp's reason when it does not load.
    """
    if not is_installed():
        raise MissingPackageError("llama.cpp is not installed: pip install 'macft[export]'")
    settings = {
        "path": str(path.absolute()),
        "loras": [str(lora.absolute()) for lora in loras],
        "context": context,
        "threads": threads,
    }
    command = [sys.executable, "-m", "macft.verify.llama_cpp_server", json.dumps(settings)]
    root = Path(__file__).resolve().parents[2]  # where the process finds this package
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, close_fds=True
        )
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            if not told:
                process.wait()
                raise ModelError(f"{path}: llama.cpp does not load it: {_reason(said, process)}")
            yield LlamaCpp(json.loads(told)["address"], process, path)
        finally:
            process.kill()
            process.communicate()


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
) -> GgufCheck:
    """Load the file in llama.cpp; compare token ids and prompts with ours, next tokens with `source`'s; answer once.

    `source` None: next tokens are not compared. Raises ModelError when llama.cpp does not load it, VerifyError when
    token ids differ or the mean KL(source || file) is above `LIMITS[quant]`.
    """
    with llama_cpp(path, loras=loras, threads=threads) as server:
        texts = _check_token_ids(path, server, tokenizer)
        prompts, warnings = (0, []) if template is None else _compare_prompts(server, tokenizer, template)
        tokens = (_added_in_front(server) + tokenizer.encode(TEXT).ids)[:_MAX_TOKENS]
        count = max(tokenizer.vocab_size, max(tokens) + 1)
        engines = [name for name in BACKENDS if engine_is_installed(name)]
        places = _places(len(tokens), count) if source is not None and engines else []
        found = [server.next_logps(tokens[:place], count) for place in places]
        if template is not None:
            answer = server.chat(conversation, max_new_tokens=_ANSWER_TOKENS)
        else:
            answer = server.complete(str(conversation[-1]["content"]), max_new_tokens=_ANSWER_TOKENS)
    compared = f"token ids of {texts} texts are the tokenizer's, prompts of {prompts} conversations the template's"
    if not places or source is None:
        why = "no training engine is installed" if source is not None else "no source was given"
        note = f"llama.cpp loads it; {compared}; {why}, so its numbers were not compared: this is all"
        return GgufCheck(texts, prompts, tuple(warnings), 0, None, None, None, answer, note)
    engine, logits = source_logits(source, tokens[: places[-1]])
    top1, kl = _divergence(logits, places, found)
    limit = LIMITS[quant]
    said = f"next tokens at {len(places)} positions: top-1 agrees with {engine} at {top1:.1%}, KL {kl:.2g}"
    if not kl <= limit:  # NaN fails too
        raise VerifyError(
            f"{path}: verification in llama.cpp failed: {said}, expected up to {limit:g} for {quant}; do not use it, "
            "and report this"
        )
    note = f"verified in llama.cpp: {compared}; {said} ({quant}: up to {limit:g})"
    return GgufCheck(texts, prompts, tuple(warnings), len(places), engine, top1, kl, answer, note)


def _check_token_ids(path: Path, server: LlamaCpp, tokenizer: Tokenizer) -> int:
    """How many texts were compared; VerifyError for the first token that differs."""
    specials = "word".join(["", *tokenizer.special_strings[:64], ""])
    texts = [*_TEXTS, specials] if tokenizer.special_strings else list(_TEXTS)
    for text in texts:
        difference = _difference(tokenizer, tokenizer.encode(text).ids, server.tokenize(text))
        if difference:
            raise VerifyError(
                f"{path}: llama.cpp reads text otherwise than the tokenizer: {difference}; do not use it, and report "
                "this"
            )
    return len(texts)


def _compare_prompts(server: LlamaCpp, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, list[str]]:
    """How many prompts of conversations have our token ids, and a line for each that has not."""
    equal, warnings = 0, []
    for written in _CONVERSATIONS:
        messages = [{"role": _ROLES[turn[0]], "content": turn[2:]} for turn in written.split("|")]
        try:
            ours = template.render(messages, add_generation_prompt=True)
        except DataError:
            continue  # a role that this template refuses
        ids = tokenizer.encode(ours).ids
        # the server takes a leading BOS off the text and puts its own in front of the ids
        difference = _difference(tokenizer, ids, server.tokenize(server.apply_template(messages), add_special=True))
        if difference:
            roles = ", ".join(str(message["role"]) for message in messages)
            warnings.append(f"llama.cpp prompts otherwise than the template ({roles}): {difference}")
        else:
            equal += 1
    return equal, warnings


def _difference(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str | None:
    """What the first different token is, or None."""
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


def _reason(said: IO[bytes], process: subprocess.Popen[bytes]) -> str:
    """Why the process did not load the model: llama.cpp's own first complaint, and how it ended."""
    said.seek(0)
    lines = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    # "0.00.006.915 E llama_model_load: error loading model: ..."
    complaints = [line.split(" E ", 1)[1] for line in lines if " E " in line]
    loading = [line.split("error loading model: ", 1)[1] for line in complaints if "error loading model: " in line]
    shown = (loading or complaints or lines[-1:] or ["it said nothing"])[0]
    ended = _ended(process)
    return f"{shown} ({ended})" if ended else shown


def _ended(process: subprocess.Popen[bytes]) -> str | None:
    """How a process was ended from outside, or None when it runs or ended by itself."""
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None
    if code >= 0:
        return None
    hint = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"it was ended by {signal.Signals(-code).name}{hint}"
