"""A model as fields and lazy tensors in; one GGUF file for each expected quantization out, all of them or none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
from gguf import GGML_QUANT_VERSION
from gguf import GGMLQuantizationType as Kind

from macft.errors import ModelError, UsageError, join_problems
from macft.files import new_file, new_parents, sync_file
from macft.gguf.writing.header import header_bytes, padding, tensor_bytes
from macft.gguf.writing.mixes import file_order
from macft.gguf.writing.model import Field, GgufModel
from macft.gguf.writing.progress import watched
from macft.gguf.writing.quantize import PLAIN, QUANTS, Plan, check_packable, count_overflow, pack, plan_types, row_bytes
from macft.weights.tensors.chunks import CHUNK_BYTES, Chunk, count_broken, iter_chunks, ordered_map, read_chunk
from macft.weights.tensors.disk import HashedFile, check_room, disk_problems
from macft.weights.tensors.lazy import Array, LazyTensor

_LONGEST_NAME = 63  # bytes; llama.cpp refuses more
_MOST_AXES = 4


@dataclass(frozen=True)
class Written:
    """A file that was written; `kinds` are its tensors of each type, `fallbacks` as in `Plan`."""

    path: Path
    quant: str
    nbytes: int
    sha256: str
    fallbacks: tuple[str, ...]
    kinds: dict[str, int]


def write_gguf(
    model: GgufModel,
    outputs: Mapping[str, Path],
    *,
    if_not_finite: str = "the model is broken; download it again",
) -> list[Written]:
    """Write a file for each quantization (`outputs`: its name to a path), reading every tensor once, on all cores.

    Tensors stand in the order of llama.cpp's quantizer, and `general.quantization_version` and
    `general.file_type` last, so that the file is the one it would write. ModelError, with nothing left behind,
    when a disk has no room, or naming each tensor with numbers that are not finite
    (`if_not_finite` is what that means) or too large for their type. UsageError for an unknown
    quantization or a path that exists.
    """
    _check_outputs(outputs)
    _check_tensors(model.tensors)
    tensors = sorted(model.tensors, key=lambda tensor: file_order(tensor.name))
    targets = [_target(model, tensors, quant, path) for quant, path in outputs.items()]
    check_packable({kind for target in targets for kind in target.plan.types.values()})
    needed = sum(target.nbytes for target in targets)
    with disk_problems(_names(outputs), needed), new_parents(outputs.values()):
        check_room({target.path: target.nbytes for target in targets})
        with _new_files([target.path for target in targets]) as temporaries:
            sums, problems = _write(tensors, targets, temporaries)
            if problems.not_finite:
                raise ModelError(join_problems(f"{_names(outputs)}: not written: {if_not_finite}", problems.not_finite))
            if problems.too_large:
                advice = "choose bf16 or f32 instead"
                raise ModelError(join_problems(f"{_names(outputs)}: not written: {advice}", problems.too_large))
    return [_written(target, digest) for target, digest in zip(targets, sums, strict=True)]


@dataclass(frozen=True)
class _Target:
    """One file that is to be written."""

    path: Path
    quant: str
    plan: Plan
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class _Problems:
    not_finite: list[str]
    too_large: list[str]


def _names(outputs: Mapping[str, Path]) -> str:
    return ", ".join(map(str, outputs.values()))


def _check_outputs(outputs: Mapping[str, Path]) -> None:
    problems = [
        f"{quant}: no such quantization (accepted: {', '.join(QUANTS)})" for quant in outputs if quant not in QUANTS
    ]
    counts = Counter(path.absolute() for path in outputs.values())
    problems += [f"{path} is named for {count} quantizations" for path, count in counts.items() if count > 1]
    if problems or not outputs:
        raise UsageError(join_problems("these files cannot be written:", problems or ["none is named"]))
    existing = [str(path) for path in outputs.values() if path.exists() or path.is_symlink()]
    if existing:
        raise UsageError(f"{', '.join(existing)}: exists already; name a file that does not, or remove this one")


def _check_tensors(tensors: Sequence[LazyTensor]) -> None:
    counts = Counter(tensor.name for tensor in tensors)
    problems = [f"{name} comes {count} times" for name, count in counts.items() if count > 1]
    problems += [f"{t.name} has type {t.dtype}" for t in tensors if t.dtype not in PLAIN.values()]
    problems += [
        f"{t.name} has shape {list(t.shape)}" for t in tensors if not 1 <= len(t.shape) <= _MOST_AXES or 0 in t.shape
    ]
    problems += [f"{name}: longer than {_LONGEST_NAME} bytes" for name in counts if len(name.encode()) > _LONGEST_NAME]
    if problems or not tensors:
        raise ModelError(join_problems("these tensors cannot be written as GGUF:", problems or ["there are none"]))


def _target(model: GgufModel, tensors: Sequence[LazyTensor], quant: str, path: Path) -> _Target:
    plan = plan_types(model, quant)
    last: dict[str, Field] = {
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": QUANTS[quant].file_type,
    }
    fields = {key: value for key, value in model.fields.items() if key not in last} | last
    infos = [(tensor.name, tensor.shape, plan.types[tensor.name]) for tensor in tensors]
    header = header_bytes(fields, infos)
    sizes = (tensor_bytes(kind, shape) for _, shape, kind in infos)
    return _Target(path, quant, plan, header, len(header) + sum(size + padding(size) for size in sizes))


def _written(target: _Target, digest: str) -> Written:
    kinds = Counter(str(kind.name) for kind in target.plan.types.values())
    return Written(target.path, target.quant, target.nbytes, digest, target.plan.fallbacks, dict(kinds))


@contextmanager
def _new_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`new_file` for several: when one cannot become whole, none does."""
    identities: dict[Path, int] = {}
    try:
        with ExitStack() as stack:
            temporaries = [stack.enter_context(new_file(path)) for path in paths]
            yield temporaries
            for path, temporary in zip(paths, temporaries, strict=True):
                # what a full disk still refuses, it refuses here, before the first is renamed
                sync_file(temporary)
                identities[path] = temporary.stat().st_ino
    except BaseException:
        for path, identity in identities.items():
            if path.exists() and path.stat().st_ino == identity:
                path.unlink()
        raise


