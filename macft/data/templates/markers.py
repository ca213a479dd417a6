"""A chat template and a tokenizer in; a warning out where what the template writes is no token but plain text."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path

from macft.data.templates.chat_template import ChatTemplate
from macft.data.tokenization.tokenizer import Tokenizer
from macft.errors import DataError

logger = logging.getLogger("macft")

# <|im_start|>, <｜User｜>, <|turn>, <turn|>, <start_of_turn>, <role>
_MARKER = re.compile(r"<[|｜][^\s<>]+>|<[^\s<>]+[|｜]>|</?(?:start_of_turn|end_of_turn|role)>")
# where a model keeps the template that it was trained with, whatever its tokens are
_OWN = ("chat_template.jinja", "tokenizer_config.json")
_QUESTION = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "answer"}


def missing_marker(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """The first marker that the template puts around a turn and the tokenizer has no token for."""
    try:
        text = template.render([_QUESTION, _ANSWER])
    except DataError:  # it says itself what it wants of a conversation
        return None
    return next((found for found in _MARKER.findall(text) if found not in tokenizer.vocabulary), None)


@lru_cache(maxsize=16)  # said once of a template, however many data sets it renders
def warn_of_missing_marker(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """One warning if a template that is not the model's own writes markers of another model."""
    if Path(template.name).name in _OWN:
        return
    if marker := missing_marker(template, tokenizer):
        logger.warning(
            "template %s writes %s, for which this tokenizer has no token: it becomes plain text, in several tokens; "
            "leave template out for the model's own",
            template.name,
            marker,
        )
