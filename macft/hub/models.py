"""Find or download a model by its hub id (org/name)."""

from __future__ import annotations

from pathlib import Path

from macft.errors import ModelError
from macft.hub.modelscope import ModelScopeError, fetch_file, folder_of, list_files, offline_variable
from macft.system import is_on

MODELSCOPE_VARIABLE = "USE_MODELSCOPE_HUB"  # LLaMA-Factory's name

_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# subfolders and "consolidated" files repeat the weights in layouts of other programs
_IGNORED = ["*/*", "consolidated*"]


def cached_snapshot(name: str) -> Path | None:
    """The cached copy if it has every file that a download would bring; never touches the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, allow_patterns=_MODEL_FILES, ignore_patterns=_IGNORED, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def partial_snapshot(name: str, marker: str) -> Path | None:
    """The folder of a cached copy, perhaps incomplete as other programs leave them, that has the file `marker`."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, marker)
    return Path(found).parent if isinstance(found, str) else None


def download_snapshot(name: str) -> Path:
    """Download safetensors, tokenizer and config files; $HF_ENDPOINT and `OFFLINE_VARIABLES` are respected.

    Raises ModelError, in one line, when the repository is missing, gated or out of reach.
    """
    from huggingface_hub import constants, errors, snapshot_download

    if variable := offline_variable():
        raise ModelError(
            f"{name}: not in the hub cache, and {variable} is set; unset it once to download, or give a folder"
        )
    here = f"and there is no folder {Path(name).absolute()}"
    try:
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES, ignore_patterns=_IGNORED))
    except errors.GatedRepoError:
        raise ModelError(
            f"{name}: gated; accept its terms at {constants.ENDPOINT}/{name}, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such repository on {constants.ENDPOINT} (a private one needs: hf auth login), {here}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise ModelError(
            f"{name}: cannot be downloaded from {constants.ENDPOINT} ({cause[0] if cause else 'no answer'}), "
            f"{here}; check the network, set HF_ENDPOINT to a mirror, or give a folder"
        ) from None


def asks_modelscope(hub: str | None) -> bool:
    """Whether models come from ModelScope: `hub` says so, or, where it is None, $USE_MODELSCOPE_HUB."""
    return is_on(MODELSCOPE_VARIABLE) if hub is None else hub == "modelscope"


def modelscope_snapshot(name: str) -> Path:
    """The folder of a model from ModelScope; files already in the cache are not downloaded again.

    Raises ModelError, in one line, when there is no such model or ModelScope is out of reach.
    """
    from huggingface_hub.utils import filter_repo_objects

    try:
        sizes = list_files("models", name)
        for file in filter_repo_objects(sizes, allow_patterns=_MODEL_FILES, ignore_patterns=_IGNORED):
            fetch_file("models", name, file, sizes[file])
    except ModelScopeError as error:
        raise ModelError(str(error)) from None
    return folder_of("models", name)
