"""Hold a conversation with a model: read what the user types, and stream the answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from macft.backends.base import Model, Sampling
from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.tokenization.embedding import check_input
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError, MacftError, as_typed
from macft.files import write_text
from macft.inference.answer import encode_prompt, stream_text
from macft.inference.prompts import user_turn, with_system

PROMPT = "> "
MAX_NEW_TOKENS = 512
HELP = """\
/reset         forget the conversation, keep the system prompt
/system TEXT   set the system prompt and forget the conversation; without TEXT show it
/save FILE     write the conversation as a row that `dataset:` reads
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True)
class ChatModel:
    """A loaded model and how it answers."""

    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: each prompt's text is continued as it is
    stop_ids: frozenset[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = MAX_NEW_TOKENS
    context_length: int | None = None  # tokens the model can hold; None: unknown
    embedding_rows: int | None = None  # see Encoding


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that leaves room to answer; the first `dropped` turns were left out of it."""

    prompt: list[int]
    max_new_tokens: int
    dropped: int


def fit_prompt(model: ChatModel, messages: Sequence[Message], dropped: int = 0) -> FittedPrompt:
    """Leave out the oldest turns, after the first `dropped`, until there is room for the answer.

    A system prompt stays. Raises DataError when even the last question does not fit, or when the template refuses the
    turns.
    """
    limit = model.context_length
    num_system = int(model.template is not None and messages[0]["role"] == "system")
    system, turns = messages[:num_system], messages[num_system:]
    while True:
        prompt = prompt_ids(model, [*system, *turns[dropped:]])
        if limit is None:
            return FittedPrompt(prompt, model.max_new_tokens, dropped)
        if len(prompt) + min(model.max_new_tokens, limit // 2) <= limit:
            return FittedPrompt(prompt, min(model.max_new_tokens, limit - len(prompt)), dropped)
        later = [i for i, turn in enumerate(turns) if i > dropped and turn["role"] == "user"]
        if later:
            dropped = later[0]
        elif len(prompt) < limit:
            return FittedPrompt(prompt, limit - len(prompt), dropped)
        else:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the model holds {limit} including its answer; shorten it"
            )


def prompt_ids(model: ChatModel, messages: Sequence[Message]) -> list[int]:
    """The ids that prompt the answer. Raises DataError where the template or the embedding refuses the messages."""
    ids = encode_prompt(model.tokenizer, model.template, messages)
    check_input(ids, model.tokenizer, model.embedding_rows)
    return ids


def answer(model: ChatModel, fitted: FittedPrompt) -> Generator[str, None, None]:
    """Yield pieces of the answer to a prompt."""
    new_ids = model.model.generate(
        fitted.prompt, max_new_tokens=fitted.max_new_tokens, stop_ids=model.stop_ids, sampling=model.sampling
    )
    return stream_text(new_ids, model.tokenizer.decode)


def answer_prompts(model: ChatModel, conversations: Sequence[list[Message]], out: TextIO, notes: TextIO) -> None:
    """Answer each conversation separately, with the same seed: only answers on `out`, a blank line between."""
    for index, messages in enumerate(conversations):
        if index:
            out.write("\n")
        _warn_of_special_tokens(model.tokenizer, messages, notes)
        fitted = fit_prompt(model, messages)
        if fitted.dropped:
            _note(notes, f"the conversation is too long: its first {fitted.dropped} messages are left out")
        for piece in answer(model, fitted):
            out.write(piece)
            out.flush()
        out.write("\n")
        out.flush()


def chat_loop(model: ChatModel, *, system: str | None, source: TextIO, out: TextIO, notes: TextIO) -> None:
    """Talk until /quit or the end of `source`: answers go to `out`, everything else to `notes`.

    A terminal gets a prompt and line editing; from anything else one question per line is read.
    """
    chat = _Chat(model, system, out, notes)
    interactive = source.isatty()
    if interactive:
        _note(notes, "/help lists the commands")
    while True:
        try:
            line = _read_line(source, out, notes) if interactive else source.readline()
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note(notes, "\n/quit or Ctrl-D leaves")
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text ({error}); convert it to UTF-8") from None
        if not line:
            if interactive:
                notes.write("\n")
            return
        if not chat.take(_without_surrogates(line.strip()), interactive=interactive):
            return


class _Chat:
    """One conversation: its turns, and what is done with each line typed."""

    def __init__(self, model: ChatModel, system: str | None, out: TextIO, notes: TextIO) -> None:
        self._model = model
        self._system = system
        self._out = out
        self._notes = notes
        self._turns: list[Message] = []
        self._dropped = 0
        self._answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/help": lambda _: self._say(HELP),
        }

    def take(self, line: str, *, interactive: bool) -> bool:
        """Carry out a command or answer a question; False when it is time to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            self._say(f"{name} is not a command; expected one of {', '.join(self._commands)}, /quit")
        elif line:
            self._ask(line, interactive=interactive)
        return True

    def _ask(self, question: str, *, interactive: bool) -> None:
        _warn_of_special_tokens(self._model.tokenizer, user_turn(question), self._notes)
        # without a template nothing marks turns: every line stands for itself
        turns = [*self._turns, *user_turn(question)] if self._model.template else user_turn(question)
        try:
            messages = with_system(turns, self._system)
            fitted = fit_prompt(self._model, messages, self._dropped if self._turns else 0)
        except MacftError as error:
            self._say(str(error))
            return
        if fitted.dropped and not self._dropped:
            self._say("the conversation no longer fits the model: the oldest turns are left out from here on")
        text = self._stream(fitted, interactive=interactive)
        if text is not None and self._model.template:
            self._turns = [*turns, {"role": "assistant", "content": text}]
            self._dropped = fitted.dropped

    def _stream(self, fitted: FittedPrompt, *, interactive: bool) -> str | None:
        """Stream the answer and return it, also when it was stopped; None if that was before its first piece."""
        # another seed for each answer: otherwise asking again after /reset would repeat the answer
        sampling = replace(self._model.sampling, seed=self._model.sampling.seed + self._answers)
        self._answers += 1
        text = ""
        try:
            with closing(answer(replace(self._model, sampling=sampling), fitted)) as pieces:
                for piece in pieces:
                    text += piece
                    self._out.write(piece)
                    self._out.flush()
        except KeyboardInterrupt:
            if not interactive:
                raise
            self._say("\n(stopped)")
            return text or None
        self._out.write("\n")
        self._out.flush()
        return text

    def _reset(self, _: str = "") -> None:
        self._turns, self._dropped = [], 0
        self._say("the conversation starts again")

    def _set_system(self, text: str) -> None:
        if self._model.template is None:
            self._say("--raw continues text as it is, without a system prompt")
            return
        if not text:
            self._say(f"system prompt: {self._system}" if self._system else "no system prompt is set")
            return
        _warn_of_special_tokens(self._model.tokenizer, user_turn(text), self._notes)
        self._system = text
        self._reset()

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            self._say("/save needs a file name, such as chat.jsonl")
        elif not self._turns:
            self._say("there is nothing to save yet")
        elif path.exists():
            self._say(f"{path} exists already; give another name")
        else:
            row = {"messages": with_system(self._turns, self._system)}
            try:
                write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
            except OSError as error:
                self._say(f"{path} cannot be written ({error.strerror}); give another name")
            else:
                self._say(f"saved {len(self._turns)} messages to {path}")

    def _say(self, text: str) -> None:
        _note(self._notes, text)


def _read_line(source: TextIO, out: TextIO, notes: TextIO) -> str:
    """The next line from a terminal, "" at its end; edited with history where Python has readline."""
    if source is sys.stdin and out is sys.stdout and out.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # importing it gives input() its line editing
        try:
            return input(PROMPT) + "\n"
        except EOFError:
            return ""
    notes.write(PROMPT)
    notes.flush()
    return source.readline()


def _warn_of_special_tokens(tokenizer: Tokenizer, messages: Sequence[Message], notes: TextIO) -> None:
    text = "\n".join(str(message["content"]) for message in messages)
    found = [token for token in tokenizer.special_strings if token in text]
    if found:
        _note(notes, f"note: your text holds {', '.join(found)}, which the model reads as control tokens")


def _note(notes: TextIO, text: str) -> None:
    text = as_typed(text)
    # an empty NO_COLOR does not count: https://no-color.org
    dim = notes.isatty() and not os.environ.get("NO_COLOR")
    notes.write(f"\x1b[2m{text}\x1b[0m\n" if dim else f"{text}\n")
    notes.flush()


def _without_surrogates(text: str) -> str:
    # bytes that were not text arrive as lone surrogates, which no tokenizer takes
    return text.encode("utf-8", "replace").decode("utf-8")
