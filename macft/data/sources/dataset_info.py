"""Read LLaMA-Factory's dataset_info.json: where each data set is and how its rows are read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from macft.data.formats.columns import ALPACA, BESIDE, PLAIN, SHAREGPT, SIDES, MessageKeys, RowFormat
from macft.data.formats.lost import RATINGS
from macft.data.notes import Note
from macft.data.sources.rows import DoubleKeyError, kind_of, not_json, parse_json
from macft.data.sources.text import read_text
from macft.errors import DataError, join_problems
from macft.text import plural

FILE_NAME = "dataset_info.json"

_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url")
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", *SIDES, "kto_tag")
_MEDIA = ("images", "videos", "audios")
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}
# key -> the JSON type of its value
_KEYS = {
    **dict.fromkeys((*_HUBS, "file_name", "script_url", "cloud_file_name", "subset", "split", "folder"), "a string"),
    **{"formatting": "a string", "ranking": "a boolean", "num_samples": "a number"},
    **{"columns": "an object", "tags": "an object"},
}
# written by older versions, and read by no version
_FORGOTTEN = {"file_sha1"}
_REFUSED = {
    "script_url": "a loading script is foreign code, which is not run; give file_name or hf_hub_url",
    "cloud_file_name": "files in cloud storage are not read; download the file and give file_name",
}
FORMATTINGS = ("alpaca", "sharegpt", "openai")


@dataclass(frozen=True)
class HubName:
    """A data set on a hub: `hub` is hf or modelscope."""

    hub: str
    name: str
    subset: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class DatasetEntry:
    """One data set of dataset_info.json; `place` is a path or a name on a hub."""

    name: str
    place: Path | HubName
    row_format: RowFormat
    is_ranking: bool
    split: str = "train"
    num_samples: int | None = None


def read_dataset_info(path: Path) -> dict[str, Any]:
    """The entries, unparsed. Raises DataError when the file is not JSON or holds something else."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: {not_json(text, error)}") from None
    except DoubleKeyError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {kind_of(value)}, expected an object with a data set under each name")
    if "builder_name" in value or isinstance(value.get("features"), list):
        raise DataError(
            f"{path}: describes one data set of the datasets library, expected an object of named data sets"
        )
    return value


def parse_entry(path: Path, name: str, value: Any, hub: str, notes: list[Note]) -> DatasetEntry:
    """The entry of one data set; `hub` (hf or modelscope) decides if it names both. Adds to `notes`.

    Raises DataError with all its problems.
    """
    if not isinstance(value, dict):
        raise DataError(f"{path}: {name}: found {kind_of(value)}, expected an object")
    problems: list[str] = []
    for key, found in value.items():
        if key in _KEYS and found is not None and kind_of(found) != _KEYS[key]:
            problems.append(f"{key}: found {kind_of(found)}, expected {_KEYS[key]}")
        elif key not in _KEYS and key not in _FORGOTTEN:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            notes.append(Note(f"{name}: {key} is not used{hint}", str(path)))
    if not problems:
        row_format = _row_format(value, problems)
        place = _place(path, value, hub, problems)
        samples = value.get("num_samples")
        if samples is not None and (samples != int(samples) or samples < 1):
            problems.append(f"num_samples: found {samples}, expected a whole number of at least 1")
    if problems:
        raise DataError(join_problems(f"{path}: {name}: {plural(len(problems), 'problem')}", problems))
    assert place is not None
    count = None if samples is None else int(samples)
    return DatasetEntry(name, place, row_format, bool(value.get("ranking")), value.get("split") or "train", count)


def _place(path: Path, value: dict[str, Any], hub: str, problems: list[str]) -> Path | HubName | None:
    hf, modelscope, openmind = (value.get(key) for key in _HUBS)
    if modelscope and (hub == "modelscope" or not hf):
        return HubName("modelscope", modelscope, value.get("subset"), value.get("folder"))
    if hf:
        return HubName("hf", hf, value.get("subset"), value.get("folder"))
    if openmind:
        problems.append("om_hub_url: the OpenMind hub is not supported; give hf_hub_url, ms_hub_url or file_name")
        return None
    for key, reason in _REFUSED.items():
        if value.get(key):
            problems.append(f"{key}: {reason}")
            return None
    file_name = value.get("file_name")
    if not file_name:
        problems.append("found neither file_name nor hf_hub_url nor ms_hub_url; give one of them")
        return None
    file = Path(str(file_name))
    if file.is_absolute():
        return file
    # links are not resolved: the user may have put one into the folder on purpose
    if Path(os.path.normpath(file)).parts[:1] == (os.pardir,):
        problems.append(
            f"file_name: {file_name} leads out of the data folder {path.parent}; "
            "move the file there, or give its absolute path"
        )
        return None
    return path.parent / file


