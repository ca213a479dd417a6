"""Turn a conversation into the ids that prompt its next turn, and new ids into text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.data.tokenization.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_WINDOW = 16
_LONGEST_WAIT = 64


def encode_prompt(tokenizer: Tokenizer, template: ChatTemplate | None, messages: Sequence[Message]) -> list[int]:
    """The ids that prompt the next turn; without a template, those of the last message's text as it is."""
    if template is None:
        return tokenizer.encode(tokenizer.opened(str(messages[-1]["content"])), is_input=True).ids
    text = template.render(messages, add_generation_prompt=True)
    return tokenizer.encode(text, is_input=template.is_bare).ids


def stream_text(token_ids: Iterator[int], decode: Callable[[list[int]], str]) -> Generator[str, None, None]:
    """Yield the text of a growing token sequence, never half a character.

    A character may need several tokens: until the last one the text ends in U+FFFD, and that end is held
    back; if the tokens stop there, it is dropped. Only a short window is decoded, so time is linear in the tokens.
    """
    window: list[int] = []
    sent = 0  # characters of the decoded window that have been yielded
    whole = 0  # tokens of the window after which the text last ended with a whole character
    for token in token_ids:
        window.append(token)
        text = decode(window)
        steady = text.rstrip(_BROKEN)
        if len(steady) > sent:
            yield steady[sent:]
            sent = len(steady)
        if len(steady) < len(text):
            if len(window) > _LONGEST_WAIT:  # no character is this long: broken bytes
                yield text[sent:]
                window, sent, whole = [], 0, 0
            continue
        if len(window) > _WINDOW:
            # some decoders drop the first token's leading space, so a new window starts on old text
            kept = decode(window[whole:])
            if kept:
                window, sent = window[whole:], len(kept)
        whole = len(window)
