"""Load a YAML file and overrides into checked `Settings`, or list every problem in one message."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from macft.config import mlx_lm
from macft.config.checks import contradictions, doubts, without_effect
from macft.config.names import ALIASES, NO_EFFECT, REFUSED, REFUSED_VALUES, UnsupportedKey, judge
from macft.config.parse import ConfigEntry, parse_overrides, read_yaml
from macft.config.settings import Settings
from macft.config.translate import TRANSLATIONS, own_name, shown, to_own_names
from macft.errors import ConfigError, join_problems
from macft.files import StrPath
from macft.hub.models import MODELSCOPE_VARIABLE, asks_modelscope
from macft.text import plural

logger = logging.getLogger("macft")

_LONGEST_VALUE = 40  # characters of a value in a message


@dataclass
class LoadedConfig:
    """The settings of a run, where each was written, and notes and warnings about them."""

    settings: Settings
    entries: dict[str, ConfigEntry]
    unused: dict[str, str] = field(default_factory=dict)  # keys without effect -> why
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load_config(path: StrPath | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Settings:
    """Read a YAML file and overrides into checked settings.

    `overrides` is a mapping of keys to values, or words as on the command line: `["max_steps=2"]`. Without `path` they
    are the whole configuration. What has no effect is logged under the name `macft`.
    Raises ConfigError, which lists every unknown key and wrong value.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items()]
    loaded = load(Path(path) if path is not None else None, overrides)
    for note in loaded.notes:
        logger.info(note)
    if loaded.unused:
        logger.warning("no effect here: %s", "; ".join(f"{key} ({why})" for key, why in loaded.unused.items()))
    for warning in loaded.warnings:
        logger.warning(warning)
    return loaded.settings


def load(config: Path | None, overrides: Sequence[str]) -> LoadedConfig:
    """Like `load_config`, but with the origin of every value; logs nothing."""
    written = read_yaml(config) if config is not None else {}
    given = parse_overrides(overrides, own_name)
    problems: list[str] = []
    notes: list[str] = []
    warnings: list[str] = []
    unsupported_keys: dict[str, UnsupportedKey] = {}
    if mlx_lm.is_mlx_lm(written or given):
        # mlx-lm's own keys on the command line stand for those of the file before anything is translated
        theirs = written | {key: entry for key, entry in given.items() if key in mlx_lm.DEFAULTS or not written}
        translation = mlx_lm.translate(theirs)
        written, given = translation.entries, {key: entry for key, entry in given.items() if key not in theirs}
        problems += translation.problems
        notes += [f"{config or 'command line'}: a configuration of mlx-lm", *translation.notes]
        warnings += translation.warnings
        unsupported_keys = dict(translation.unused)
    # each source by itself, so that the command line may override a key by its other name
    entries = to_own_names(written, problems) | to_own_names(given, problems)
    _complete(entries)
    known: dict[str, ConfigEntry] = {}
    for key, entry in entries.items():
        if key in Settings.model_fields:
            known[key] = entry
        elif (unsupported := _unsupported(key, entry, problems)) is not None:
            unsupported_keys[key] = unsupported
    settings = _checked_settings(known, problems)
    if problems:
        headline = f"{config}: " if config is not None else ""
        raise ConfigError(join_problems(f"{headline}{plural(len(problems), 'problem')} in the configuration", problems))
    unused = {key: unsupported.reason for key, unsupported in unsupported_keys.items()}
    if useless := without_effect(settings):
        warnings.append(f"no effect here: {'; '.join(useless)}")
    if "packing" in known and settings.packing and known["packing"].written != "neat_packing":
        notes.append(
            "packing is block-diagonal: packed examples do not see each other, as with neat_packing of LLaMA-Factory"
        )
    return LoadedConfig(settings, known, unused, notes, [*warnings, *doubts(settings)])


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """macft's names of the keys on a command line."""
    return set(to_own_names(parse_overrides(overrides, own_name), []))


