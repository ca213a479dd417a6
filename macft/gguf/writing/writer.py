"""Write a model as one GGUF file for each requested quantization, all of them or none."""

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
from gguf import GGML_QUANT_VERSION, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as GgmlType

from macft.errors import ModelError, UsageError, join_problems
from macft.files import new_file, new_parents, sync_file
from macft.gguf.format import PLAIN, Field, GgufModel, header_bytes, padding, tensor_bytes
from macft.gguf.writing import quantize
from macft.gguf.writing.mixes import file_order
from macft.progress import counting_bytes
from macft.weights.tensors.chunks import CHUNK_BYTES, Chunk, count_broken, iter_chunks, ordered_map, read_chunk
from macft.weights.tensors.disk import HashedFile, check_room, disk_problems
from macft.weights.tensors.lazy import Array, LazyTensor

_LONGEST_NAME = 63  # bytes; llama.cpp refuses more
_MOST_AXES = 4


@dataclass(frozen=True)
class Written:
    """A file that was written; `kinds` are its tensors of each type, `fallbacks` as in `QuantizationPlan`."""

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
    name: str | None = None,
    check: Callable[[str, Path], None] | None = None,
) -> list[Written]:
    """Write a file for each quantization (`outputs`: its name to a path), reading every tensor once, on all cores.

    Tensors are in the order of llama.cpp's quantizer, and `general.quantization_version` and
    `general.file_type` come last, so that the file equals what it would write. ModelError, with nothing left behind,
    when a disk has no room, or naming each tensor with numbers that are not finite
    (`if_not_finite` says what that means) or too large for their type. UsageError for an unknown
    quantization or a path that exists. `name` is what errors call the files, by default their paths. `check` gets each
    quantization with the whole file, which has no name yet: what it raises leaves nothing behind either.
    """
    _check_outputs(outputs)
    _check_tensors(model.tensors)
    tensors = sorted(model.tensors, key=lambda tensor: file_order(tensor.name))
    targets = [_target(model, tensors, quant, path) for quant, path in outputs.items()]
    quantize.check_packable({kind for target in targets for kind in target.plan.types.values()})
    needed = sum(target.nbytes for target in targets)
    name = name or ", ".join(map(str, outputs.values()))
    with disk_problems(name, needed), new_parents(outputs.values()):
        check_room({target.path: target.nbytes for target in targets}, name)
        with _new_files([target.path for target in targets]) as temporaries:
            sums, broken, overflowing = _write(tensors, targets, temporaries)
            if broken:
                raise ModelError(join_problems(f"{name}: not written: {if_not_finite}", broken))
            if overflowing:
                raise ModelError(join_problems(f"{name}: not written: choose bf16 or f32 instead", overflowing))
            if check is not None:
                for target, temporary in zip(targets, temporaries, strict=True):
                    check(target.quant, temporary)
    return [_written(target, digest) for target, digest in zip(targets, sums, strict=True)]


@dataclass(frozen=True)
class _Target:
    """One file to write."""

    path: Path
    quant: str
    plan: quantize.QuantizationPlan
    header: bytes
    nbytes: int


