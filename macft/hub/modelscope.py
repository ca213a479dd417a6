"""The name of a model or data set on ModelScope in; its files, downloaded or from the cache, out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast
from urllib.error import URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from macft.errors import MacftError
from macft.files import cache_dir, new_file, write_json

Kind = Literal["datasets", "models"]

_NOUNS = {"datasets": "data set", "models": "model"}
_LISTINGS = {"datasets": "repo/tree", "models": "repo/files"}
_PAGE = 100
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


class ModelScopeError(MacftError):
    """ModelScope has no such thing, or is out of reach."""


def is_offline() -> bool:
    """Whether $HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def folder_of(kind: Kind, name: str) -> Path:
    """Where its files are kept."""
    return cache_dir() / "modelscope" / kind / name


def list_files(kind: Kind, name: str) -> dict[str, int]:
    """Name to size in bytes of each file; offline as the listing was when it was last seen.

    $MODELSCOPE_DOMAIN and $HF_HUB_OFFLINE are respected. Raises ModelScopeError, in one line.
    """
    index = folder_of(kind, name) / ".files.json"
    if not is_offline():
        sizes = _listing(kind, name)
        write_json(index, sizes)
        return sizes
    if not index.is_file():
        what = "data" if kind == "datasets" else "models"
        raise ModelScopeError(
            f"{name}: not in the cache of ModelScope {what}, and HF_HUB_OFFLINE is set; "
            "unset it once to download, or give a file"
        )
    known: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))
    return known


def fetch_file(kind: Kind, name: str, file_name: str, size: int) -> Path:
    """One file, downloaded unless it is there with its size; whole or absent. Raises ModelScopeError, in one line."""
    path = folder_of(kind, name) / file_name
    if path.is_file() and path.stat().st_size == size:
        return path
    if is_offline():
        raise ModelScopeError(
            f"{name}: {file_name} is not in the cache, and HF_HUB_OFFLINE is set; unset it once to download"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    address = _address(kind, name, "repo", Source="SDK", Revision="master", FilePath=file_name)
    with new_file(path) as temporary, _answer(kind, name, address) as answer, temporary.open("wb") as file:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
        if size and file.tell() != size:
            raise ModelScopeError(f"{name}: {file_name} came with {file.tell()} bytes of {size}; try again")
    return path


def _address(kind: Kind, name: str, path: str, **query: str | int) -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    root = domain if "://" in domain else f"https://{domain}"
    return f"{root.rstrip('/')}/api/v1/{kind}/{quote(name)}/{path}?{urlencode(query)}"


def _listing(kind: Kind, name: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    page = 1
    while True:
        # models come in one page and ignore the numbers
        query: dict[str, str | int] = {"Revision": "master", "Recursive": "True", "Root": "/" * (kind == "datasets")}
        address = _address(kind, name, _LISTINGS[kind], **query, PageNumber=page, PageSize=_PAGE)
        with _answer(kind, name, address) as answer:
            value: Any = json.load(answer)
        files = ((value.get("Data") or {}).get("Files") or []) if isinstance(value, dict) else []
        for file in files:
            path = PurePosixPath(str(file.get("Path", "")))
            if file.get("Type") == "blob" and not path.is_absolute() and ".." not in path.parts:
                sizes[str(path)] = int(file.get("Size") or 0)
        if kind == "models" or len(files) < _PAGE:
            return sizes
        page += 1


@contextmanager
def _answer(kind: Kind, name: str, address: str) -> Iterator[IO[bytes]]:
    request = Request(address, headers={"User-Agent": "macft"})
    try:
        with urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            yield cast(IO[bytes], answer)
    except (URLError, OSError, json.JSONDecodeError) as error:
        host = address.split("/api/")[0]
        if getattr(error, "code", None) == 404:
            raise ModelScopeError(f"{name}: no such {_NOUNS[kind]} or file on {host}; look up its name there") from None
        reason = getattr(error, "reason", None) or error
        raise ModelScopeError(
            f"{name}: cannot be downloaded from {host} ({reason}); check the network, or give a file"
        ) from None
