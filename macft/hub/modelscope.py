"""Download the files of a model or data set from ModelScope into the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from macft.errors import MacftError
from macft.files import cache_dir, new_file, write_json
from macft.system import is_on

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

RepositoryKind = Literal["datasets", "models"]

_NOUNS = {"datasets": "data set", "models": "model"}
_LISTINGS = {"datasets": "repo/tree", "models": "repo/files"}
_PAGE = 100
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


class ModelScopeError(MacftError):
    """ModelScope does not have what was asked for, or cannot be reached."""


def offline_variable() -> str | None:
    """The environment variable that forbids the network, for every hub; None if none does."""
    # huggingface_hub reads fewer spellings of yes, so it is not asked
    return next((name for name in OFFLINE_VARIABLES if is_on(name)), None)


def folder_of(kind: RepositoryKind, name: str) -> Path:
    """Where the files of a model or data set are kept."""
    return cache_dir() / "modelscope" / kind / name


def list_files(kind: RepositoryKind, name: str) -> dict[str, int]:
    """The size in bytes of each file by name; offline, as last listed.

    $MODELSCOPE_DOMAIN and `OFFLINE_VARIABLES` are respected. Raises ModelScopeError, in one line.
    """
    index = folder_of(kind, name) / ".files.json"
    variable = offline_variable()
    if variable is None:
        sizes = _listing(kind, name)
        write_json(index, sizes)
        return sizes
    if not index.is_file():
        what = "data" if kind == "datasets" else "models"
        raise ModelScopeError(
            f"{name}: not in the cache of ModelScope {what}, and {variable} is set; "
            "unset it once to download, or give a file"
        )
    known: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))
    return known


def fetch_file(kind: RepositoryKind, name: str, file_name: str, size: int) -> Path:
    """Download a file, unless the cache has it with this size; whole or absent. Raises ModelScopeError, in one line."""
    path = folder_of(kind, name) / file_name
    if path.is_file() and path.stat().st_size == size:
        return path
    if variable := offline_variable():
        raise ModelScopeError(
            f"{name}: {file_name} is not in the cache, and {variable} is set; unset it once to download"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    query = {"Source": "SDK", "Revision": "master", "FilePath": file_name}
    with new_file(path) as temporary, _get(kind, name, "repo", **query) as answer, temporary.open("wb") as file:
        for chunk in answer.iter_bytes(_CHUNK):
            file.write(chunk)
        if size and file.tell() != size:
            raise ModelScopeError(f"{name}: {file_name} came with {file.tell()} of {size} bytes; try again")
    return path


def _listing(kind: RepositoryKind, name: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    page = 1
    while True:
        # models come in one page and ignore the numbers
        query: dict[str, str | int] = {"Revision": "master", "Recursive": "True", "Root": "/" * (kind == "datasets")}
        with _get(kind, name, _LISTINGS[kind], **query, PageNumber=page, PageSize=_PAGE) as answer:
            answer.read()
            value: Any = answer.json()
        files = ((value.get("Data") or {}).get("Files") or []) if isinstance(value, dict) else []
        for file in files:
            path = PurePosixPath(str(file.get("Path", "")))
            if file.get("Type") == "blob" and not path.is_absolute() and ".." not in path.parts:
                sizes[str(path)] = int(file.get("Size") or 0)
        if kind == "models" or len(files) < _PAGE:
            return sizes
        page += 1


@contextmanager
def _get(kind: RepositoryKind, name: str, path: str, **query: str | int) -> Iterator[Any]:
    """The answer of a path under a model or data set, its body not read yet. Raises ModelScopeError, in one line."""
    import httpx2  # takes 0.1 s, and most runs need nothing from the network

    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    host = (domain if "://" in domain else f"https://{domain}").rstrip("/")
    try:
        with httpx2.stream(
            "GET",
            f"{host}/api/v1/{kind}/{quote(name)}/{path}",
            params=query,
            headers={"User-Agent": "macft", "Accept-Encoding": "identity"},
            timeout=_TIMEOUT_SECONDS,
            follow_redirects=True,
        ) as answer:
            if answer.status_code == httpx2.codes.NOT_FOUND:
                raise ModelScopeError(f"{name}: no such {_NOUNS[kind]} or file on {host}; look up its name there")
            if answer.is_error:
                raise ConnectionError(f"{answer.status_code} {answer.reason_phrase}")
            yield answer
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, json.JSONDecodeError) as error:
        raise ModelScopeError(
            f"{name}: cannot be downloaded from {host} ({str(error) or type(error).__name__}); "
            "check the network, or give a file"
        ) from None
