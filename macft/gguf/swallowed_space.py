"""Write prompts without the white space that special tokens of the tokenizer swallow and llama.cpp keeps."""

from __future__ import annotations

from pathlib import Path

from macft.data.templates.chat_template import ChatTemplate
from macft.data.templates.slots import literal
from macft.data.tokenization.tokenizer import read_json
from macft.errors import DataError

# what follows a token is stripped at its start, what precedes one at its end
_AFTER = """
{%- for token in TOKENS %}
    {%- set parts = macft.text.split(token) %}
    {%- set macft.text = parts[0] %}
    {%- for part in parts[1:] %}
        {%- set macft.text = macft.text + token + part.lstrip() %}
    {%- endfor %}
{%- endfor %}"""
_BEFORE = _AFTER.replace("macft.text + token + part.lstrip()", "macft.text.rstrip() + token + part")
_TURNS = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]


def without_swallowed_space(template: ChatTemplate, folder: Path) -> ChatTemplate:
    """The template, which strips its own text at special tokens that swallow white space, if any is there.

    `folder` is the tokenizer's. llama.cpp has no setting for such tokens, but treats them so in Phi-3, which it knows
    by its name and the token </s>.
    """
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    after, before = ([str(token["content"]) for token in added if token.get(side)] for side in ("rstrip", "lstrip"))
    if any(token["content"] == "</s>" for token in added) and any(t.get("rstrip") and t.get("special") for t in added):
        return template
    stripping = template.with_source(_wrapped(template.source, after, before))
    return stripping if after + before and _writes_differently(template, stripping) else template


def _wrapped(source: str, after: list[str], before: list[str]) -> str:
    # Jinja drops a newline after the first tag, one at the end of a template, and spaces before a tag
    body = source[:-1] if source.endswith("\n") else source
    text = f"{{% set macft_text %}}\n{body}{{{{ '' }}}}{{% endset %}}\n{{%- set macft = namespace(text=macft_text) %}}"
    for tokens, loop in ((after, _AFTER), (before, _BEFORE)):
        if tokens:
            text += loop.replace("TOKENS", f"[{', '.join(map(literal, tokens))}]")
    return text + "\n{{- macft.text }}"


def _writes_differently(template: ChatTemplate, other: ChatTemplate) -> bool:
    system = [{"role": "system", "content": "system"}]
    for messages in (_TURNS[:1], _TURNS[:3], _TURNS, [*system, *_TURNS[:1]], [*system, *_TURNS[:3]]):
        is_question = messages[-1]["role"] == "user"
        try:
            asked = template.render(messages, add_generation_prompt=is_question)
        except DataError:
            continue
        if other.render(messages, add_generation_prompt=is_question) != asked:
            return True
    return False
