"""Plan the type of every tensor of a GGUF file, and pack rows of float32 into the bytes of a type."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as GgmlType

from macft.errors import MissingPackageError, UsageError
from macft.gguf.format import PLAIN, GgufModel
from macft.gguf.writing.mixes import ModelSize, fitting_type, is_always_f32, mixed_types
from macft.weights.tensors.chunks import count_broken
from macft.weights.tensors.lazy import Array

_KINDS = {dtype: kind for kind, dtype in PLAIN.items()}
# where a block keeps its scales: bytes of it that are float16
_SCALES = {
    GgmlType.Q8_0: slice(0, 2),
    GgmlType.Q4_0: slice(0, 2),
    GgmlType.Q5_0: slice(0, 2),
    GgmlType.Q5_1: slice(0, 4),
    GgmlType.Q3_K: slice(108, 110),
    GgmlType.Q4_K: slice(0, 4),
    GgmlType.Q5_K: slice(0, 4),
    GgmlType.Q6_K: slice(208, 210),
}


@dataclass(frozen=True)
class Quant:
    """A kind of file: llama.cpp's number for it, and the type of what no rule of its mix names."""

    file_type: int
    base: GgmlType


QUANTS: dict[str, Quant] = {
    "f32": Quant(0, GgmlType.F32),
    "f16": Quant(1, GgmlType.F16),
    "bf16": Quant(32, GgmlType.BF16),
    "q8_0": Quant(7, GgmlType.Q8_0),
    "q6_k": Quant(18, GgmlType.Q6_K),
    "q5_k_m": Quant(17, GgmlType.Q5_K),
    "q5_k_s": Quant(16, GgmlType.Q5_K),
    "q4_k_m": Quant(15, GgmlType.Q4_K),
    "q4_k_s": Quant(14, GgmlType.Q4_K),
    "q3_k_m": Quant(12, GgmlType.Q3_K),
    "q4_0": Quant(2, GgmlType.Q4_0),
}


@dataclass(frozen=True)
class QuantizationPlan:
    """The type of each tensor by name, and sentences on those whose rows their type's blocks do not divide."""

    types: dict[str, GgmlType]
    fallbacks: tuple[str, ...]


def plan_types(model: GgufModel, quant: str) -> QuantizationPlan:
    """The types that llama.cpp writes: its converter for f32, f16 and bf16, its quantizer for the rest.

    A tensor that is not quantized keeps its type or, where the converter says so, is F32. UsageError names an
    unknown `quant`.
    """
    if quant not in QUANTS:
        raise UsageError(f"{quant}: unknown quantization (accepted: {', '.join(QUANTS)})")
    base = QUANTS[quant].base
    types = {t.name: base if base in PLAIN else _KINDS[t.dtype] for t in model.tensors}
    types |= {t.name: GgmlType.F32 for t in model.tensors if is_always_f32(t.name, t.shape)}
    if base in PLAIN:
        return QuantizationPlan(types, ())
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    mixed = mixed_types(quant, base, shapes, ModelSize.of(model.architecture, model.fields))
    replaced: dict[tuple[GgmlType, GgmlType, int], list[str]] = {}
    for name, kind in mixed.items():
        columns = shapes[name][-1]
        types[name] = fitting_type(kind, columns)
        if types[name] != kind:
            replaced.setdefault((types[name], kind, columns), []).append(name)
    return QuantizationPlan(types, tuple(_fallback(*key, names) for key, names in replaced.items()))


def _fallback(kind: GgmlType, expected: GgmlType, columns: int, names: list[str]) -> str:
    which = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
    return (
        f"{which}: {kind.name} instead of {expected.name}, whose blocks of {GGML_QUANT_SIZES[expected][0]} do not "
        f"divide rows of {columns} numbers"
    )


def pack(kind: GgmlType, rows: Array) -> Array:
    """Finite float32 numbers [n, columns] as bytes [n, row_bytes] of a type, rounded to nearest, ties to even.

    Quantized by ggml itself, without the GIL. Numbers too large for the type become infinite: see `count_overflow`.
    """
    assert rows.dtype == np.float32 and rows.ndim == 2, (rows.dtype, rows.shape)
    dtype = PLAIN.get(kind)
    if dtype is not None:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(rows).astype(dtype, copy=False).view(np.uint8)
    quantize = _quantizer()
    if quantize is not None:
        return quantize(kind, rows)
    check_packable([kind])
    from gguf.quants import quantize as quantize_in_numpy

    packed: Array = quantize_in_numpy(rows, kind)
    return packed


def count_overflow(kind: GgmlType, packed: Array) -> int:
    """How many numbers, or scales of blocks, of `packed` are infinite: too large for the type."""
    if kind in PLAIN:
        return count_broken(packed.reshape(-1).view(PLAIN[kind]))
    scales = packed.reshape(-1, GGML_QUANT_SIZES[kind][1])[:, _SCALES[kind]]
    return count_broken(np.ascontiguousarray(scales).reshape(-1).view(np.float16))


def check_packable(kinds: Iterable[GgmlType]) -> None:
    """MissingPackageError if one of the types needs ggml and it is not installed."""
    if _quantizer() is None and (needed := {kind.name for kind in kinds if kind not in PLAIN} - {"Q8_0"}):
        raise MissingPackageError(
            f"to write {', '.join(sorted(needed))} the package libggml-python is needed: pip install 'macft[export]' "
            "(f32, f16, bf16 and q8_0 do without)"
        )


@cache
def _quantizer() -> Callable[[GgmlType, Array], Array] | None:
    """ggml's quantization of rows, or None where libggml is not installed."""
    path = _library()
    if path is None:
        return None
    try:
        function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise MissingPackageError(
            f"{path}: cannot be used ({error}); pip install --force-reinstall 'macft[export]'"
        ) from None
    function.restype = ctypes.c_size_t
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]

    def quantize(kind: GgmlType, rows: Array) -> Array:
        rows = np.ascontiguousarray(rows)
        count, columns = rows.shape
        packed = np.empty(quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
        # no importance matrix: the last argument
        written = function(int(kind), rows.ctypes.data, packed.ctypes.data, 0, count, columns, None) if count else 0
        assert written == packed.nbytes, (kind.name, rows.shape, written)
        return packed

    return quantize


def _library() -> Path | None:
    """The shared library inside the package libggml, which is not imported: it brings more than is needed."""
    spec = find_spec("libggml")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.so.0", "libggml-base.0.dylib")
        found = [path for name in names for path in sorted(Path(folder).rglob(name))]
        if found:
            return found[0]
    return None
