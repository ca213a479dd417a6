"""A YAML file and `key=value` overrides in, checked `Settings` out; every fault in one message."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from macft.config.checks import contradictions, doubts, without_effect
from macft.config.settings import ALIASES, IGNORED_KEYS, Settings
from macft.errors import ConfigError, join_faults

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class Entry:
    """A value and where the user wrote it."""

    value: Any
    origin: str


def load_settings(config: Path | None, overrides: Sequence[str]) -> Settings:
    """Settings of a run; raises ConfigError listing every unknown key and wrong value."""
    written = _read_yaml(config) if config is not None else {}
    headline = f"{config}: " if config is not None else ""
    faults: list[str] = []
    # each source by itself, so that the command line may override a key by its other name
    entries = _apply_aliases(written, faults) | _apply_aliases(parse_overrides(overrides), faults)
    _drop_ignored(entries)
    faults += [_unknown(key, entry) for key, entry in entries.items() if key not in Settings.model_fields]
    known = {key: entry for key, entry in entries.items() if key in Settings.model_fields}
    settings = _checked_settings(known, faults)
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(join_faults(f"{headline}{count} in the configuration", faults))
    if useless := without_effect(settings):
        logger.warning("no effect here: %s", "; ".join(useless))
    for doubt in doubts(settings):
        logger.warning(doubt)
    return settings


def _checked_settings(entries: dict[str, Entry], faults: list[str]) -> Settings:
    """The settings, whose unsound keys have their defaults; the faults are added to `faults`."""
    values = {key: entry.value for key, entry in entries.items()}
    unsound: set[str] = set()
    try:
        settings = Settings(**values)
    except ValidationError as error:
        # one fault a key: a key of several types gives one error for each of them
        details = {str(detail["loc"][0]): detail for detail in reversed(error.errors())}
        faults += [_describe(detail, entries) for detail in reversed(details.values())]
        unsound = set(details)
        sound = {key: value for key, value in values.items() if key not in unsound}
        settings = Settings(**sound | {key: "" for key in unsound if Settings.model_fields[key].is_required()})
    faults += contradictions(settings, unsound)
    return settings


def parse_overrides(arguments: Sequence[str]) -> dict[str, Entry]:
    """`key=value`, `--key value` and `--key=value` to entries; values are read as YAML."""
    entries: dict[str, Entry] = {}

    def add(key: str, text: str) -> None:
        if key in entries:
            raise ConfigError(f"{key} is there twice on the command line; keep one")
        entries[key] = Entry(_override_value(key, text), "command line")

    waiting: str | None = None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            add(waiting, argument)
            waiting = None
        elif waiting is not None:
            break
        elif "=" in argument:
            key, _, text = argument.partition("=")
            add(_key(key), text)
        elif argument.startswith("--"):
            waiting = _key(argument)
        else:
            hint = "; a configuration file comes first" if argument.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"{argument!r} is not an override; write key=value or --key value{hint}")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value; write --{waiting} VALUE")
    return entries


def _key(text: str) -> str:
    return text.removeprefix("--").replace("-", "_")


def _override_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return text
    field = Settings.model_fields.get(ALIASES.get(key, key))
    takes_text = field is not None and field.annotation in (str, str | None)
    is_number_or_comment = not isinstance(value, str | list | bool) and text not in ("", "null", "~")
    return text if takes_text and is_number_or_comment else value


def _read_yaml(path: Path) -> dict[str, Entry]:
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, wanted a YAML file{_yaml_files_in(path)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file{_yaml_files_in(path.parent)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
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
        raise ConfigError(f"{path}: found {found}, wanted keys such as model_name_or_path: ...")
    return {str(key): Entry(value, str(path)) for key, value in content.items()}


def _yaml_files_in(folder: Path) -> str:
    names = sorted(str(p) for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    return f"; {folder} holds {', '.join(names[:5])}" if names else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key win in silence; here a key written twice is a fault."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                problem = f"the key {key} is there twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_aliases(entries: dict[str, Entry], faults: list[str]) -> dict[str, Entry]:
    """The entries of one source under macft's names."""
    result: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = ALIASES.get(key, key)
        if key == "disable_gradient_checkpointing":
            if not isinstance(entry.value, bool):
                faults.append(f"{key} ({entry.origin}): found {_shown(entry.value)}, wanted true or false")
                continue
            name, entry = "gradient_checkpointing", Entry(not entry.value, entry.origin)
        if name in result:
            first = next(other for other in entries if other != key and _name_of(other) == name)
            faults.append(f"{key} ({entry.origin}): means the same as {first}; keep one")
        result[name] = entry
    return result


def _name_of(key: str) -> str:
    return "gradient_checkpointing" if key == "disable_gradient_checkpointing" else ALIASES.get(key, key)


def _drop_ignored(entries: dict[str, Entry]) -> None:
    ignored = [key for key in entries if key in IGNORED_KEYS]
    for key in ignored:
        del entries[key]
    if ignored:
        logger.warning("no effect here: %s", "; ".join(f"{key} ({IGNORED_KEYS[key]})" for key in ignored))


def _unknown(key: str, entry: Entry) -> str:
    near = difflib.get_close_matches(key, [*Settings.model_fields, *ALIASES], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see docs/configuration.md"
    return f"{key} ({entry.origin}): unknown key{hint}"


# kinds of pydantic errors -> what is wanted, in a user's words
_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (a number or a date in quotes)",
}


def _describe(detail: Any, entries: dict[str, Entry]) -> str:
    key = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{key}: missing; {Settings.model_fields[key].description}"
    wanted = _WANTED.get(detail["type"]) or str(detail["msg"]).removeprefix("Input should be ")
    if key == "resume_from_checkpoint":
        wanted = "true, false or the path of a checkpoint"
    return f"{key} ({entries[key].origin}): found {_shown(detail['input'])}, wanted {wanted}"


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str | int | float | list | dict) else str(value)


def dump_yaml(settings: Settings) -> str:
    """The resolved configuration, as a file that `macft train` reads back."""
    values = settings.model_dump()
    if settings.finetuning_type == "lora":
        values["lora_alpha"] = settings.alpha
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
