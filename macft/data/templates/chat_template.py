"""Load a model's Jinja chat template and render conversations with it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from macft.data.notes import Note
from macft.data.templates.llamafactory import NAMED, REFUSED
from macft.data.templates.slots import (
    drops_thoughts,
    literal,
    named_source,
    needs_eos,
    one_answer_reason,
    slots_of,
    thinking_default,
)
from macft.data.templates.thoughts import with_thought
from macft.data.tokenization.tokenizer import Tokenizer, read_json
from macft.errors import DataError, ModelError

logger = logging.getLogger("macft")

Message = dict[str, Any]

_JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
# the name of the template that renders only the contents, with the eos token after an answer
EMPTY = "empty"
_EMPTY_SOURCE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' and not message['content'].endswith(eos_token) %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# <|im_start|>, <｜User｜>, <|turn>, <turn|>, <start_of_turn>, <role>
_MARKER = re.compile(r"<[|｜][^\s<>]+>|<[^\s<>]+[|｜]>|</?(?:start_of_turn|end_of_turn|role)>")
# where a model keeps its own template, which is trusted whatever its tokens are
_OWN = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


class ChatTemplate:
    """A compiled template; `source` is its Jinja text, and `name` says where it came from in errors."""

    def __init__(self, source: str, name: str, special_map: dict[str, str]) -> None:
        self.source = source
        self.name = name
        # why earlier answers cannot be trained on; None if they can
        self.one_answer = one_answer_reason(source)
        self.drops_thoughts = drops_thoughts(source)
        # a named template reads a thought in the content
        slots = slots_of(source)
        self._thought_tags = None if slots is None else slots.thought
        # whether it renders only the contents, so that the text is an input like any other
        self.is_bare = source.endswith(_EMPTY_SOURCE)
        self._special_map = special_map
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = str(error.message).rstrip(".")
            raise ModelError(f"{name} line {error.lineno}: {reason}; correct the template") from None

    def __reduce__(self) -> tuple[Any, ...]:
        # a compiled template cannot be sent to another process
        return ChatTemplate, (self.source, self.name, self._special_map)

    def with_source(self, source: str) -> ChatTemplate:
        """Another text under the same name and with the same special tokens."""
        return ChatTemplate(source, self.name, self._special_map)

    def syntax(self) -> nodes.Template:
        """The template as Jinja's tree of nodes."""
        return _environment().parse(self.source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
    ) -> str:
        """The conversation as text; DataError when the template refuses it or fails on it."""
        try:
            return self._compiled.render(
                messages=[with_thought(message, self._thought_tags) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_map,
            )
        except Exception as error:  # a template is foreign code: anything can come out of it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template ({self.name}) refuses this conversation: {reason}") from None


def load_template(
    folder: Path,
    special_map: dict[str, str],
    template: str | None = None,
    *,
    default_system: str | None = None,
    enable_thinking: bool = True,
    opening: str = "",
) -> ChatTemplate:
    """The chat template of a model folder, or `template`: a Jinja file, or one of LLaMA-Factory's names.

    A file in the working directory takes precedence over a name. `empty` joins the contents, with the eos token after
    those of an assistant, and begins with `opening`, as the tokenizer's inputs do. `default_system` is the system text
    of conversations without one; it and `enable_thinking` become part of the source. Raises ModelError when the
    template does not exist or is not valid Jinja, or the model lacks the eos token that it needs.
    """
    source, name, is_named = _find_source(folder, special_map, template, default_system, enable_thinking)
    if not enable_thinking and "enable_thinking" not in source:
        logger.warning("the chat template (%s) does not use enable_thinking: it has no effect", name)
    if is_named:
        return ChatTemplate(source, name, special_map)
    if source == _EMPTY_SOURCE and opening:
        source = _opened_source(opening)
    whole = ChatTemplate(_with_defaults(source, default_system, enable_thinking), name, special_map)
    if default_system:
        _check_default_system(whole, ChatTemplate(source, name, special_map), default_system)
    return whole


def _find_source(
    folder: Path,
    special_map: dict[str, str],
    template: str | None,
    default_system: str | None,
    enable_thinking: bool,
) -> tuple[str, str, bool]:
    """(Jinja text, name, whether it holds default_system and enable_thinking already)."""
    if template is None:
        path = folder / "chat_template.jinja"
        if path.is_file():
            return _read_template(path), str(path), False
        path = next((folder / name for name in _OWN[1:] if _entry(folder / name)), folder / _OWN[1])
        return _own_template(path, _entry(path)), str(path), False
    path = Path(template).expanduser()
    if path.is_file():
        if template in _names():
            logger.warning("template: using the file %s in this folder, not the template of that name", path)
        return _read_template(path), str(path), False
    if template == EMPTY:
        _check_eos(folder, special_map, EMPTY)
        return _EMPTY_SOURCE, EMPTY, False
    if template in NAMED:
        if needs_eos(template):
            _check_eos(folder, special_map, template)
        return named_source(template, default_system, enable_thinking), template, True
    if template in REFUSED:
        raise ModelError(
            f"template: LLaMA-Factory's {template} is not supported: {REFUSED[template]}; "
            "leave template out for the model's own, or give a Jinja file"
        )
    if path.suffix in _JINJA_SUFFIXES or len(path.parts) > 1:
        return _read_template(path), str(path), False
    near = get_close_matches(template, _names(), n=1)
    hint = f"; did you mean {near[0]}" if near else ""
    raise ModelError(
        f"template: {template} is neither a file nor a name{hint}; expected a Jinja file or one of "
        f"{', '.join(_names())}"
    )


def _names() -> list[str]:
    return sorted([*NAMED, EMPTY])


def _check_eos(folder: Path, special_map: dict[str, str], name: str) -> None:
    if "eos_token" not in special_map:
        raise ModelError(f"{folder}: no eos_token, which template: {name} needs to end an answer; give a Jinja file")


def _opened_source(opening: str) -> str:
    """The source of `empty` that begins with this text, unless the first content does."""
    text = literal(opening)
    has_it = f"messages and messages[0]['content'].startswith({text})"
    return f"{{% if not ({has_it}) %}}{{{{ {text} }}}}{{% endif %}}{_EMPTY_SOURCE}"


def _with_defaults(source: str, default_system: str | None, enable_thinking: bool) -> str:
    """`source`, extended to add the system text and to switch thinking off whatever tool renders it."""
    if default_system is not None:
        message = f"{{'role': 'system', 'content': {literal(default_system)}}}"
        source = (
            "{% if not messages or messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{message}] + messages | list %}}{{% endif %}}\n{source}"
        )
    if not enable_thinking and "enable_thinking" in source:
        source = f"{{% set enable_thinking = {thinking_default(False)} %}}\n{source}"
    return source


def _check_default_system(template: ChatTemplate, bare: ChatTemplate, default_system: str) -> None:
    """Raise ModelError if the template refuses every system text; warn if it ignores them.

    `bare` is the template without the default.
    """
    question = [{"role": "user", "content": "question"}]
    try:
        bare.render(question)
    except DataError:  # a row's own error will say what the template requires
        return
    try:
        text = template.render(question)
    except DataError as error:
        raise ModelError(f"default_system: {error}; remove it, or give another template") from None
    if default_system.strip() not in text:
        logger.warning("the chat template (%s) writes no system text: default_system has no effect", template.name)


def has_template(folder: Path) -> bool:
    """Whether a model or adapter folder holds a chat template; chat_template.json is what older processors wrote."""
    return (folder / _OWN[0]).is_file() or any(_entry(folder / name) for name in _OWN[1:])


def template_folder(base: Path, adapter: Path | None) -> Path:
    """The folder whose template a model uses: the adapter's if it has one, else the base's."""
    own = adapter is not None and (adapter / "chat_template.jinja").is_file()
    return adapter if own and adapter is not None else base


def template_end_ids(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """The id of the special token that ends a rendered assistant turn; empty if none does."""
    answer = "macft-answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    _, found, tail = template.render(conversation).rpartition(answer)
    if not found:
        return frozenset()
    ends = [id_ for id_ in tokenizer.encode(tail).ids if id_ in tokenizer.special_ids]
    return frozenset(ends[:1])


def marker_notes(template: ChatTemplate, tokenizer: Tokenizer) -> list[Note]:
    """A warning if a template that is not the model's own puts markers around a turn that are not tokens."""
    if Path(template.name).name in _OWN:
        return []
    try:
        text = template.render([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
    except DataError:  # a row's own error will say what the template requires
        return []
    notes = (
        Note(
            f"template {template.name} writes {marker}, for which this tokenizer has no token: it becomes plain text, "
            "in several tokens; leave template out for the model's own"
        )
        for marker in _MARKER.findall(text)
        if marker not in tokenizer.vocabulary
    )
    return list(islice(notes, 1))


def _entry(path: Path) -> Any:
    return read_json(path).get("chat_template")


def _own_template(path: Path, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, dict)}
        if isinstance(named.get("default"), str):
            return str(named["default"])
        raise ModelError(
            f"{path}: chat_template holds the names {', '.join(named) or 'none'}, expected default; "
            "save one of them as a Jinja file and give its path as template"
        )
    raise ModelError(
        f"{path.parent}: no chat template; looked for chat_template.jinja and for chat_template in "
        "tokenizer_config.json and chat_template.json; give the path of a Jinja file as template"
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.jinja")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}" if near else "; give the path of a Jinja file"
        raise ModelError(f"{path}: no such template file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not readable as UTF-8 text ({error})") from None


class _Generation(Extension):
    """Accepts {% generation %} ... {% endgeneration %}, which marks text and renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (the name and kind are Jinja's)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    # the settings and helpers that Hugging Face templates are written against
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
