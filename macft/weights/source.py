"""Open a model folder in HF or MLX layout: check its config and list its tensors without reading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.folder import INDEX, model_files
from macft.weights.model_config import normalize_config, read_config
from macft.weights.quantization.affine import MXFP4, Quantization, dequantize_affine, dequantize_mxfp4, quantization_of
from macft.weights.quantization.foreign import described
from macft.weights.quantization.fp8 import FP8, dequantize_fp8, fp8_of
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows, renamed
from macft.weights.tensors.safetensors import open_safetensors

WeightLayout = Literal["hf", "mlx"]

_PREFIX = "model."
_MODES = ("affine", "mxfp4")


@dataclass(frozen=True)
class Source:
    """A model on disk: `config` (both spellings, without quantization) describes `tensors`.

    `quantized` names the modules that the folder holds quantized; each has one dequantized `X.weight` in `tensors`.
    `is_fp8`: the folder holds matrices in fp8, which are dequantized too.
    """

    folder: Path
    config: dict[str, Any]
    layout: WeightLayout
    tensors: list[LazyTensor]
    quantization: Quantization | None
    quantized: frozenset[str]
    is_fp8: bool = False


def open_model(folder: Path, *, exact: bool = False) -> Source:
    """Open and check a model folder; only the headers of its weights are read.

    Dequantized weights have the type of their scales (mxfp4: bfloat16), as MLX computes with them, or float32
    if `exact`, for a sum that is rounded only once; those held in fp8 have the type that the config names. Names
    of a model saved without its head get the prefix that they lack. Raises ModelError for files that are damaged,
    missing or pickled, for an index that points outside the folder and for quantization that is not read.
    """
    config = normalize_config(read_config(folder))
    refuse_foreign_quantization(folder, config)
    quantization = quantization_of(config)
    tensors: list[LazyTensor] = []
    is_mlx = quantization is not None
    places: dict[str, Path] = {}
    problems: list[str] = []
    paths, index = model_files(folder)
    for path in paths:
        file = open_safetensors(path)
        is_mlx |= file.metadata.get("format") == "mlx"
        for tensor in file.tensors:
            if tensor.name in places:
                problems.append(f"{tensor.name} is in {places[tensor.name].name} and in {path.name}")
            places[tensor.name] = path
        tensors += file.tensors
    problems += [
        f"{name} is missing from {file}, where {INDEX} places it" for name, file in index.items() if name not in places
    ]
    raise_problems(f"{folder}: its weight files contradict each other; download it again", problems)
    quantized: frozenset[str] = frozenset()
    if quantization is not None:
        quantized = frozenset(name.removesuffix(".scales") for name in places if name.endswith(".scales"))
        tensors = _dequantized(folder, quantization, tensors, exact)
    else:
        tensors = _with_prefix(_without_fp8(folder, config, tensors, exact))
    is_fp8 = fp8_of(config) is not None
    if quantization is not None or is_fp8:
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return Source(folder, config, "mlx" if is_mlx else "hf", tensors, quantization, quantized, is_fp8)


def rewritten(folder: Path) -> Source | None:
    """The model as `open_model` gives it (exact), where an engine's own loader would read its folder otherwise.

    That is a model held in fp8, one whose names lack their prefix, and files beside those that count. None where the
    loader can be left to the folder.
    """
    config = read_config(folder)
    paths, _ = model_files(folder)
    is_usual = set(paths) == set(folder.glob("model*.safetensors")) and fp8_of(config) is None
    if is_usual and not _lacks_prefix({tensor.name for path in paths for tensor in open_safetensors(path).tensors}):
        return None
    return open_model(folder, exact=True)


def _lacks_prefix(names: set[str]) -> bool:
    return "embed_tokens.weight" in names and not any(name.startswith(_PREFIX) for name in names)


def _with_prefix(tensors: list[LazyTensor]) -> list[LazyTensor]:
    """Under the names of a causal language model, which a backbone saved by itself lacks, as in embedding models."""
    if not _lacks_prefix({tensor.name for tensor in tensors}):
        return tensors
    return [t if t.name.startswith("lm_head.") else renamed(t, _PREFIX + t.name) for t in tensors]


def _without_fp8(folder: Path, config: dict[str, Any], tensors: list[LazyTensor], exact: bool) -> list[LazyTensor]:
    fp8 = fp8_of(config)
    if fp8 is not None:
        named = np.dtype(ml_dtypes.bfloat16) if config.get("dtype") != "float16" else np.dtype(np.float16)
        dtype = np.dtype(np.float32) if exact or config.get("dtype") == "float32" else named
        return dequantize_fp8(f"{folder}: its fp8 weights and scales do not fit", fp8, tensors, dtype)
    stray = [f"{tensor.name} is {tensor.dtype}" for tensor in tensors if tensor.dtype in FP8]
    raise_problems(f"{folder}: fp8 weights, of which config.json says nothing; take the unquantized model", stray)
    return tensors


def refuse_foreign_quantization(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for weights that another program quantized, in a way that is not read."""
    found = described(folder, config)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method is not None and config.get("quantization") is None and fp8_of(config) is None:
        raise ModelError(
            f"{folder}: its weights are quantized by {method}, which is not read; take the unquantized model, one in "
            f"fp8, or one quantized by MLX ({', '.join(_MODES)})"
        )


