"""Define the errors that a user can cause; the command line shows each without a traceback."""

from __future__ import annotations

from pathlib import Path

_TYPED: dict[str, str] = {}  # folder -> the name that the user gave for it


class MacftError(Exception):
    """Something failed; the message names the thing, what was found, what was expected, what to do."""

    exit_code = 1


class UsageError(MacftError):
    """The command line or the configuration asks for something that is not possible."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or override is wrong; lists every problem found."""


class StoppedError(MacftError):
    """The user stopped a run; the message says where it stands and how to continue."""

    exit_code = 130


class DataError(MacftError):
    """A data file is wrong; lists every problem found in it."""


class ModelError(MacftError):
    """A model, tokenizer, template or adapter is missing, damaged or unsupported."""


class MissingPackageError(MacftError):
    """A package that this job needs is not installed; the message holds the command to install it."""


def call_by_name(folder: Path, name: str) -> None:
    """Have messages name what the user typed, a .gguf file for example, not the folder in the cache it stands for."""
    _TYPED[str(folder)] = name


def as_typed(message: str) -> str:
    """The message with the names that the user typed."""
    for folder, name in _TYPED.items():
        message = message.replace(folder, name)
    return message


def join_problems(headline: str, problems: list[str], limit: int = 20) -> str:
    """One message for all problems of one file; past `limit` the rest are counted, not listed."""
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    return "\n".join([headline, *(f"  {problem}" for problem in shown)])


def raise_problems(headline: str, problems: list[str]) -> None:
    """Raise a ModelError that lists all problems under the headline, if there are any."""
    if problems:
        raise ModelError(join_problems(headline, problems))