def _complete(entries: dict[str, ConfigEntry]) -> None:
    """Fill in what follows from several keys, or from the environment."""
    if (tracker := entries.pop("use_swanlab", None)) is not None:
        report = entries.get("report_to", ConfigEntry(None, tracker.origin))
        others = [] if report.value in (None, False, "", "none") else report.value
        names = others if isinstance(others, list) else [others]
        if not any("swanlab" in str(name) for name in names):
            entries["report_to"] = ConfigEntry([*names, "swanlab"], tracker.origin, "use_swanlab")
    loss, stage = entries.get("pref_loss"), entries.get("stage")
    name = None if stage is None else stage.value
    if loss is not None and (loss.value, name) in (("nll", None), ("nll", "pt"), ("nll", "sft"), ("kto", "kto")):
        del entries["pref_loss"]  # what these stages train on anyway
    if "hub" not in entries and asks_modelscope(None):
        entries["hub"] = ConfigEntry("modelscope", MODELSCOPE_VARIABLE)


def _unsupported(key: str, entry: ConfigEntry, problems: list[str]) -> UnsupportedKey | None:
    """Why a key that macft does not have has no effect; one that would change the result is a problem."""
    try:
        unsupported = judge(key, entry.value)
    except KeyError:
        problems.append(_unknown(key, entry))
        return None
    if unsupported is not None and unsupported.is_refused:
        value = shown(entry.value)
        what = f": {value}" if len(value) <= _LONGEST_VALUE else ""
        problems.append(f"{key} ({entry.origin}){what} is not supported; {unsupported.reason}")
        return None
    return unsupported


def _unknown(key: str, entry: ConfigEntry) -> str:
    if key in mlx_lm.TABLE or key in mlx_lm.DEFAULTS:
        own, _ = mlx_lm.TABLE.get(key, ("none", ""))
        hint = f" here; write {own}" if own != "none" else " here; remove it"
        return f"{key} ({entry.origin}): a key of mlx-lm, unknown{hint}"
    near = difflib.get_close_matches(key, [*Settings.model_fields, *ALIASES, *TRANSLATIONS, *NO_EFFECT, *REFUSED], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see docs/configuration.md"
    return f"{key} ({entry.origin}): unknown key{hint}"


def _checked_settings(entries: Mapping[str, ConfigEntry], problems: list[str]) -> Settings:
    """The settings, with defaults for invalid keys; what is wrong is added to `problems`."""
    values = {key: entry.value for key, entry in entries.items()}
    invalid: set[str] = set()
    try:
        settings = Settings(**values)
    except ValidationError as error:
        # one problem a key: a key of several types gives one error for each of them
        details = {str(detail["loc"][0]): detail for detail in reversed(error.errors())}
        problems += [_describe(detail, entries) for detail in reversed(details.values())]
        invalid = set(details)
        valid = {key: value for key, value in values.items() if key not in invalid}
        settings = Settings(**valid | {key: "" for key in invalid if Settings.model_fields[key].is_required()})
    problems += contradictions(settings, invalid)
    return settings


# kinds of pydantic errors -> what is expected, in a user's words
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (a number or a date in quotes)",
    "dict_type": "keys with values, such as {name: 1}",
    "list_type": "numbers separated by commas",
}
_COUNTS = ("logging_steps", "save_steps", "eval_steps")


def _describe(detail: Any, entries: Mapping[str, ConfigEntry]) -> str:
    key = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{key}: missing; {Settings.model_fields[key].description}"
    entry = entries[key]
    place = f"{entry.written or key} ({entry.origin})"
    reason = REFUSED_VALUES.get((key, entry.value)) if isinstance(entry.value, str) else None
    if reason is not None:
        return f"{place}: {entry.value} is not supported; {reason}"
    expected = _EXPECTED.get(detail["type"]) or str(detail["msg"]).removeprefix("Input should be ")
    if key == "resume_from_checkpoint":
        expected = "true, false or the path of a checkpoint"
    if key == "enable_thinking" and entry.value is None:
        expected = "true, or false to train the form without thinking"
    if key in _COUNTS and isinstance(entry.value, float) and 0 < entry.value < 1:
        expected = "a whole number of steps, not a share of them"
    return f"{place}: found {shown(detail['input'])}, expected {expected}"


def dump_yaml(settings: Settings) -> str:
    """The resolved configuration, as a file that `macft train` reads back."""
    values = settings.model_dump()
    if settings.finetuning_type == "lora":
        values["lora_alpha"] = settings.alpha
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
