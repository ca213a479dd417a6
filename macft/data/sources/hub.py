"""The name of a data set on a hub in; its data files, downloaded or from the cache, out."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

from macft.data.sources.dataset_info import HubName
from macft.data.sources.hub_choice import CARD, Configs, choose_files, read_configs
from macft.errors import DataError
from macft.hub.modelscope import ModelScopeError, fetch_file, list_files

logger = logging.getLogger("macft")

# where the Hugging Face hub keeps the parquet files that it made of data it could read
_CONVERTED = "refs/convert/parquet"


def hub_files(place: HubName, split: str) -> list[Path]:
    """The files of one split of a data set, in order, from the cache where they are there already.

    $HF_ENDPOINT, $HF_HUB_OFFLINE and $MODELSCOPE_DOMAIN are respected. Raises DataError, in one line, when
    the data set is missing, gated or out of reach, or has no such subset or split.
    """
    return (_modelscope_files if place.hub == "modelscope" else _hf_files)(place, split)


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
    try:
        sizes = list_files("datasets", place.name)
        configs = read_configs(fetch_file("datasets", place.name, CARD, sizes[CARD])) if CARD in sizes else {}
        chosen = choose_files(place, list(sizes), configs, split)
        return [fetch_file("datasets", place.name, name, sizes[name]) for name in chosen]
    except ModelScopeError as error:
        raise DataError(str(error)) from None
