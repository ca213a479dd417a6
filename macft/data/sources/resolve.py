"""Find the files of the data sets that a config names, and how their rows are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from macft.data.formats.columns import RowFormat
from macft.data.notes import Note
from macft.data.sources.dataset_info import FILE_NAME, DatasetEntry, HubName, parse_entry, read_dataset_info
from macft.data.sources.hub import hub_files, some
from macft.data.sources.rows import SUFFIXES
from macft.data.sources.text import kind, nearest_file
from macft.errors import ConfigError, DataError

# LLaMA-Factory's values of dataset_dir for names on a hub, or in a dataset_info.json on a hub
ONLINE = "ONLINE"
_REMOTE = "REMOTE:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SPLIT = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_COMPANIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class DataSource:
    """One data set: files that are read one after the other.

    `row_format` None: inferred from each file's first row. `bounds`: a slice of its rows, in numbers or percent.
    """

    name: str
    files: tuple[Path, ...]
    row_format: RowFormat | None = None
    is_ranking: bool | None = None  # None: inferred from the first row
    num_samples: int | None = None
    bounds: tuple[str | None, str | None] | None = None


@dataclass(frozen=True)
class ResolvedSources:
    """The data sets that were found, the problems with the others, and notes."""

    sources: tuple[DataSource, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of all their files, each once."""
        return tuple(dict.fromkeys(str(path) for source in self.sources for path in source.files))

    def check(self) -> None:
        """Raise DataError with the problems."""
        if self.problems:
            raise DataError("\n".join(self.problems))


def resolve_sources(dataset: str, dataset_dir: str, hub: str = "hf") -> ResolvedSources:
    """Find the data sets of a comma-separated list.

    A name is an entry of dataset_info.json, a path, a pattern of paths, or a data set on a hub (`hub`: hf or
    modelscope), which is downloaded.
    """
    names = [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"dataset: found {dataset!r}, expected the path of a data file or a name in {FILE_NAME}")
    sources: list[DataSource] = []
    problems: list[str] = []
    notes: list[Note] = []
    entries: dict[str, Any] = {}
    info = Path(dataset_dir) / FILE_NAME
    try:
        info, entries = _entries(dataset_dir)
    except DataError as error:
        # files given by their paths need no dataset_info.json
        if not all(Path(name).expanduser().is_file() for name in names):
            raise error from None
    for name in names:
        try:
            sources.append(_source(name, dataset_dir, info, entries, hub, notes))
        except DataError as error:
            problems.append(str(error))
    return ResolvedSources(tuple(sources), tuple(problems), tuple(notes))


def _entries(dataset_dir: str) -> tuple[Path, dict[str, Any]]:
    if dataset_dir == ONLINE:
        return Path(FILE_NAME), {}
    if dataset_dir.startswith(_REMOTE):
        path = _remote_info(dataset_dir.removeprefix(_REMOTE))
    else:
        path = Path(dataset_dir) / FILE_NAME
        if not path.is_file():
            return path, {}
    return path, read_dataset_info(path)


def _remote_info(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, FILE_NAME, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"dataset_dir: {FILE_NAME} of {repository} cannot be downloaded ({reason})") from None


def _source(
    name: str, dataset_dir: str, info: Path, entries: dict[str, Any], hub: str, notes: list[Note]
) -> DataSource:
    if name in entries:
        return _from_entry(info, parse_entry(info, name, entries[name], hub, notes), notes)
    if dataset_dir == ONLINE:
        return DataSource(name, tuple(hub_files(HubName(hub, name), "train", notes)))
    if has_magic(name) and not Path(name).is_file():
        return DataSource(name, _matches(name, Path(dataset_dir)))
    try:
        return DataSource(name, (_file(name, Path(dataset_dir), info, list(entries)),))
    except DataError:
        if not (_HUB_ID.fullmatch(name) and kind(Path(name)) not in SUFFIXES) or Path(name).parent.is_dir():
            raise
    return DataSource(name, tuple(hub_files(HubName(hub, name), "train", notes)))


def _from_entry(info: Path, entry: DatasetEntry, notes: list[Note]) -> DataSource:
    parts = _SPLIT.fullmatch(entry.split)
    if parts is None:
        raise DataError(
            f"{info}: {entry.name}: split: found {entry.split!r}, expected a name, or one like train[:1000]"
        )
    split, start, stop = parts.groups()
    bounds = (start, stop) if start is not None or stop is not None else None
    if isinstance(entry.place, HubName):
        files = tuple(hub_files(entry.place, split, notes))
    elif split != "train":
        raise DataError(f"{info}: {entry.name}: split: a local file has only the split train, found {split}; remove it")
    else:
        files = _local_files(info, entry.name, entry.place)
    return DataSource(entry.name, files, entry.row_format, entry.is_ranking, entry.num_samples, bounds)


def _local_files(info: Path, name: str, place: Path) -> tuple[Path, ...]:
    if place.is_file():
        return (place,)
    if not place.is_dir():
        raise DataError(f"{info}: {name}: file_name: no file {place}{nearest_file(place)}")
    # the datasets library saves descriptions beside the data
    inside = sorted(p for p in place.iterdir() if p.is_file() and p.name[0] != "." and p.name not in _COMPANIONS)
    kinds = sorted({kind(path) for path in inside})
    if len(kinds) != 1 or kinds[0] not in SUFFIXES:
        found = ", ".join(kinds) or "no file"
        raise DataError(f"{info}: {name}: file_name: the folder {place} holds {found}, expected data files of one kind")
    return tuple(inside)


def _matches(pattern: str, folder: Path) -> tuple[Path, ...]:
    for root in (Path(), folder):
        # Path.glob refuses patterns that are absolute
        found = sorted(Path(path) for path in glob(str(root / pattern), recursive=True))  # noqa: PTH207
        files = tuple(path for path in found if path.is_file())
        if files:
            return files
    raise DataError(f"{pattern}: no file matches in {Path.cwd()} or in {folder}")


def _file(name: str, folder: Path, info: Path, entries: Sequence[str]) -> Path:
    path = Path(name).expanduser()
    suffixes = SUFFIXES if kind(path) not in SUFFIXES else ()
    if path.is_dir():
        raise DataError(f"{name}: a folder, expected a data file; name one, or several as {path / '*.jsonl'}")
    looked = [path, folder / name, *(folder / f"{name}{suffix}" for suffix in suffixes)]
    for candidate in looked:
        if candidate.is_file():
            return candidate
    near = get_close_matches(name, entries, n=1)
    # a name without a suffix probably belongs to dataset_info.json
    if near or (entries and suffixes):
        known = f"did you mean {near[0]}?" if near else f"it holds {some(entries)}"
        raise DataError(f"{name}: not in {info}, and no file of that name; {known}")
    hint = next(filter(None, map(nearest_file, looked)), "")
    unique = list(dict.fromkeys(map(str, looked)))
    if suffixes:
        unique = [*unique[:2], f"{folder / name}.jsonl and other suffixes"]
    if suffixes and not info.parent.is_dir() and not hint:
        hint = f"; dataset_dir {folder} does not exist there"
    raise DataError(f"{name}: no such data file; looked for {', '.join(unique)} in {Path.cwd()}{hint}")