def _dequantized(folder: Path, quantization: Quantization, tensors: list[LazyTensor], exact: bool) -> list[LazyTensor]:
    """The tensors with each group of `X.weight`, `X.scales` (and `X.biases`) turned into one `X.weight`."""
    unknown = sorted(set(quantization.mode.split(", ")) - set(_MODES))
    if unknown:
        raise ModelError(
            f"{folder}: quantization mode {unknown[0]} is not read (accepted: {', '.join(_MODES)}); take the "
            "unquantized model"
        )
    by_name = {tensor.name: tensor for tensor in tensors}
    problems: list[str] = []
    result = []
    for tensor in tensors:
        module, _, kind = tensor.name.rpartition(".")
        scales, biases = by_name.get(f"{module}.scales"), by_name.get(f"{module}.biases")
        if kind in ("scales", "biases"):
            if f"{module}.weight" not in by_name:
                problems.append(f"{tensor.name} has no matching {module}.weight")
            continue
        if kind != "weight" or scales is None:
            if tensor.dtype == np.uint32:
                problems.append(f"{tensor.name} is packed, but has no matching {module}.scales")
            result.append(tensor)
            continue
        parts = [tensor, scales] if biases is None else [tensor, scales, biases]
        weight = _weight(parts, quantization.of(module), exact)
        if weight is None:
            problems.append(_misfit(parts, *quantization.of(module)))
        else:
            result.append(weight)
    raise_problems(f"{folder}: a damaged quantized model; download it again", problems)
    return result


def _weight(parts: list[LazyTensor], form: tuple[int, int], exact: bool) -> LazyTensor | None:
    """The matrix of packed numbers, scales and (unless it is mxfp4) biases; None if they do not fit each other."""
    (packed, scales, *biases), (bits, group_size) = parts, form
    if packed.dtype != np.uint32 or len(packed.shape) < 2 or packed.shape[:-1] != scales.shape[:-1]:
        return None
    shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
    is_known = biases[0].shape == scales.shape if biases else scales.dtype == np.uint8 and form == MXFP4
    if packed.shape[-1] * 32 != shape[-1] * bits or not is_known:
        return None
    own = scales.dtype if biases else np.dtype(ml_dtypes.bfloat16)  # which holds mxfp4 exactly
    dtype = np.dtype(np.float32) if exact else own

    def rows(start: int, stop: int) -> Array:
        arrays = [read_rows(tensor, start, stop) for tensor in parts]
        values = dequantize_affine(*arrays, bits=bits, group_size=group_size) if biases else dequantize_mxfp4(*arrays)
        return values.astype(dtype, copy=False)

    return from_rows(packed.name, dtype, shape, rows)


def _misfit(parts: list[LazyTensor], bits: int, group_size: int) -> str:
    packed, scales, *biases = parts
    found = f"{packed.name}: {packed.dtype} {list(packed.shape)} with scales"
    if biases:
        shapes = f"{list(scales.shape)} and biases {list(biases[0].shape)}"
        return f"{found} {shapes} is not {bits} bits in groups of {group_size}"
    return f"{found} {scales.dtype} {list(scales.shape)} and no biases is not mxfp4"
