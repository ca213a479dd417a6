"""Load a model that answers prompts and scores texts."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from macft.backends.base import Sampling
from macft.data.batches import collate
from macft.data.formats.conversations import Example
from macft.data.templates.chat_template import Message
from macft.data.tokenization.conversations import fit_examples
from macft.data.tokenization.embedding import check_input
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.table import TokenizedExample
from macft.errors import DataError
from macft.files import StrPath
from macft.inference.chat import MAX_NEW_TOKENS, ChatModel, answer, fit_prompt
from macft.inference.load import ChatOptions, load_chat_model
from macft.inference.prompts import user_turn

logger = logging.getLogger("macft")


class TokenLogp(NamedTuple):
    """A token of a scored text, and the natural logarithm of its probability after all tokens before it."""

    id: int
    text: str
    logp: float


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, with the adapter and the chat template that it is prompted with."""

    chat: ChatModel

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
    ) -> str:
        """Answer a question, or a list of `{"role": ..., "content": ...}` messages, and return the whole answer.

        By default the most likely token is taken each time. A conversation that is too long for the model loses its
        oldest turns. Raises DataError when the last question alone does not fit, or the template refuses the messages.
        """
        messages = user_turn(prompt) if isinstance(prompt, str) else list(prompt)
        chat = replace(self.chat, sampling=sampling, max_new_tokens=max_new_tokens)
        fitted = fit_prompt(chat, messages)
        if fitted.dropped:
            logger.warning("the conversation is too long: its first %d messages are left out", fitted.dropped)
        return "".join(answer(chat, fitted))

    def logps(self, text: str | Sequence[Message]) -> list[TokenLogp]:
        """Score what training would train on: the assistant's answers among messages, or every token of a text.

        The first token of a text has no tokens before it and is left out. Raises DataError when the text is longer than
        the model allows, or the template refuses the messages.
        """
        scored, ends, row = self._scored(text)
        check_input(row.tokens.tolist(), self.chat.tokenizer, self.chat.embedding_rows)
        limit = self.chat.context_length
        if limit is not None and len(row.tokens) > limit:
            raise DataError(f"the text has {len(row.tokens)} tokens, the model holds {limit}; shorten it")
        if not row.loss_mask.any():
            return []
        batch = collate([row])
        logps = self.chat.model.logps(batch, batch.loss_mask[:, 1:])[0]
        return [
            TokenLogp(int(row.tokens[i]), scored[ends[i - 1] : ends[i]], float(logps[i - 1]))
            for i in row.loss_mask.nonzero()[0].tolist()
        ]

    def _scored(self, text: str | Sequence[Message]) -> tuple[str, list[int], TokenizedExample]:
        """The text as the model reads it, where each token ends in it, and its tokens with those to score."""
        tokenizer, template = self.chat.tokenizer, self.chat.template
        if isinstance(text, str):
            text = tokenizer.opened(text)
            encoded = tokenizer.encode(text, is_input=True)
            tokens = np.asarray(encoded.ids, dtype=np.int32)
            return text, list(encoded.ends), TokenizedExample(tokens, np.arange(len(tokens)) > 0)
        if template is None:
            raise DataError("messages need a chat template, and the model was loaded with raw=True; pass a text")
        [fitted] = fit_examples([Example(tuple(text), "messages")], Encoding(tokenizer, template, sys.maxsize))
        return fitted.rendered.text, list(fitted.encoded.ends), fitted.row


def load_model(
    name: StrPath,
    *,
    adapter: StrPath | None = None,
    backend: str = "auto",
    template: StrPath | None = None,
    raw: bool = False,
    quantization_bit: int | None = None,
) -> LanguageModel:
    """Load a model by built-in name, hub id, folder or .gguf file, with an adapter of PEFT or mlx-lm on it.

    `backend` is auto, mlx or torch. The adapter's chat template comes before the model's own; `template` names another
    one, a Jinja file or LLaMA-Factory's name; `raw` uses none: a prompt is then continued as it is.
    `quantization_bit`, 4 or 8, quantizes the base; without it the base is quantized as it was for the adapter's run.
    Raises ModelError for a model or adapter that is missing, damaged or does not fit, MissingPackageError when the
    engine is not installed.
    """
    chat = load_chat_model(
        os.fspath(name),
        os.fspath(adapter) if adapter is not None else None,
        ChatOptions(backend, os.fspath(template) if template is not None else None, raw, quantization_bit),
    )
    for note in chat.model.info.notes:
        logger.warning(note)
    return LanguageModel(chat)
