"""Run llama.cpp's server in a process of its own, and ask it for tokens, prompts, probabilities and answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import httpx2
import numpy as np

from macft.data.templates.chat_template import Message
from macft.errors import MissingPackageError, ModelError

_ANSWER_SECONDS = 3600


class LlamaCpp:
    """llama.cpp's server with one model, in its own process."""

    def __init__(self, client: httpx2.Client, process: subprocess.Popen[bytes], name: Path) -> None:
        self._client, self._process, self._name = client, process, name

    def post(self, route: str, content: dict[str, Any]) -> Any:
        """The JSON answer of a route; ModelError with llama.cpp's reason when there is none."""
        try:
            answer = self._client.post(route, json=content)
            value = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            reason = _ended(self._process) or str(error) or type(error).__name__
            raise ModelError(f"{self._name}: llama.cpp gave no answer at {route}: {reason}") from None
        if answer.status_code != 200:
            reason = value.get("error", {}).get("message", value) if isinstance(value, dict) else value
            raise ModelError(f"{self._name}: llama.cpp refuses {route}: {reason}")
        return value

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text are special."""
        content = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", content)["tokens"])

    def apply_template(self, messages: Sequence[Message], *, enable_thinking: bool | None = None) -> str:
        """The prompt of a conversation, by the file's own template, as llama.cpp renders it."""
        content: dict[str, Any] = {"messages": list(messages)}
        if enable_thinking is not None:
            content["chat_template_kwargs"] = {"enable_thinking": enable_thinking}
        return str(self.post("/apply-template", content)["prompt"])

    def next_logps(self, tokens: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` likeliest next tokens: ids int64 [count] and log-probabilities float64 [count]."""
        # the server shows nothing where the likeliest token is a part of a character: another is forced, which
        # leaves the probabilities before sampling unchanged
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
    """Whether the package that carries llama.cpp is installed."""
    return find_spec("xllamacpp") is not None


@contextmanager
def llama_cpp(
    path: Path,
    *,
    loras: Sequence[Path] = (),
    context: int = 1024,
    threads: int = 0,
    continues_answers: bool = False,
    name: Path | None = None,
) -> Iterator[LlamaCpp]:
    """Run llama.cpp with the model at `path`; `threads` 0 leaves their number to it, `name` is for errors.

    With `continues_answers` a conversation that ends in an answer is prompted to go on within it, as by Ollama.

    It runs in its own process: its output does not reach the terminal, a crash becomes an error line, and its
    memory is given back. Raises ModelError with llama.cpp's reason when it does not load.
    """
    if not is_installed():
        raise MissingPackageError("llama.cpp is not installed: pip install 'macft[export]'")
    settings = {
        "path": str(path.absolute()),
        "loras": [str(lora.absolute()) for lora in loras],
        "context": context,
        "threads": threads,
        "continues_answers": continues_answers,
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
                raise ModelError(f"{name or path}: llama.cpp does not load it: {_reason(said, process)}")
            address = json.loads(told)["address"]
            # without trust_env no proxy gets in between
            with httpx2.Client(base_url=address, timeout=_ANSWER_SECONDS, verify=False, trust_env=False) as client:
                yield LlamaCpp(client, process, name or path)
        finally:
            process.kill()
            process.communicate()


def _reason(said: IO[bytes], process: subprocess.Popen[bytes]) -> str:
    """Why the process did not load the model: llama.cpp's first error, and how the process ended."""
    said.seek(0)
    lines = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    # "0.00.006.915 E llama_model_load: error loading model: ..."
    complaints = [line.split(" E ", 1)[1] for line in lines if " E " in line]
    loading = [line.split("error loading model: ", 1)[1] for line in complaints if "error loading model: " in line]
    shown = (loading or complaints or lines[-1:] or ["it said nothing"])[0]
    ended = _ended(process)
    return f"{shown} ({ended})" if ended else shown


def _ended(process: subprocess.Popen[bytes]) -> str | None:
    """How a process was ended from outside, or None when it runs or exited by itself."""
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None
    if code >= 0:
        return None
    hint = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"it was ended by {signal.Signals(-code).name}{hint}"
