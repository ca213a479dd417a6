"""Parse a YAML file and the words of a command line into keys with their values and origins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from macft.config.settings import Settings
from macft.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class ConfigEntry:
    """A value, where it was written, and under which key if not macft's own."""

    value: Any
    origin: str  # "line 3", "command line", "mlx-lm's default", "USE_MODELSCOPE_HUB"
    written: str | None = None


def read_yaml(path: Path) -> dict[str, ConfigEntry]:
    """The keys of a file with their lines; raises ConfigError for anything but a mapping of keys."""
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, expected a YAML file{_yaml_files_in(path)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file{_yaml_files_in(path.parent)}")
    try:
        content, lines = _load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{where}: {problem}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: a value is not what it looks like ({error}); put it in quotes") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: found {found}, expected keys such as model_name_or_path: ...")
    return {str(key): ConfigEntry(value, f"line {lines.get(str(key), 1)}") for key, value in content.items()}


def _load(text: str) -> tuple[Any, dict[str, int]]:
    """The document, and the lines of its keys."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return content, {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def _yaml_files_in(folder: Path) -> str:
    names = sorted(str(p) for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    return f"; {folder} holds {', '.join(names[:5])}" if names else ""


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice, of which YAML takes the later, and reads 1e-4 as a number, not as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                problem = f"the key {key} appears twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_overrides(arguments: Sequence[str], name_of: Callable[[str], str]) -> dict[str, ConfigEntry]:
    """Read `key=value`, `--key value`, `--key=value` and a bare `--key`; values are YAML.

    `name_of` gives macft's name of a key.
    """
    entries: dict[str, ConfigEntry] = {}
    for key, text in _words(arguments, name_of):
        if key in entries:
            raise ConfigError(f"{key} appears twice on the command line; keep one")
        entries[key] = ConfigEntry(True if text is None else _value(name_of(key), text), COMMAND_LINE)
    return entries


def _words(arguments: Sequence[str], name_of: Callable[[str], str]) -> Iterator[tuple[str, str | None]]:
    """Keys with the text of their values; None for a key without a value."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if "=" in word:
            key, _, text = word.partition("=")
            yield _key(key), text
        elif word.startswith("--"):
            is_switch = _is_switch(name_of(_key(word)))
            has_value = bool(rest) and not rest[0].startswith("--")
            if has_value and not (is_switch and re.match(r"\w+=", rest[0])):
                yield _key(word), rest.pop(0)
            elif is_switch:
                yield _key(word), None
            else:
                raise ConfigError(f"--{_key(word)} has no value; write --{_key(word)} VALUE")
        else:
            hint = "; a configuration file comes first" if word.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"{word!r} is not an override; write key=value or --key value{hint}")


def _key(text: str) -> str:
    return text.removeprefix("--").replace("-", "_")


def _is_switch(name: str) -> bool:
    """Whether a key may come without a value: macft's own that are true or false, and all that are not macft's."""
    field = Settings.model_fields.get(name)
    return field is None or "bool" in str(field.annotation)


def _value(name: str, text: str) -> Any:
    try:
        value, _ = _load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return text
    field = Settings.model_fields.get(name)
    takes_text = field is not None and field.annotation in (str, str | None)
    is_number_or_comment = not isinstance(value, str | list | bool) and text not in ("", "null", "~")
    return text if takes_text and is_number_or_comment else value
