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
    entries = _read_yaml(config) if config is not None else {}
    entries.update(parse_overrides(overrides))
    headline = f"{config}: " if config is not None else ""
    entries = _apply_aliases(entries)
    faults = [_unknown(key, entry) for key, entry in entries.items() if key not in Settings.model_fields]
    known = {key: entry for key, entry in entries.items() if key in Settings.model_fields}
    try:
        settings = Settings(**{key: entry.value for key, entry in known.items()})
    except ValidationError as error:
        faults += [_describe(detail, known) for detail in error.errors()]
    else:
        faults += _contradictions(settings)
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(join_faults(f"{headline}{count} in the configuration", faults))
    return settings


def parse_overrides(arguments: Sequence[str]) -> dict[str, Entry]:
    """`key=value`, `--key value` and `--key=value` to entries; values are read as YAML."""
    entries: dict[str, Entry] = {}
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None:
            entries[waiting] = Entry(_yaml_value(argument), "command line")
            waiting = None
        elif "=" in argument:
            key, _, text = argument.partition("=")
            entries[_key(key)] = Entry(_yaml_value(text), "command line")
        elif argument.startswith("--"):
            waiting = _key(argument)
        else:
            raise ConfigError(f"{argument!r} is not an override; write key=value or --key value")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value; write --{waiting} VALUE")
    return entries


def _key(text: str) -> str:
    return text.removeprefix("--").replace("-", "_")


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_yaml(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near[:5])}" if near else ""
        raise ConfigError(f"{path}: no such configuration file{hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{where}: {problem}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{path}: found {found}, wanted keys such as model_name_or_path: ...")
    return {str(key): Entry(value, str(path)) for key, value in content.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key win in silence; here a key written twice is a fault."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_aliases(entries: dict[str, Entry]) -> dict[str, Entry]:
    result: dict[str, Entry] = {}
    ignored = []
    for key, entry in entries.items():
        name = ALIASES.get(key, key)
        if key == "disable_gradient_checkpointing":
            name, entry = "gradient_checkpointing", Entry(not entry.value, entry.origin)
        if key in IGNORED_KEYS:
            ignored.append(f"{key} ({IGNORED_KEYS[key]})")
        elif name in result and name != key:
            raise ConfigError(f"{entry.origin}: {key} and {name} mean the same; keep one")
        else:
            result[name] = entry
    if ignored:
        logger.warning("no effect here: %s", "; ".join(ignored))
    return result


def _unknown(key: str, entry: Entry) -> str:
    near = difflib.get_close_matches(key, [*Settings.model_fields, *ALIASES], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see docs/configuration.md"
    return f"{key} ({entry.origin}): unknown key{hint}"


def _describe(detail: Any, entries: dict[str, Entry]) -> str:
    key = str(detail["loc"][0]) if detail["loc"] else "?"
    if detail["type"] == "missing":
        return f"{key}: missing; {Settings.model_fields[key].description}"
    entry = entries.get(key)
    origin = f" ({entry.origin})" if entry else ""
    wanted = str(detail["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}{origin}: found {detail['input']!r}, wanted {wanted}"


def _contradictions(settings: Settings) -> list[str]:
    checks = [
        (settings.bf16 and settings.fp16, "bf16 and fp16 are both true; keep one"),
        (
            settings.train_on_prompt and settings.mask_history,
            "train_on_prompt and mask_history exclude each other",
        ),
        (settings.eval_dataset and settings.val_size, "eval_dataset and val_size are both set; keep one"),
        (
            settings.eval_strategy in ("steps", "epoch") and not settings.eval_dataset and not settings.val_size,
            f"eval_strategy {settings.eval_strategy} needs eval_dataset or val_size",
        ),
        (
            settings.eval_strategy == "no" and settings.eval_dataset is not None,
            "eval_dataset is set but eval_strategy is no; remove one",
        ),
        (
            settings.eval_steps is not None and settings.eval_strategy not in ("steps", None),
            f"eval_steps has no effect with eval_strategy {settings.eval_strategy}; use steps",
        ),
        (
            settings.finetuning_type == "full" and settings.quantization_bit is not None,
            "finetuning_type full cannot train a quantized base; remove quantization_bit",
        ),
        (
            settings.finetuning_type == "full" and settings.adapter_name_or_path is not None,
            "adapter_name_or_path needs finetuning_type lora",
        ),
        (
            settings.finetuning_type == "full" and (settings.use_dora or settings.use_rslora),
            "use_dora and use_rslora need finetuning_type lora",
        ),
        (
            settings.overwrite_output_dir and settings.resume_from_checkpoint is not False,
            "overwrite_output_dir and resume_from_checkpoint are both set; keep one",
        ),
        (
            settings.max_steps == 0 or settings.max_steps < -1,
            f"max_steps {settings.max_steps}: wanted -1 or above 0",
        ),
    ]
    return [text for is_wrong, text in checks if is_wrong]


def dump_yaml(settings: Settings) -> str:
    """The resolved configuration, as a file that `macft train` reads back."""
    values = settings.model_dump()
    values["lora_alpha"] = settings.alpha
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
