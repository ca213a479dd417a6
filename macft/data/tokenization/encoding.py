"""Bundle everything that the tokens of a row depend on besides the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.ends import AnswerEnds, find_ends
from macft.data.tokenization.tokenizer import Encoded, Placed, Tokenizer

# rows that are encoded at once: keeps all cores busy, and the memory of the encodings small
CHUNK = 1000


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens and loss masks; can be sent to another process."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # texts need none
    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False
    embedding_rows: int | None = None  # ids from here on are unknown to the model; None: not known

    @property
    def chat(self) -> ChatTemplate:
        """The template, for rows that need one."""
        assert self.template is not None, "conversations need a chat template"
        return self.template

    @cached_property
    def ends(self) -> AnswerEnds:
        """What closes the answers of the template."""
        return find_ends(self.chat, self.tokenizer)

    @property
    def _is_input(self) -> bool:
        return self.template is not None and self.template.is_bare

    def encode(self, text: str) -> Encoded:
        """The tokens of a rendered conversation."""
        return self.tokenizer.encode(text, is_input=self._is_input)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode` for many conversations."""
        return self.tokenizer.encode_batch(texts, is_input=self._is_input)

    def place_batch(self, texts: Sequence[str], borders: Sequence[Sequence[int]]) -> list[Placed]:
        """See Tokenizer."""
        return self.tokenizer.place_batch(texts, borders, is_input=self._is_input)
