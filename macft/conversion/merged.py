"""Merge adapters into a base model and write the result as a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.errors import ModelError, UsageError
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.experts import is_expert
from macft.weights.adapters.fitting import adapted_modules, fit, tokenizer_folder, without_copies
from macft.weights.adapters.merge import merge_adapters
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder
from macft.weights.layouts.mlx import as_hf, mlx_config, to_mlx, with_experts_apart
from macft.weights.quantization.adapter_loss import AdapterLoss, Form, Versions, planned_forms, quantize_merged
from macft.weights.quantization.model import check_quantization
from macft.weights.source import Source, WeightLayout, open_model
from macft.weights.tensors.lazy import LazyTensor, cast
from macft.weights.writer import TEMPLATE, write_model


@dataclass(frozen=True)
class MergeReport:
    """What was written; `notes` are for the user and include warnings.

    `adapter_loss` is the share of what the adapters add that quantizing the result lost: 0 is nothing, 1 as much
    as they add; None when nothing was quantized.
    """

    modules: int
    adapter_loss: float | None
    notes: tuple[str, ...]


def export_merged(
    model: ModelFolder,
    adapters: Sequence[Adapter],
    destination: Path,
    *,
    layout: WeightLayout = "hf",
    bits: int | None = None,
    group_size: int = 64,
    requantize: bool = False,
) -> MergeReport:
    """Merge the adapters into a model, in order, and write the complete folder `destination`, or nothing.

    The sum is computed in float32 and rounded once to the base's type. A quantized base comes out dequantized,
    unless `requantize` gives the result the base's own quantization or `bits` another.
    Raises UsageError for options that contradict each other, ModelError for files that do not fit.
    """
    source = open_model(model.path, exact=True)
    _check_options(model, source, layout, bits, group_size, requantize)
    as_trained = _as_trained(source, adapters)
    adapters = [without_copies(adapter, as_trained[1]) for adapter in adapters]
    fitted = fit(*as_trained, adapters)
    rounded = fit(*_as_trained(open_model(model.path), adapters), adapters).tensors
    config, base = fitted.config, fitted.tensors
    versions = Versions(base, merge_adapters(base, fitted.adapters), rounded)
    notes = [*(note for adapter in adapters if (note := other_base_note(adapter, model))), *fitted.notes]
    if source.quantization is not None and bits is None and not requantize:
        notes.append(
            f"{model.name} is quantized, the merged model is not: quantizing it again (--requantize --to mlx) would "
            "erase part of what the adapter adds"
        )
    if source.is_fp8:
        notes.append(f"{model.name} is held in fp8, the merged model in {source.config.get('dtype') or 'bfloat16'}")
    if layout == "mlx":
        lists = [to_mlx(config, tensors) for tensors in (versions.base, versions.merged, versions.rounded)]
        config, versions = mlx_config(config, versions.base), Versions(*lists)
    loss = None
    if bits is None and not requantize:
        result = [cast(tensor, like.dtype) for tensor, like in zip(versions.merged, versions.rounded, strict=True)]
    else:
        loss = AdapterLoss()
        default, forms = _forms(source, config, versions, bits, group_size)
        config, result = quantize_merged(config, versions, forms, default, loss)
    templates = [path for adapter in adapters if (path := adapter.folder / TEMPLATE).is_file()]
    write_model(
        destination,
        config,
        result,
        source_folder=model.path,
        tokenizer_folder=tokenizer_folder(model.path, adapters),
        layout=layout,
        template=templates[-1] if templates else None,
        if_not_finite="the model is broken, or with the adapters its numbers are too large for their type",
    )
    if loss is not None:
        notes.append(f"quantizing erased {loss.share:.0%} of what the adapters add")
    return MergeReport(len(adapted_modules(fitted.adapters)), None if loss is None else loss.share, tuple(notes))


def _check_options(
    model: ModelFolder, source: Source, layout: WeightLayout, bits: int | None, group_size: int, requantize: bool
) -> None:
    if bits is not None and requantize:
        raise UsageError("--bits and --requantize contradict each other: --requantize takes the base's own bits")
    if (bits is not None or requantize) and layout != "mlx":
        asked = "--requantize" if requantize else "--bits"
        raise UsageError(f"{asked} quantizes to MLX's own format: add --to mlx, or leave {asked} out")
    if bits is not None:
        check_quantization(bits, group_size)
    if not requantize:
        return
    if source.quantization is None:
        raise UsageError(f"{model.name} is not quantized, so --requantize has no bits to take from it; pass --bits")
    if source.quantization.mode != "affine":
        raise ModelError(
            f"{model.name} is quantized as {source.quantization.mode}, which is read but not written; pass --bits "
            "instead of --requantize"
        )


def _as_trained(source: Source, adapters: Sequence[Adapter]) -> tuple[dict[str, Any], list[LazyTensor]]:
    """The model in HF layout, with the modules that the adapters were trained on."""
    config, tensors = as_hf(source)
    if any(is_expert(module) for module in adapted_modules(adapters)):
        tensors = with_experts_apart(config, tensors)
    return config, tensors


def _forms(
    source: Source, config: dict[str, Any], versions: Versions, bits: int | None, group_size: int
) -> tuple[Form, dict[str, Form]]:
    """The form that most modules are quantized to, and the form of each: the base's own without `bits`."""
    if bits is not None:
        return (bits, group_size), planned_forms(config, versions.rounded, (bits, group_size))
    own = source.quantization
    assert own is not None
    return (own.bits, own.group_size), {module: own.of(module) for module in source.quantized}
