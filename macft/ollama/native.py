"""Prove that llama.cpp, by which Ollama renders a GGUF's own chat template, writes the prompts of the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.errors import DataError, ModelError
from macft.ollama import conversations, grammar
from macft.ollama.comparison import Comparison, Writer, compare, excluded_sentences
from macft.ollama.conversations import ConversationCase
from macft.ollama.grammar import NotDerivableError
from macft.ollama.template import SPECIAL
from macft.verify.llama_cpp import LlamaCpp, llama_cpp
from macft.verify.logits import VerifyError

_RANDOM = 300


@dataclass(frozen=True)
class NativeProof:
    """How llama.cpp renders the embedded template: `cases` conversations to the text that was trained on.

    `limits` are sentences about what they do not cover.
    """

    cases: int
    limits: tuple[str, ...]


def prove_native(path: Path, template: ChatTemplate, *, bos: str | None, name: Path) -> NativeProof:
    """Compare llama.cpp's prompts, as Ollama asks for them, with those of the template that was trained with.

    `bos` is the text of the token that llama.cpp puts before a prompt by itself, `name` what errors call the file.
    Raises VerifyError for the first difference with contents that plain chat holds.
    """
    own_texts = _own_texts(template)
    with llama_cpp(path, continues_answers=True, name=name) as server:
        native = _native(server, template, bos)
        whole, begun = (_compare(template, native, own_texts, is_begun=is_begun) for is_begun in (False, True))
    if whole.differs is not None:
        raise VerifyError(
            f"{name}: llama.cpp, by which Ollama renders this model's chat template, does not write the prompts of the "
            f"training: {whole.differs}; give a template that it renders alike (--template), or leave this check out "
            "(--no-verify)"
        )
    limits = excluded_sentences(whole.excluded)
    if begun.differs is not None:
        limits.append(f"An answer that was begun goes on by llama.cpp's own rules: not equal {begun.differs}.")
        return NativeProof(whole.equal, tuple(limits))
    if begun.excluded:
        limits += [f"For an answer that was begun: {text}" for text in excluded_sentences(begun.excluded)]
    return NativeProof(whole.equal + begun.equal, tuple(limits))


def _own_texts(template: ChatTemplate) -> list[str]:
    """The tags that the template writes around contents."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    try:
        return sorted(set(SPECIAL.findall(template.render(turns, add_generation_prompt=True))))
    except DataError:
        return []


def _compare(template: ChatTemplate, native: Writer, own_texts: Sequence[str], *, is_begun: bool) -> Comparison:
    """Over all conversations that the template takes and that end within an answer, or that do not."""

    def taken(cases: Iterable[ConversationCase]) -> Iterator[ConversationCase]:
        for case in cases:
            if (case.messages[-1]["role"] == "assistant") != is_begun:
                continue
            try:
                grammar.expected(template, case.messages)
            except (DataError, NotDerivableError):
                continue
            yield case

    found = compare(template, native, taken(conversations.grammar_cases(own_texts, system=True)))
    if found.differs is not None:
        return found
    more = chain(
        conversations.system_alone_cases(own_texts, found.excluded),
        conversations.later_system_cases(),
        conversations.answer_first_cases(system=True),
        conversations.random_cases(_RANDOM, own_texts, system=True, without=found.excluded),
    )
    return compare(template, native, taken(more), found)


def _native(server: LlamaCpp, template: ChatTemplate, bos: str | None) -> Writer:
    def write(messages: Sequence[Message]) -> str:
        try:
            text = server.apply_template(messages, enable_thinking=True)
        except ModelError:  # refused
            return ""
        # llama.cpp takes a BOS away from the front of the text and puts it before the tokens
        return f"{bos}{text}" if bos and grammar.expected(template, messages).startswith(bos) else text

    return Writer("llama.cpp", write)
