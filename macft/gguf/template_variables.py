"""Fix the variables of a chat template that llama.cpp and Ollama set and training left unset."""

from __future__ import annotations

from datetime import datetime

from macft.data.templates.chat_template import ChatTemplate, Message
from macft.errors import DataError

# variable -> what llama.cpp sets, and Ollama unless told otherwise: dates are today's, in these forms
_VALUES = {"enable_thinking": "true", "date_string": "'%d %b %Y'", "datetime": "'%b %d %Y'"}
_UNDEFINED = "macft_undefined"  # a name that no program sets

_QUESTION, _SYSTEM = {"role": "user", "content": "question"}, {"role": "system", "content": "system"}
_ANSWER = {"role": "assistant", "content": "answer"}
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (_QUESTION,),
    (_SYSTEM, _QUESTION),
    (_SYSTEM,),
    (_QUESTION, _ANSWER),
    (_SYSTEM, _QUESTION, _ANSWER, _QUESTION),
    (_QUESTION, {"role": "assistant", "content": "<think>\nthought\n</think>\n\nanswer"}, _QUESTION, _ANSWER),
)
_PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "a place"}}}
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "a tool", "parameters": _PARAMETERS}}]


def pin_variables(template: ChatTemplate) -> str:
    """The template's text, in which each such variable that would change a prompt is undefined, as in training.

    One that changes nothing stays open: where a model was trained with thinking, Ollama's switch turns it off.
    """
    trained = _prompts(template)
    now = datetime.now()
    pins = ""
    for name, value in _VALUES.items():
        if name in template.source and _prompts(_with(template, name, now.strftime(value))) != trained:
            pins += _set(name, _UNDEFINED)
    return pins + template.source


def _with(template: ChatTemplate, name: str, value: str) -> ChatTemplate:
    return template.with_source(_set(name, value) + template.source)


def _set(name: str, value: str) -> str:
    return f"{{% set {name} = {value} %}}\n"


def _prompts(template: ChatTemplate) -> list[str]:
    """What the conversations become, or why the template refuses them."""
    found = []
    for messages in _CONVERSATIONS:
        for tools in (None, _TOOLS):
            try:
                prompt = template.render(
                    messages, add_generation_prompt=messages[-1]["role"] != "assistant", tools=tools
                )
            except DataError as error:
                prompt = str(error)
            found.append(prompt)
    return found