def _write(
    tensors: Sequence[LazyTensor], targets: Sequence[_Target], temporaries: Sequence[Path]
) -> tuple[list[str], _Problems]:
    """Write all files side by side; their SHA-256, and what is wrong with the numbers."""
    broken: Counter[str] = Counter()
    overflowing: Counter[tuple[str, Kind]] = Counter()

    def make(piece: _Piece) -> _Packed:
        return _pack_piece(piece, {target.plan.types[piece.name] for target in targets})

    total = sum(tensor.nbytes for tensor in tensors)
    label = f"writing {', '.join(target.path.name for target in targets)}"
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in temporaries]
        advance: Callable[[int], None] = stack.enter_context(watched(total, label))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        files = [HashedFile(file, flusher) for file in opened]
        for file, target in zip(files, targets, strict=True):
            file.write(target.header)
        for piece, packed in ordered_map(_pieces(tensors), make, pool):
            broken[piece.name] += packed.broken
            overflowing.update({(piece.name, kind): count for kind, count in packed.overflowing.items()})
            for file, target in zip(files, targets, strict=True):
                kind = target.plan.types[piece.name]
                file.write(packed.content[kind].reshape(-1).data)
                if piece.is_last:
                    file.write(bytes(padding(tensor_bytes(kind, piece.chunk.tensor.shape))))
            advance(piece.nbytes)
        sums = [file.finish() for file in files]
    return sums, _problems(tensors, broken, overflowing)


def _problems(tensors: Sequence[LazyTensor], broken: Counter[str], overflowing: Counter[tuple[str, Kind]]) -> _Problems:
    sizes = {tensor.name: prod(tensor.shape) for tensor in tensors}
    return _Problems(
        [f"{name}: {count} of {sizes[name]} numbers are NaN or infinite" for name, count in broken.items() if count],
        [f"{name}: holds numbers that are too large for {kind.name}" for (name, kind), n in overflowing.items() if n],
    )


# --- pieces: what one thread packs at a time


class _Once:
    """A chunk that the first of its pieces reads, for all of them."""

    def __init__(self, chunk: Chunk) -> None:
        self._slab = chunk
        self._lock = Lock()
        self._rows: Array | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows [n, columns] of the chunk, all axes but the last taken together."""
        with self._lock:
            if self._rows is None:
                self._rows = read_chunk(self._slab).reshape(-1, self._slab.tensor.shape[-1])
        return self._rows[start:stop]


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `stop` of a chunk; a tensor that cannot be read in parts is packed by many threads so."""

    chunk: Chunk
    source: _Once
    start: int
    stop: int
    nbytes: int
    is_last: bool

    @property
    def name(self) -> str:
        return self.chunk.tensor.name


@dataclass(frozen=True)
class _Packed:
    content: dict[Kind, Array]
    broken: int
    overflowing: dict[Kind, int]


def _pieces(tensors: Sequence[LazyTensor]) -> Iterator[_Piece]:
    for chunk in iter_chunks(tensors):
        row = chunk.tensor.shape[-1] * chunk.tensor.dtype.itemsize
        count = chunk.nbytes // row
        step = max(1, CHUNK_BYTES // row)
        source = _Once(chunk)
        ends_tensor = chunk.stop == chunk.tensor.shape[0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield _Piece(chunk, source, start, stop, (stop - start) * row, ends_tensor and stop == count)


def _pack_piece(piece: _Piece, kinds: set[Kind]) -> _Packed:
    """The bytes of a piece in each of the types, and how many numbers it has that are not finite or too large."""
    rows = piece.source.rows(piece.start, piece.stop)
    broken = count_broken(rows.reshape(-1))
    if broken:
        # no file comes of it, and quantizers are not made for such numbers
        empty = {kind: np.zeros((len(rows), row_bytes(kind, rows.shape[1])), np.uint8) for kind in kinds}
        return _Packed(empty, broken, {})
    content: dict[Kind, Array] = {}
    overflowing: dict[Kind, int] = {}
    floats: Array | None = None
    for kind in kinds:
        if PLAIN.get(kind) == rows.dtype:
            content[kind] = rows.view(np.uint8)
            continue
        if floats is None:
            floats = rows.astype(np.float32, copy=False)
        content[kind] = pack(kind, floats)
        overflowing[kind] = count_overflow(kind, content[kind])
    return _Packed(content, 0, overflowing)
