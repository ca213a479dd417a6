"""Attach LoRA adapters to the linear layers of an MLX model, in PEFT's layout and names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from macft.backends.base import LoraSpec, MergedAdapter
from macft.backends.shared import check_state_fits, initial_lora_a, select_targets
from macft.errors import ModelError
from macft.weights.adapters.peft import State
from macft.weights.adapters.shapes import PREFIX

MAGNITUDE = "lora_magnitude_vector"
_SUFFIXES = {"lora_A": ".weight", "lora_B": ".weight", MAGNITUDE: ""}


@dataclass
class Dropout:
    """The rate of dropout, and keys for the masks of one micro-batch; None switches it off.

    Keys are handed in rather than drawn, so that a layer that is computed again in the
    backward pass drops the same elements.
    """

    rate: float = 0.0
    keys: mx.array | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale * B A, or its DoRA form (arXiv 2402.09353)."""

    def __init__(self, base: nn.Module, width: tuple[int, int], spec: LoraSpec, dropout: Dropout, index: int):
        super().__init__()
        out_features, in_features = width
        self.base = base
        self.lora_A = mx.zeros((spec.rank, in_features))
        self.lora_B = mx.zeros((out_features, spec.rank))
        if spec.use_dora:
            self.lora_magnitude_vector = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=1)
        self._scale = spec.scale
        self._dropout = dropout
        self._index = index

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        dropped = self._drop(x)
        delta = self._scale * ((dropped @ self.lora_A.T) @ self.lora_B.T)
        if MAGNITUDE not in self:
            return self.base(x) + delta.astype(x.dtype)
        # y = b + m / ||W + s B A|| * (W x + s B A x); the norm is a constant in the backward pass
        delta_weight = self.lora_B.astype(mx.float32) @ self.lora_A.astype(mx.float32)
        updated = dense_weight(self.base).astype(mx.float32) + self._scale * delta_weight
        norm = mx.stop_gradient(mx.linalg.norm(updated, axis=1))
        ratio = (self.lora_magnitude_vector / norm).astype(x.dtype)
        bias = self.base.get("bias")
        product = self.base(dropped) if bias is None else self.base(dropped) - bias
        result = ratio * (product + delta.astype(x.dtype))
        return result if bias is None else result + bias

    def _drop(self, x: mx.array) -> mx.array:
        rate, keys = self._dropout.rate, self._dropout.keys
        if rate == 0.0 or keys is None:
            return x
        keep = mx.random.bernoulli(1.0 - rate, x.shape, key=keys[self._index])
        return mx.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def dense_weight(linear: nn.Module) -> mx.array:
    """[out, in] weight of a linear layer, dequantized if need be."""
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    return linear.weight


def _width(linear: nn.Module) -> tuple[int, int]:
    out_features, in_features = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_features = in_features * 32 // linear.bits
    return out_features, in_features


def attach(model: nn.Module, spec: LoraSpec, seed: int) -> tuple[list[str], Dropout]:
    """Freeze the model and put an adapter on every target; returns the targets and the dropout switch."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and ".layers." in f".{name}."
    ]
    linears.sort(key=_natural_order)
    targets = select_targets(linears, spec.target)
    model.freeze()
    dropout = Dropout(spec.dropout)
    modules = dict(model.named_modules())
    layers = []
    for index, name in enumerate(targets):
        layer = LoraLinear(modules[name], _width(modules[name]), spec, dropout, index)
        layer.base.freeze()
        canonical = f"{PREFIX}{name}.lora_A.weight"
        rank, in_features = layer.lora_A.shape
        layer.lora_A = mx.array(initial_lora_a(seed, canonical, rank, in_features))
        layers.append((name, layer))
    model.update_modules(tree_unflatten(layers))
    return targets, dropout


def merge(model: nn.Module, adapter: MergedAdapter) -> None:
    """Add an adapter to the weights of its targets; raises ConfigError or ModelError if it does not fit."""
    attach(model, adapter.lora, seed=0)
    set_trainable_state(model, adapter.state)
    merged = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            if isinstance(module.base, nn.QuantizedLinear):
                raise ModelError(
                    "an adapter cannot become part of a quantized base: merge it first, with macft export merged"
                )
            weight = module.base.weight
            updated = weight.astype(mx.float32) + adapter.lora.scale * (module.lora_B @ module.lora_A)
            if MAGNITUDE in module:
                updated = (module.lora_magnitude_vector / mx.linalg.norm(updated, axis=1))[:, None] * updated
            module.base.weight = updated.astype(weight.dtype)
            merged.append((name, module.base))
    model.update_modules(tree_unflatten(merged))


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (math.inf, part) for part in name.split(".")]  # type: ignore[misc]


def canonical_name(path: str) -> str:
    """PEFT's name of a trainable parameter; a full model's parameters keep their own names."""
    last = path.rpartition(".")[2]
    if last in _SUFFIXES:
        return f"{PREFIX}{path}{_SUFFIXES[last]}"
    return path


def set_trainable_state(model: nn.Module, state: State) -> None:
    """Replace the trainable parameters by arrays under canonical names; raises ModelError if they do not fit."""
    parameters = {path: value.shape for path, value in tree_flatten(model.trainable_parameters())}
    check_state_fits(state, {canonical_name(path): shape for path, shape in parameters.items()})
    values = [(path, mx.array(state[canonical_name(path)].astype(np.float32))) for path in parameters]
    model.update(tree_unflatten(values))