def _check_outputs(outputs: Mapping[str, Path]) -> None:
    problems = [
        f"{quant}: unknown quantization (accepted: {', '.join(quantize.QUANTS)})"
        for quant in outputs
        if quant not in quantize.QUANTS
    ]
    counts = Counter(path.absolute() for path in outputs.values())
    problems += [f"{path} is given for {count} quantizations" for path, count in counts.items() if count > 1]
    if problems or not outputs:
        raise UsageError(join_problems("these files cannot be written:", problems or ["none is given"]))
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
    plan = quantize.plan_types(model, quant)
    last: dict[str, Field] = {
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": quantize.QUANTS[quant].file_type,
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
    """`new_file` for several files: when one cannot be completed, none is."""
    identities: dict[Path, int] = {}
    try:
        with ExitStack() as stack:
            temporaries = [stack.enter_context(new_file(path)) for path in paths]
            yield temporaries
            for path, temporary in zip(paths, temporaries, strict=True):
                # a full disk fails here, before the first file is renamed
                sync_file(temporary)
                identities[path] = temporary.stat().st_ino
    except BaseException:
        for path, identity in identities.items():
            if path.exists() and path.stat().st_ino == identity:
                path.unlink()
        raise


def _write(
    tensors: Sequence[LazyTensor], targets: Sequence[_Target], temporaries: Sequence[Path]
) -> tuple[list[str], list[str], list[str]]:
    """Write all files side by side; returns their SHA-256, and lines on tensors not finite and on those too large."""
    broken: Counter[str] = Counter()
    overflowing: Counter[tuple[str, GgmlType]] = Counter()

    def make(piece: _Piece) -> tuple[dict[GgmlType, Array], int, dict[GgmlType, int]]:
        return _packed(piece, {target.plan.types[piece.name] for target in targets})

    total = sum(tensor.nbytes for tensor in tensors)
    label = f"writing {', '.join(target.path.name for target in targets)}"
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in temporaries]
        advance: Callable[[int], None] = stack.enter_context(counting_bytes(total, label))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        files = [HashedFile(file, flusher) for file in opened]
        for file, target in zip(files, targets, strict=True):
            file.write(target.header)
        for piece, (content, num_broken, num_overflowing) in ordered_map(_pieces(tensors), make, pool):
            broken[piece.name] += num_broken
            overflowing.update({(piece.name, kind): count for kind, count in num_overflowing.items()})
            for file, target in zip(files, targets, strict=True):
                kind = target.plan.types[piece.name]
                file.write(content[kind].reshape(-1).data)
                if piece.is_last:
                    file.write(bytes(padding(tensor_bytes(kind, piece.chunk.tensor.shape))))
            advance(piece.nbytes)
        sums = [file.finish() for file in files]
    sizes = {tensor.name: prod(tensor.shape) for tensor in tensors}
    return (
        sums,
        [f"{name}: {count} of {sizes[name]} numbers are NaN or infinite" for name, count in broken.items() if count],
        [f"{name}: holds numbers that are too large for {kind.name}" for (name, kind), n in overflowing.items() if n],
    )


# --- pieces, each packed by one thread


class _SharedChunk:
    """A chunk that is read once, by the first of its pieces."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._lock = Lock()
        self._rows: Array | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows [n, columns] of the chunk, with all axes but the last flattened."""
        with self._lock:
            if self._rows is None:
                self._rows = read_chunk(self._chunk).reshape(-1, self._chunk.tensor.shape[-1])
        return self._rows[start:stop]


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `stop` of a chunk, so that many threads pack a tensor that cannot be read in parts."""

    chunk: Chunk
    source: _SharedChunk
    start: int
    stop: int
    nbytes: int
    is_last: bool

    @property
    def name(self) -> str:
        return self.chunk.tensor.name


def _pieces(tensors: Sequence[LazyTensor]) -> Iterator[_Piece]:
    for chunk in iter_chunks(tensors):
        row = chunk.tensor.shape[-1] * chunk.tensor.dtype.itemsize
        count = chunk.nbytes // row
        step = max(1, CHUNK_BYTES // row)
        source = _SharedChunk(chunk)
        ends_tensor = chunk.stop == chunk.tensor.shape[0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield _Piece(chunk, source, start, stop, (stop - start) * row, ends_tensor and stop == count)


def _packed(piece: _Piece, kinds: set[GgmlType]) -> tuple[dict[GgmlType, Array], int, dict[GgmlType, int]]:
    """(the bytes of a piece in each of the types, how many of its numbers are not finite, how many too large)."""
    rows = piece.source.rows(piece.start, piece.stop)
    broken = count_broken(rows.reshape(-1))
    if broken:
        # no file is written, and quantizers cannot take such numbers
        return {kind: np.zeros(quant_shape_to_byte_shape(rows.shape, kind), np.uint8) for kind in kinds}, broken, {}
    kept = {kind: rows.view(np.uint8) for kind in kinds if PLAIN.get(kind) == rows.dtype}
    floats = rows.astype(np.float32, copy=False) if len(kept) < len(kinds) else rows
    packed = {kind: quantize.pack(kind, floats) for kind in kinds - kept.keys()}
    return kept | packed, 0, {kind: quantize.count_overflow(kind, content) for kind, content in packed.items()}