def _row_format(value: dict[str, Any], problems: list[str]) -> RowFormat:
    formatting = value.get("formatting") or "alpaca"
    if formatting not in FORMATTINGS:
        problems.append(f"formatting: found {formatting!r}, expected one of {', '.join(FORMATTINGS)}")
    is_ranking = bool(value.get("ranking"))
    is_alpaca = formatting == "alpaca"
    given = _strings("columns", value.get("columns"), (*_COLUMNS, *_MEDIA), problems)
    for key in _MEDIA:
        if given.get(key):
            problems.append(f"columns: {key} is mapped; only text is trained on: use a data set without {key}")
    columns = {key: name for key, name in given.items() if name is not None and key in _COLUMNS}
    if value.get("columns") is None:
        defaults = {key: ALPACA[key] for key in ("prompt", "query", "response")}
        columns = defaults if is_alpaca else {"messages": "messages" if formatting == "openai" else "conversations"}
        columns |= BESIDE
    if is_ranking:
        columns = {key: name for key, name in columns.items() if key != "response"}
        if value.get("columns") is None:
            columns |= {side: side for side in SIDES}
    _check_columns(columns, value, problems, is_alpaca=is_alpaca, is_ranking=is_ranking)
    unmapped = {} if value.get("columns") is None else _unmapped(given, columns, is_alpaca=is_alpaca)
    name = {"alpaca": "alpaca", "sharegpt": "ShareGPT", "openai": "OpenAI"}.get(formatting, "")
    naming = None if is_alpaca else _naming(value.get("tags"), PLAIN if formatting == "openai" else SHAREGPT, problems)
    return RowFormat(
        f"{name} preference" if is_ranking else name,
        "alpaca" if is_alpaca else "conversation",
        columns,
        naming,
        alternates=not is_alpaca,
        is_declared=value.get("columns") is not None,
        unmapped=unmapped,
        ignored=(*(key for key in _MEDIA if key in given), *(RATINGS if "kto_tag" in given else ())),
    )


def _check_columns(
    columns: dict[str, str], value: dict[str, Any], problems: list[str], *, is_alpaca: bool, is_ranking: bool
) -> None:
    """Add a problem for each missing column without which no row can be read."""
    if problems:
        return
    expected = list(SIDES) if is_ranking else []
    if is_alpaca:
        if "prompt" not in columns and "query" not in columns:
            problems.append("columns: map neither prompt nor query, so there is no question; add one of them")
    else:
        expected.append("messages")
    missing = [column for column in expected if column not in columns]
    if missing:
        said = ", ".join(f"{key}: {name}" for key, name in columns.items()) or "none"
        kind = "ranking data" if is_ranking else f"formatting {value.get('formatting')}"
        problems.append(
            f"columns: {kind} needs {', '.join(missing)}, found {said}; a column that is not named is not read"
        )
    if not is_ranking and any(side in columns for side in SIDES):
        problems.append('columns: chosen and rejected are mapped, but not "ranking": true; add it')


def _unmapped(given: dict[str, str | None], columns: dict[str, str], *, is_alpaca: bool) -> dict[str, str]:
    """The usual keys that these columns leave out, each with its column."""
    usual = (ALPACA if is_alpaca else {}) | {column: key for column, key in BESIDE.items() if column != "functions"}
    if SIDES[0] in columns:
        usual.pop("response", None)
    unmapped = {key: column for column, key in usual.items() if column not in given and key not in columns.values()}
    return unmapped | ({"functions": "tools"} if "tools" in unmapped else {})


def _naming(tags: dict[str, Any] | None, default: MessageKeys, problems: list[str]) -> MessageKeys:
    if tags is None:
        return default
    given = _strings("tags", tags, ("role_tag", "content_tag", *_TAGS), problems)
    roles = {name: meaning for tag, meaning in _TAGS.items() if (name := given.get(tag)) is not None}
    if default is PLAIN:
        # LLaMA-Factory needs every tag here; here OpenAI's names are the defaults
        roles = {name: meaning for name, meaning in PLAIN.roles.items() if meaning not in roles.values()} | roles
    role, content = (given.get(tag) for tag in ("role_tag", "content_tag"))
    if default is not PLAIN:
        for tag in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if given.get(tag) is None and not any(problem.startswith("tags") for problem in problems):
                problems.append(f"tags: no {tag}; a tag that is not named has no default once tags are given")
    return MessageKeys(role or default.role, content or default.content, roles, is_tagged=True)


def _strings(key: str, value: Any, known: tuple[str, ...], problems: list[str]) -> dict[str, str | None]:
    """The entries of columns or tags, each a name or null."""
    given: dict[str, str | None] = {}
    for name, text in (value or {}).items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            problems.append(f"{key}: {name!r} is unknown; {hint}")
        elif text is not None and not isinstance(text, str):
            problems.append(f"{key}: {name}: found {kind_of(text)}, expected a string")
        else:
            given[name] = text
    return given
