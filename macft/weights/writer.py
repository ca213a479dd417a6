"""A list of tensors in; a whole model folder with shards, index, config, tokenizer and checksums out, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from macft.errors import ModelError, join_faults
from macft.files import new_dir, write_json, write_text
from macft.weights.lazy import Array, LazyTensor, read_rows
from macft.weights.model_config import normalise_config
from macft.weights.safetensors_file import DTYPE_CODES
from macft.weights.source import INDEX, Layout

SUMS = "SHA256SUMS"
TEMPLATE = "chat_template.jinja"

_FORMAT = {"hf": "pt", "mlx": "mlx"}
# what travels with a model; its weights, its config and foreign code do not
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_SLAB = 4 << 20  # bytes that a thread makes at a time of a tensor that can be read in parts
_AHEAD = 64 << 20  # bytes made and not yet written, unless a single tensor has more
_FLUSH = 128 << 20  # bytes after which the disk is told to begin
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}  # the bits that NaN and infinity alone have all set


@dataclass(frozen=True)
class _Slab:
    """Rows `start` to `stop` of a tensor; a tensor that cannot be read in parts is one slab."""

    tensor: LazyTensor
    start: int
    stop: int
    nbytes: int


def write_model(
    destination: Path,
    config: dict[str, Any],
    tensors: Sequence[LazyTensor],
    *,
    source_folder: Path,
    layout: Layout,
    template: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model folder `destination`, reading the tensors slab by slab on all cores.

    Tokenizer, chat template (or the file `template`), generation config and licence come from
    `source_folder`; SHA256SUMS has a line for each file. ModelError, with nothing left behind, when the
    destination exists, when the disk has no room, or naming each tensor with numbers that are not finite.
    """
    if destination.exists():
        raise ModelError(f"{destination}: exists already; name a folder that does not, or remove this one")
    _check_tensors(tensors)
    needed = sum(map(_nbytes, tensors))
    with _disk_faults(destination, needed):
        _check_room(destination, needed)
        with new_dir(destination) as folder:
            sums = _write_shards(folder, tensors, layout, max_shard_bytes)
            write_json(folder / "config.json", normalise_config(config))
            _copy_files(source_folder, folder, template)
            _write_sums(folder, sums)


def _nbytes(tensor: LazyTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _check_tensors(tensors: Sequence[LazyTensor]) -> None:
    counts = Counter(tensor.name for tensor in tensors)
    faults = [f"{name} comes {count} times" for name, count in counts.items() if count > 1]
    faults += [f"{t.name} has type {t.dtype}" for t in tensors if t.dtype not in DTYPE_CODES]
    if faults or not tensors:
        raise ModelError(join_faults("these tensors cannot be written as a model:", faults or ["there are none"]))


@contextmanager
def _disk_faults(destination: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{destination}: cannot be written: {error.strerror or error}; {_gigabytes(needed)} are needed, nothing "
            "was left behind"
        ) from None


def _check_room(destination: Path, needed: int) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise ModelError(
            f"{destination}: {_gigabytes(needed)} are needed, the disk has {_gigabytes(free)}; make room or name "
            "another destination"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _write_shards(folder: Path, tensors: Sequence[LazyTensor], layout: Layout, max_shard_bytes: int) -> dict[str, str]:
    """Write the weights and, of several shards, the index; the SHA-256 of each file."""
    shards = _plan_shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    sums: dict[str, str] = {}
    broken: Counter[str] = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as flusher:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                sums[name] = _write_shard(file, shard, _FORMAT[layout], pool, flusher, broken)
    if broken:
        sizes = {tensor.name: prod(tensor.shape) for tensor in tensors}
        faults = [f"{name}: {found} of {sizes[name]} numbers are NaN or infinite" for name, found in broken.items()]
        headline = "nothing was written: the model or an adapter is broken, or its numbers are too large for their type"
        raise ModelError(join_faults(headline, faults))
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(map(_nbytes, tensors))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sums


def _plan_shards(tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _nbytes(tensor) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    return shards


def _write_shard(
    file: BinaryIO,
    tensors: list[LazyTensor],
    form: str,
    pool: ThreadPoolExecutor,
    flusher: ThreadPoolExecutor,
    broken: Counter[str],
) -> str:
    """Write one file while other threads make its next slabs; its SHA-256."""
    header = _header(tensors, form)
    digest = hashlib.sha256(header)
    file.write(header)
    unflushed = 0
    flush: Future[None] | None = None
    for slab, data, count in _made(tensors, pool):
        if count:
            broken[slab.tensor.name] += count
        digest.update(data.data)
        file.write(data.data)
        unflushed += slab.nbytes
        if unflushed >= _FLUSH and (flush is None or flush.done()):
            file.flush()
            # the disk works while the next slabs are made, not after the last
            flush, unflushed = flusher.submit(os.fsync, file.fileno()), 0
    if flush is not None:
        flush.result()
    return digest.hexdigest()


def _header(tensors: list[LazyTensor], form: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": form}}
    offset = 0
    for tensor in tensors:
        end = offset + _nbytes(tensor)
        code = DTYPE_CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _made(tensors: list[LazyTensor], pool: ThreadPoolExecutor) -> Iterator[tuple[_Slab, Array, int]]:
    """(slab, its bytes, how many numbers of it are not finite), in order, a bounded number of bytes ahead."""
    waiting: deque[tuple[_Slab, Future[tuple[Array, int]]]] = deque()
    ahead = 0
    try:
        for slab in _slabs(tensors):
            while waiting and ahead + slab.nbytes > _AHEAD:
                first, future = waiting.popleft()
                yield (first, *future.result())
                ahead -= first.nbytes
            waiting.append((slab, pool.submit(_make, slab)))
            ahead += slab.nbytes
        while waiting:
            first, future = waiting.popleft()
            yield (first, *future.result())
    finally:
        for _, future in waiting:
            future.cancel()


def _slabs(tensors: list[LazyTensor]) -> Iterator[_Slab]:
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if tensor.rows is None or not tensor.shape or not nbytes:
            yield _Slab(tensor, 0, tensor.shape[0] if tensor.shape else 1, nbytes)
            continue
        row = nbytes // tensor.shape[0]
        step = max(1, _SLAB // row)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            yield _Slab(tensor, start, stop, (stop - start) * row)


def _make(slab: _Slab) -> tuple[Array, int]:
    """The bytes of a slab, and how many of its numbers are not finite."""
    tensor = slab.tensor
    whole = tensor.rows is None or slab.nbytes == _nbytes(tensor)
    array = tensor.read() if whole else read_rows(tensor, slab.start, slab.stop)
    rows = tensor.shape[:1] if whole else (slab.stop - slab.start,)
    assert array.dtype == tensor.dtype and array.shape == (*rows, *tensor.shape[1:]), tensor.name
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8), _count_broken(flat)


def _count_broken(flat: Array) -> int:
    """How many numbers are NaN or infinite."""
    mask = _EXPONENTS.get(flat.dtype.name)
    if mask is not None:
        # far quicker than isfinite of 16-bit floats
        bits = flat.view(np.uint16) & np.uint16(mask)
        return int(np.count_nonzero(bits == mask))
    if flat.dtype.kind != "f":
        return 0
    return flat.size - int(np.count_nonzero(np.isfinite(flat)))


def _copy_files(source: Path, folder: Path, template: Path | None) -> None:
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    if template is not None:
        shutil.copyfile(template, folder / TEMPLATE)


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        digest = sums.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {name}\n")
    write_text(folder / SUMS, "".join(lines))
