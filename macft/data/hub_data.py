"""The name of a data set on a hub in; its data files, downloaded or from the cache, out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.error import URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from macft.data.dataset_info import HubName
from macft.data.hub_choice import CARD, Configs, choose_files, read_configs
from macft.errors import DataError
from macft.files import cache_dir, new_file, write_json

logger = logging.getLogger("macft")

_PAGE = 100
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
# where the Hugging Face hub keeps the parquet files that it made of data it could read
_CONVERTED = "refs/convert/parquet"


def hub_files(place: HubName, split: str) -> list[Path]:
    """The files of one split of a data set, in order, from the cache where they are there already.

    $HF_ENDPOINT, $HF_HUB_OFFLINE and $MODELSCOPE_DOMAIN are respected. Raises DataError, in one line, when
    the data set is missing, gated or out of reach, or has no such subset or split.
    """
    return (_modelscope_files if place.hub == "modelscope" else _hf_files)(place, split)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


# --- Hugging Face


def _hf_files(place: HubName, split: str) -> list[Path]:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        cached = _hf_snapshot(place)
        if cached is None:
            raise DataError(
                f"{place.name}: not in the hub cache, and HF_HUB_OFFLINE is set; unset it once to download, "
                "or give a file"
            )
        return _hf_cached(place, cached, split)
    try:
        return _hf_download(place, split)
    except DataError:
        raise
    except GatedRepoError:
        raise DataError(
            f"{place.name}: gated; accept its terms on {constants.ENDPOINT}/datasets/{place.name}, "
            "then run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{place.name}: no such data set on {constants.ENDPOINT} (a private one needs: hf auth login), "
            "and no file or entry of that name"
        ) from None
    except Exception as error:  # the library's HTTP client, whose errors these are, is another in each version
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no answer"])[0]
    cached = _hf_snapshot(place)
    if cached is None:
        raise DataError(
            f"{place.name}: cannot be downloaded from {constants.ENDPOINT} ({reason}); check the network, "
            "set HF_ENDPOINT to a mirror, or give a file"
        )
    logger.warning("%s: %s is out of reach (%s); the copy in its cache is read", place.name, constants.ENDPOINT, reason)
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

    # unlike list_repo_files this asks once: that one tries for half a minute where there is no network
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
    folder = cache_dir() / "modelscope" / "datasets" / place.name
    index = folder / ".files.json"
    if _is_offline():
        if not index.is_file():
            raise DataError(
                f"{place.name}: not in the cache of ModelScope data, and HF_HUB_OFFLINE is set; "
                "unset it once to download, or give a file"
            )
        sizes: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))
    else:
        sizes = _modelscope_listing(place)
        write_json(index, sizes)
    configs = read_configs(_modelscope_file(place, folder, CARD, sizes[CARD])) if CARD in sizes else {}
    chosen = choose_files(place, list(sizes), configs, split)
    return [_modelscope_file(place, folder, name, sizes[name]) for name in chosen]


def _modelscope_address(place: HubName, path: str, **query: str | int) -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    root = domain if "://" in domain else f"https://{domain}"
    return f"{root.rstrip('/')}/api/v1/datasets/{quote(place.name)}/{path}?{urlencode(query)}"


def _modelscope_listing(place: HubName) -> dict[str, int]:
    """Name to size in bytes of each file."""
    sizes: dict[str, int] = {}
    page = 1
    while True:
        address = _modelscope_address(
            place, "repo/tree", Revision="master", Recursive="True", Root="/", PageNumber=page, PageSize=_PAGE
        )
        with _modelscope_answer(place, address) as answer:
            value: Any = json.load(answer)
        files = ((value.get("Data") or {}).get("Files") or []) if isinstance(value, dict) else []
        for file in files:
            name = PurePosixPath(str(file.get("Path", "")))
            if file.get("Type") == "blob" and not name.is_absolute() and ".." not in name.parts:
                sizes[str(name)] = int(file.get("Size") or 0)
        if len(files) < _PAGE:
            return sizes
        page += 1


def _modelscope_file(place: HubName, folder: Path, name: str, size: int) -> Path:
    path = folder / name
    if path.is_file() and path.stat().st_size == size:
        return path
    if _is_offline():
        raise DataError(
            f"{place.name}: {name} is not in the cache, and HF_HUB_OFFLINE is set; unset it once to download"
        )
    address = _modelscope_address(place, "repo", Source="SDK", Revision="master", FilePath=name)
    with new_file(path) as temporary, _modelscope_answer(place, address) as answer, temporary.open("wb") as file:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
        if size and file.tell() != size:
            raise DataError(f"{place.name}: {name} came with {file.tell()} bytes of {size}; try again")
    return path


@contextmanager
def _modelscope_answer(place: HubName, address: str) -> Iterator[IO[bytes]]:
    request = Request(address, headers={"User-Agent": "macft"})
    try:
        with urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            yield cast(IO[bytes], answer)
    except (URLError, OSError, json.JSONDecodeError) as error:
        host = address.split("/api/")[0]
        code = getattr(error, "code", None)
        if code == 404:
            raise DataError(f"{place.name}: no such data set or file on {host}; look up its name there") from None
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{place.name}: cannot be downloaded from {host} ({reason}); check the network, or give a file"
        ) from None
