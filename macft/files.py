"""Write files that are either complete or absent: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

StrPath = str | os.PathLike[str]

_LEFTOVER = re.compile(r"\..+\.\d+(\.old)?\.tmp")


def cache_dir() -> Path:
    """Where caches live: `$MACFT_CACHE`, by default `~/.cache/macft`."""
    return Path(os.environ.get("MACFT_CACHE") or Path.home() / ".cache" / "macft")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, indented, with Chinese left readable."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and the folders below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let only one process at a time into the block, per `path`; the others wait."""
    with path.open("w") as file:
        if sys.platform == "win32":
            import msvcrt

            # it gives up after ten attempts, a second apart
            while True:
                with suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_dir(path: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut."""
    if sys.platform == "win32":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush one file that another library wrote."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there becomes `path` when the block ends well and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well and vanishes otherwise.

    An older `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    older = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_dir(temporary)
        if path.exists():
            path.replace(older)
        temporary.replace(path)
        sync_dir(path.parent)
    finally:
        if older.exists() and not path.exists():
            older.replace(path)
        for folder in (temporary, older):
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left behind of `new_file` and `new_dir`, in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def new_parents(paths: Iterable[Path]) -> Iterator[None]:
    """Remove the folders above `paths` that the block created, if it fails and they are empty."""
    parents = dict.fromkeys(parent for path in paths for parent in path.absolute().parents)
    missing = [parent for parent in parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                parent.rmdir()
        raise
