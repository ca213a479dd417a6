"""Download the files of a data set on a hub, and choose those of one subset and split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from macft.data.notes import Note
from macft.data.sources.dataset_info import HubName
from macft.data.sources.rows import SUFFIXES
from macft.data.sources.text import kind
from macft.errors import DataError
from macft.hub.modelscope import ModelScopeError, fetch_file, list_files, offline_variable

CARD = "README.md"
# subset to split to patterns of file names
Configs = dict[str, dict[str, list[str]]]

# files that describe data; and the spellings of split names
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# where the Hugging Face hub keeps its parquet conversions of data sets
_CONVERTED = "refs/convert/parquet"


def hub_files(place: HubName, split: str, notes: list[Note]) -> list[Path]:
    """The files of one split of a data set, in order, downloaded unless they are cached. Adds to `notes`.

    $HF_ENDPOINT, $HF_HUB_OFFLINE and $MODELSCOPE_DOMAIN are respected. Raises DataError when the data set is
    missing, gated or out of reach, or has no such subset or split.
    """
    return _modelscope_files(place, split) if place.hub == "modelscope" else _hf_files(place, split, notes)


# --- Hugging Face


def _hf_files(place: HubName, split: str, notes: list[Note]) -> list[Path]:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if variable := offline_variable():
        cached = _hf_snapshot(place)
        if cached is None:
            raise DataError(
                f"{place.name}: not in the hub cache, and {variable} is set; unset it once to download, or give a file"
            )
        return _hf_cached(place, cached, split)
    try:
        return _hf_download(place, split)
    except DataError:
        raise
    except GatedRepoError:
        raise DataError(
            f"{place.name}: gated; accept its terms at {constants.ENDPOINT}/datasets/{place.name}, "
            "then run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{place.name}: no such data set on {constants.ENDPOINT} (a private one needs: hf auth login), "
            "and no file or entry of that name"
        ) from None
    except Exception as error:  # each version of the library has another HTTP client with its own errors
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no answer"])[0]
    cached = _hf_snapshot(place)
    if cached is None:
        raise DataError(
            f"{place.name}: cannot be downloaded from {constants.ENDPOINT} ({reason}); check the network, "
            "set HF_ENDPOINT to a mirror, or give a file"
        )
    notes.append(Note(f"{place.name}: {constants.ENDPOINT} is out of reach ({reason}); using the cached copy"))
    return _hf_cached(place, cached, split)


def _hf_download(place: HubName, split: str) -> list[Path]:
    from huggingface_hub import hf_hub_download

    names = _hf_names(place)
    configs: Configs = {}
    if CARD in names:
        configs = read_configs(Path(hf_hub_download(place.name, CARD, repo_type="dataset")))
    revision = None
    try:
        chosen = choose_files(place, names, configs, split)
    except DataError as reason:
        chosen, revision = _hf_converted(place, split), _CONVERTED
        if not chosen:
            raise reason from None
    return [Path(hf_hub_download(place.name, name, repo_type="dataset", revision=revision)) for name in chosen]


def _hf_names(place: HubName, revision: str | None = None) -> list[str]:
    from huggingface_hub import HfApi

    # list_repo_files would retry for half a minute without a network
    siblings = HfApi().dataset_info(place.name, revision=revision).siblings or []
    return [str(sibling.rfilename) for sibling in siblings]


def _hf_snapshot(place: HubName) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(place.name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _hf_cached(place: HubName, folder: Path, split: str) -> list[Path]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    configs = read_configs(folder / CARD) if CARD in names else {}
    return [folder / name for name in choose_files(place, names, configs, split)]


def _hf_converted(place: HubName, split: str) -> list[str]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = _hf_names(place, _CONVERTED)
    except HfHubHTTPError:
        return []
    subsets = {PurePosixPath(name).parts[0] for name in names if name.endswith(".parquet")}
    subset = place.subset or ("default" if "default" in subsets else next(iter(subsets)) if len(subsets) == 1 else "")
    return sorted(name for name in names if name.startswith(f"{subset}/{split}/") and name.endswith(".parquet"))


# --- ModelScope


def _modelscope_files(place: HubName, split: str) -> list[Path]:
    try:
        sizes = list_files("datasets", place.name)
        configs = read_configs(fetch_file("datasets", place.name, CARD, sizes[CARD])) if CARD in sizes else {}
        chosen = choose_files(place, list(sizes), configs, split)
        return [fetch_file("datasets", place.name, name, sizes[name]) for name in chosen]
    except ModelScopeError as error:
        raise DataError(str(error)) from None


# --- which files


def read_configs(card: Path) -> Configs:
    """The subsets and splits that a data set's card declares; empty if it declares none."""
    text = card.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"\ufeff?---\r?\n(.*?\n)---", text, flags=re.DOTALL)
    try:
        value = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    configs = value.get("configs") if isinstance(value, dict) else None
    found: Configs = {}
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and "data_files" in config:
            name = "default" if config.get("default") else str(config.get("config_name", "default"))
            found[name] = found[str(config.get("config_name", "default"))] = _patterns(config["data_files"])
    return found


