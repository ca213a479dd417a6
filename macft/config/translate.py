"""Translate other programs' keys into macft's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from macft.config.names import ALIASES
from macft.config.parse import ConfigEntry

Setting = tuple[str, Any]  # a key of macft's and its value


class Translation(NamedTuple):
    """What a key means in macft's keys: in words, and as a function that raises ValueError(what is expected)."""

    meaning: str
    function: Callable[[Any], Setting | None]  # None: the key asks for nothing


def own_name(key: str) -> str:
    """macft's name of a key that only has another name, or the key itself."""
    return _NAMES.get(key) or ALIASES.get(key, key)


def to_own_names(entries: Mapping[str, ConfigEntry], problems: list[str]) -> dict[str, ConfigEntry]:
    """The entries of one source under macft's names; two names of one key with different values are a problem."""
    result: dict[str, ConfigEntry] = {}
    first: dict[str, str] = {}
    for key, entry in entries.items():
        try:
            known = TRANSLATIONS.get(key)
            setting = known.function(entry.value) if known else (ALIASES.get(key, key), entry.value)
        except ValueError as error:
            problems.append(f"{key} ({entry.origin}): found {shown(entry.value)}, expected {error}")
            continue
        if setting is None:
            continue
        name, value = setting
        if name in result and result[name].value != value:
            problems.append(f"{key} ({entry.origin}): means the same as {first[name]}; keep one")
        first.setdefault(name, key)
        result[name] = replace(entry, value=value, written=entry.written or (key if key != name else None))
    return result


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str | int | float | list | dict) else str(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _unless_null(function: Callable[[Any], Setting | None]) -> Callable[[Any], Setting | None]:
    return lambda value: None if value is None else function(value)


def _targets(value: Any) -> Setting:
    return "lora_target", "all" if value in ("all-linear", ["all-linear"]) else value


def _warmup(value: Any) -> Setting:
    is_share = isinstance(value, float) and 0 < value < 1
    return ("warmup_ratio" if is_share else "warmup_steps"), value


def _sampling(value: Any) -> Setting:
    settings = {
        "random": ("group_by_length", False),
        "group_by_length": ("group_by_length", True),
        "sequential": ("disable_shuffling", True),
    }
    if value not in settings:
        raise ValueError("random, group_by_length or sequential")
    return settings[value]


def _loss(value: Any) -> Setting:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError("one loss; the chosen answer's own loss is added by pref_ftx")
    return "pref_loss", value


def _bits(bits: int) -> Callable[[Any], Setting | None]:
    return lambda value: ("quantization_bit", bits) if _switch(value) else None


TRANSLATIONS = {
    "disable_gradient_checkpointing": Translation(
        "the opposite of `gradient_checkpointing`", lambda value: ("gradient_checkpointing", not _switch(value))
    ),
    "neat_packing": Translation(
        "`packing: true`, which is always block-diagonal here",
        _unless_null(lambda value: ("packing", True) if _switch(value) else None),
    ),
    "warmup_steps": Translation("below 1: `warmup_ratio`, as in transformers 5", _warmup),
    "lora_target": Translation("`all-linear` is `all`", _targets),
    "lora_target_modules": Translation("`lora_target`", _unless_null(_targets)),
    "target_modules": Translation("`lora_target`", _unless_null(_targets)),
    "use_peft": Translation(
        "`finetuning_type`: true is lora, false is full",
        _unless_null(lambda value: ("finetuning_type", "lora" if _switch(value) else "full")),
    ),
    "load_in_4bit": Translation("`quantization_bit: 4`", _unless_null(_bits(4))),
    "load_in_8bit": Translation("`quantization_bit: 8`", _unless_null(_bits(8))),
    "loss_type": Translation("`pref_loss`; `nll` is what stage `sft` has anyway, `kto` what stage `kto` has", _loss),
    "train_sampling_strategy": Translation(
        "random, group_by_length: `group_by_length`; sequential: `disable_shuffling`", _unless_null(_sampling)
    ),
    "use_swanlab": Translation(
        "`swanlab`, added to `report_to`", _unless_null(lambda value: ("use_swanlab", True) if _switch(value) else None)
    ),
}
# of those that take text; the others are switches
_NAMES = {"lora_target_modules": "lora_target", "target_modules": "lora_target", "loss_type": "pref_loss"}
