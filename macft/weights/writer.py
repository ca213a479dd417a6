"""Write a complete model folder (shards, index, config, tokenizer, checksums), or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from macft.errors import ModelError, raise_problems
from macft.files import new_dir, write_json, write_text
from macft.weights.folder import INDEX
from macft.weights.model_config import normalize_config
from macft.weights.source import WeightLayout
from macft.weights.tensors.chunks import Chunk, count_broken, iter_chunks, ordered_map, read_chunk
from macft.weights.tensors.disk import HashedFile, check_room, disk_problems
from macft.weights.tensors.lazy import Array, LazyTensor
from macft.weights.tensors.safetensors import DTYPE_CODES, header_bytes, write_safetensors

SUMS = "SHA256SUMS"
TEMPLATE = "chat_template.jinja"

_FORMAT = {"hf": "pt", "mlx": "mlx"}
# copied along with a model; its weights, its config and foreign code are not
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
)
_COPIED = (
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def write_model(
    destination: Path,
    config: dict[str, Any],
    tensors: Sequence[LazyTensor],
    *,
    source_folder: Path,
    layout: WeightLayout,
    template: Path | None = None,
    tokenizer_folder: Path | None = None,
    beside: Mapping[str, Sequence[LazyTensor]] | None = None,
    if_not_finite: str = "the model is broken; download it again",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model folder `destination`, reading the tensors chunk by chunk on all cores.

    Tokenizer (unless `tokenizer_folder` names another), chat template (or the file `template`), generation config and
    license come from `source_folder`;
    `beside` maps names to small files of tensors that do not belong to the model; SHA256SUMS has a line for each
    file. Raises ModelError, with nothing left behind, when the destination exists, when the disk is too full, and
    naming each tensor with numbers that are not finite; `if_not_finite` says what that means.
    """
    if destination.exists():
        raise ModelError(f"{destination}: exists already; name a folder that does not, or remove this one")
    _check_tensors(tensors)
    needed = sum(tensor.nbytes for tensor in tensors)
    with disk_problems(destination, needed):
        check_room({destination: needed})
        with new_dir(destination) as folder:
            sums, broken = _write_shards(folder, tensors, layout, max_shard_bytes)
            raise_problems(f"{destination}: not written: {if_not_finite}", broken)
            for name, more in (beside or {}).items():
                write_safetensors(folder / name, more)
            write_json(folder / "config.json", normalize_config(config))
            _copy_files(tokenizer_folder or source_folder, folder, _TOKENIZER)
            _copy_files(source_folder, folder, _COPIED)
            if template is not None:
                shutil.copyfile(template, folder / TEMPLATE)
            repeat_template(folder)
            _write_sums(folder, sums)


def _check_tensors(tensors: Sequence[LazyTensor]) -> None:
    counts = Counter(tensor.name for tensor in tensors)
    problems = [f"{name} comes {count} times" for name, count in counts.items() if count > 1]
    problems += [f"{t.name} has type {t.dtype}" for t in tensors if t.dtype not in DTYPE_CODES]
    if not tensors:
        problems.append("the list is empty")
    raise_problems("these tensors cannot be written as a model:", problems)


def _write_shards(
    folder: Path, tensors: Sequence[LazyTensor], layout: WeightLayout, max_shard_bytes: int
) -> tuple[dict[str, str], list[str]]:
    """Write the shards, and an index if there are several; the SHA-256 of each file, and what is not finite."""
    shards = _plan_shards(tensors, max_shard_bytes)
    count = len(shards)
    numbered = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = numbered if count > 1 else ["model.safetensors"]
    sums: dict[str, str] = {}
    broken: Counter[str] = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as flusher:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                sums[name] = _write_shard(file, shard, _FORMAT[layout], pool, flusher, broken)
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    sizes = {tensor.name: prod(tensor.shape) for tensor in tensors}
    return sums, [f"{name}: {found} of {sizes[name]} numbers are NaN or infinite" for name, found in broken.items()]


def _plan_shards(tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(
    file: BinaryIO,
    tensors: list[LazyTensor],
    form: str,
    pool: ThreadPoolExecutor,
    flusher: ThreadPoolExecutor,
    broken: Counter[str],
) -> str:
    """Write one file, while other threads prepare its next chunks; returns its SHA-256."""
    hashed = HashedFile(file, flusher)
    hashed.write(header_bytes(tensors, {"format": form}))
    for chunk, (data, count) in ordered_map(iter_chunks(tensors), _bytes_of, pool):
        if count:
            broken[chunk.tensor.name] += count
        hashed.write(data.data)
    return hashed.finish()


def _bytes_of(chunk: Chunk) -> tuple[Array, int]:
    """The bytes of a chunk, and how many of its numbers are not finite."""
    flat = read_chunk(chunk)
    return flat.view(np.uint8), count_broken(flat)


def _copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write SHA256SUMS as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        digest = sums.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {name}\n")
    write_text(folder / SUMS, "".join(lines))


def repeat_template(folder: Path) -> None:
    """Make `chat_template` in tokenizer_config.json that of chat_template.jinja, if there is one.

    transformers prefers the latter; `ollama create` and other readers of model folders know only the former, which
    would be missing, or another: the base's, where an adapter was trained with its own.
    """
    path = folder / TEMPLATE
    if not path.is_file():
        return
    template, settings_path = path.read_text(encoding="utf-8"), folder / "tokenizer_config.json"
    try:
        settings = json.loads(settings_path.read_bytes()) if settings_path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"tokenizer_config.json: not JSON ({error}); download the model again") from None
    if settings.get("chat_template") != template:
        write_json(settings_path, settings | {"chat_template": template})
