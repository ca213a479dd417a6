"""Load an mlx-lm model from a folder, in the precision of this device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import _get_classes as mlx_lm_classes
from mlx_lm.utils import load_model as load_mlx_lm_model

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import rope_problem
from macft.backends.mlx import device
from macft.backends.mlx.out_of_memory import is_out_of_memory
from macft.backends.mlx.split import BACKBONES
from macft.backends.probes import probe_rows
from macft.backends.shared import initial_value
from macft.errors import ModelError
from macft.weights.model_config import (
    check_text_model,
    check_window,
    normalize_config,
    read_config,
    ties_by_default,
)
from macft.weights.quantization.affine import LOAD_GROUP_SIZE
from macft.weights.source import Source, open_model, rewritten


@dataclass(frozen=True)
class LoadedMlxModel:
    """An mlx-lm model, its compute type, and what the user should be told."""

    model: nn.Module
    dtype: mx.Dtype
    notes: list[str]
    rope_problem: str | None  # why rows cannot hold several examples


def load(spec: ModelSpec) -> LoadedMlxModel:
    """Load a folder in HF or MLX layout, quantized or not, in the precision of this device."""
    config = normalize_config(read_config(spec.folder))
    check_text_model(config)
    check_window(config, spec.max_length)
    source = None if spec.from_scratch else rewritten(spec.folder)
    if "tie_word_embeddings" not in config:
        # mlx-lm would tie the head of any model, and drop the one in the file
        config["tie_word_embeddings"] = _is_tied(spec, config)
    notes: list[str] = []
    try:
        if source is None:
            model, _ = load_mlx_lm_model(spec.folder, lazy=True, strict=not spec.from_scratch, model_config=config)
        else:
            model = _from_tensors(source, config)
    except Exception as error:  # any problem of a foreign loader
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{spec.folder}: the mlx backend cannot load this {config['model_type']} model: mlx-lm says: "
            f"{' '.join(str(error).split())[:160].rstrip('.')}; give a causal language model, or try --backend torch"
        ) from error
    if spec.from_scratch:
        _start(model, config, spec.seed)
    dtype = device.compute_dtype(spec.precision, _type_of_scales(model), notes)
    if spec.quantization_bit is not None:
        _quantize(model, spec.quantization_bit)
    if not device.on_gpu() and _dequantize(model):
        notes.append("the quantized base is dequantized to float32: quantized products are slow on this CPU build")
    model.update(tree_map(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters()))
    model.train()
    mx.eval(model.parameters())
    return LoadedMlxModel(model, dtype, notes, rope_problem(config, spec.max_length))


def _is_tied(spec: ModelSpec, config: dict[str, Any]) -> bool:
    if spec.from_scratch:
        return ties_by_default(config)
    return not any(tensor.name.endswith("lm_head.weight") for tensor in open_model(spec.folder).tensors)


def _from_tensors(source: Source, config: dict[str, Any]) -> nn.Module:
    """A model with the tensors of a folder that mlx-lm would read otherwise, or not at all."""
    dense = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    model_class, arguments = mlx_lm_classes(config=dense)
    model = model_class(arguments.from_dict(dense))
    weights = {tensor.name: mx.array(tensor.read().astype(np.float32)) for tensor in source.tensors}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    return model


def _start(model: nn.Module, config: dict[str, Any], seed: int) -> None:
    """Give every parameter the value of a model that was never trained."""
    values = [
        (name, mx.array(initial_value(config, seed, name, value.shape)))
        for name, value in tree_flatten(model.parameters())
        # a module may keep other arrays, such as frequencies, under names with an underscore
        if not name.rpartition(".")[2].startswith("_")
    ]
    model.update(tree_unflatten(values))


def _type_of_scales(model: nn.Module) -> mx.Dtype | None:
    scales = (module.scales for module in model.modules() if "scales" in module)
    return next((array.dtype for array in scales if mx.issubdtype(array.dtype, mx.floating)), None)


def _quantize(model: nn.Module, bits: int) -> None:
    """Affine groups of 64; a layer whose width no group divides stays as it is."""

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % LOAD_GROUP_SIZE == 0

    nn.quantize(model, group_size=LOAD_GROUP_SIZE, bits=bits, class_predicate=fits)


def _dequantize(model: nn.Module) -> bool:
    """Replace quantized layers by dense ones of the same values; False if there were none."""
    found = False
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            if hasattr(module, "scales"):
                raise ModelError(f"{name}: quantized experts cannot be dequantized; use an unquantized model on a CPU")
            continue
        found = True
        weight = mx.dequantize(
            module.weight,
            module.scales.astype(mx.float32),
            module.biases.astype(mx.float32) if "biases" in module else None,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
        dense: nn.Module
        if isinstance(module, nn.QuantizedLinear):
            dense = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                dense.bias = module.bias
        else:
            dense = nn.Embedding(1, 1)
        dense.weight = weight.astype(mx.float32)
        _replace(model, name, dense)
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent: Any = model
    *path, last = name.split(".")
    for part in path:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        setattr(parent, last, module)


class CheckpointedLayer:
    """A block that keeps only its input and computes the rest again in the backward pass."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # Parameters are inputs here: an array captured by closure would get no gradient.
        def compute(parameters: dict[str, Any], x: mx.array) -> mx.array:
            self.layer.update(parameters)
            return self.layer(x, *args, **kwargs)

        return mx.checkpoint(compute)(self.layer.trainable_parameters(), x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def checkpoint_layers(model: nn.Module) -> bool:
    """Wrap every block of the backbone in a `CheckpointedLayer`; the parameter tree stays. False: no blocks found."""
    owner = getattr(model, "language_model", model)
    for name in BACKBONES:
        backbone = owner.get(name)
        if isinstance(backbone, nn.Module) and isinstance(backbone.get("layers"), list):
            object.__setattr__(backbone, "layers", [CheckpointedLayer(layer) for layer in backbone["layers"]])
            return True
    return False


def has_finite_logits(model: nn.Module) -> bool:
    """Whether the logits of a few tokens are finite."""
    return bool(mx.isfinite(model(mx.array(probe_rows().inputs))).all().item())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized matrix counts as many as it stands for."""
    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    total = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            total += module.weight.size * 32 // module.bits
        else:
            total += sum(value.size for value in module.values() if isinstance(value, mx.array))
    return trainable, total
