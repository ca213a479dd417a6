"""Keep Ollama from mistaking a chat template for one that it knows.

On `create`, Ollama compares the chat template of a GGUF with some forty that it knows. If one lies within an edit
distance of 100, it adds its own Go template and stop parameters for that one, under which the chat template is never
used: SmolLM2's, 41 edits away from plain ChatML, loses its default system prompt this way. Our TEMPLATE replaces
that Go template, but not the stop parameters.
"""

from __future__ import annotations

# an insertion, removal or replacement changes the number of these by at most one
_MARK = "~"
_COUNT = 256
_PADDING = "{# " + _MARK * _COUNT + " #}\n"


def pad_template(source: str) -> str:
    """`source` behind a comment that renders as nothing and keeps any template of Ollama's 100 edits away.

    The comment holds 256 tildes, and the edit distance of two texts is at least the difference in their numbers of
    tildes. So only a template with more than 156 of them could be near; those that Ollama knows have none.
    """
    return source if source.startswith(_PADDING) else _PADDING + source
