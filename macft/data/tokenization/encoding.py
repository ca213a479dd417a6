"""Bundle everything that the tokens of a row depend on besides the row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.ends import AnswerEnds, find_ends
from macft.data.tokenization.tokenizer import Tokenizer

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

    @property
    def chat(self) -> ChatTemplate:
        """The template, for rows that need one."""
        assert self.template is not None, "conversations need a chat template"
        return self.template

    @cached_property
    def ends(self) -> AnswerEnds:
        """What closes the answers of the template."""
        return find_ends(self.chat, self.tokenizer)
