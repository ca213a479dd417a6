"""Open a model folder in HF or MLX layout: check its config and list its tensors without reading them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import ml_dtypes
import numpy as np

from macft.errors import ModelError, raise_problems
from macft.weights.folder import pickle_problem, weight_files
from macft.weights.model_config import normalize_config, read_config
from macft.weights.quantization.affine import MXFP4, Quantization, dequantize_affine, dequantize_mxfp4, quantization_of
from macft.weights.quantization.foreign import described
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows
from macft.weights.tensors.safetensors import open_safetensors

WeightLayout = Literal["hf", "mlx"]

INDEX = "model.safetensors.index.json"
_MODES = ("affine", "mxfp4")


@dataclass(frozen=True)
class Source:
    """A model on disk: `config` (both spellings, without quantization) describes `tensors`.

    `quantized` names the modules that the folder holds quantized; each has one dequantized `X.weight` in `tensors`.
    """

    folder: Path
    config: dict[str, Any]
    layout: WeightLayout
    tensors: list[LazyTensor]
    quantization: Quantization | None
    quantized: frozenset[str]


def open_model(folder: Path, *, exact: bool = False) -> Source:
    """Open and check a model folder; only the headers of its weights are read.

    Dequantized weights have the type of their scales (mxfp4: bfloat16), as MLX computes with them, or float32
    if `exact`, for a sum that is rounded only once. Raises ModelError for files that are damaged, missing or
    pickled, for an index that points outside the folder and for quantization that MLX does not have.
    """
    config = normalize_config(read_config(folder))
    refuse_foreign_quantization(folder, config)
    quantization = quantization_of(config)
    tensors: list[LazyTensor] = []
    is_mlx = quantization is not None
    places: dict[str, Path] = {}
    problems: list[str] = []
    index = _read_index(folder)
    for path in _indexed_files(folder, index) if index else _model_files(folder):
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
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return Source(folder, config, "mlx" if is_mlx else "hf", tensors, quantization, quantized)


def _model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model without an index, in order of name: model*, else all but adapters."""
    found = sorted(folder.glob("model*.safetensors")) or sorted(weight_files(folder))
    if (folder / "model.safetensors") in found:
        return [folder / "model.safetensors"]
    if found:
        return found
    raise ModelError(f"{folder}: {pickle_problem(folder) or 'no *.safetensors weights; expected a model folder'}")


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor according to the index; empty without an index."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f'{path}: no "weight_map" from tensors to file names; download it again')
    return weight_map


def _indexed_files(folder: Path, index: dict[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    outside = [f"{name!r} is not a file name inside the folder" for name in names if not _is_inside(name)]
    raise_problems(f"{folder / INDEX}: refused", outside)
    foreign = [name for name in names if not name.endswith(".safetensors")]
    if foreign:
        raise ModelError(
            f"{folder / INDEX}: names {foreign[0]}, which is not a .safetensors file; nothing else is read"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    headline = f"{folder}: {len(missing)} of {len(names)} weight files are missing; download it again"
    raise_problems(headline, missing)
    return [folder / name for name in names]


def _is_inside(name: str) -> bool:
    # judged by the name only: the hub cache links its files to another folder
    if "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def refuse_foreign_quantization(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for weights that another program quantized, in a way that is not read."""
    found = described(folder, config)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method is not None and config.get("quantization") is None:
        raise ModelError(
            f"{folder}: its weights are quantized by {method}, which is not read; take the unquantized model, or one "
            f"quantized by MLX ({', '.join(_MODES)})"
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