def _patterns(files: Any) -> dict[str, list[str]]:
    if isinstance(files, (str, list)) and not (files and isinstance(files[0], dict)):
        return {"train": [files] if isinstance(files, str) else [str(pattern) for pattern in files]}
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    splits: dict[str, list[str]] = {}
    for item in files:
        path = item.get("path", [])
        splits.setdefault(str(item.get("split", "train")), []).extend([path] if isinstance(path, str) else path)
    return splits


def choose_files(place: HubName, names: Sequence[str], configs: Configs, split: str) -> list[str]:
    """The data files of a subset and split, according to the card, else to their names.

    Raises DataError naming the existing subsets or splits.
    """
    prefix = f"{place.folder.strip('/')}/" if place.folder else ""
    data = [n for n in names if _is_data(n) and n.startswith(prefix)]
    if not data:
        where = f" in {place.folder}" if place.folder else ""
        raise DataError(
            f"{place.name}: no data files{where}, expected {', '.join(SUFFIXES)}; it may hold only a script"
        )
    if configs and not place.folder:
        return _by_card(place, data, configs, split)
    if place.subset:
        inside = [name for name in data if place.subset in re.split(r"[/._-]", name) or f"{place.subset}/" in name]
        if not inside:
            raise DataError(f"{place.name}: no subset {place.subset}; it holds {some(data)}")
        data = inside
    chosen = [name for name in data if _split_of(name, split) == split]
    if not chosen and split == "train":
        chosen = [name for name in data if _split_of(name, split) is None]
    if not chosen:
        raise DataError(f"{place.name}: no split {split}; it holds {some(data)}")
    return _of_one_kind(chosen)


def _by_card(place: HubName, data: list[str], configs: Configs, split: str) -> list[str]:
    subset = place.subset or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
    if subset is None or subset not in configs:
        found = f"no subset {subset}" if subset else "no subset given"
        raise DataError(f"{place.name}: {found}; set subset to one of {', '.join(configs)}")
    splits = configs[subset]
    if split not in splits:
        raise DataError(f"{place.name}: no split {split} in {subset}; set split to one of {', '.join(splits)}")
    chosen = [name for name in data if any(_matches(name, pattern) for pattern in splits[split])]
    if not chosen:
        raise DataError(f"{place.name}: no file matches {', '.join(splits[split])}, which its card gives for {split}")
    return _of_one_kind(chosen)


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    # ** also matches no folder at all
    return any(fnmatchcase(name, one) for one in {pattern, pattern.replace("**/", "")})


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return kind(Path(name)) in SUFFIXES and not hidden and path.name not in _METADATA


def _split_of(name: str, expected: str) -> str | None:
    """The split that a file's name indicates; None if it indicates none."""
    sharded = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}\..*", PurePosixPath(name).name)
    if sharded and (sharded[1] == expected or re.match(r"(?:train|test|validation)_", sharded[1])):
        return sharded[1]
    words = {expected: _SPLITS.get(expected, (expected,))} | _SPLITS
    # the file's own name takes precedence over its folders
    for part in reversed(PurePosixPath(name).parts):
        for split, spellings in words.items():
            if any(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", part.lower()) for word in spellings):
                return split
    return None


def _of_one_kind(names: list[str]) -> list[str]:
    """The names with the most frequent suffix, sorted."""
    [(suffix, _)] = Counter(kind(Path(name)) for name in names).most_common(1)
    return sorted(name for name in names if kind(Path(name)) == suffix)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
