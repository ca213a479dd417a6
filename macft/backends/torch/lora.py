"""Attach a PEFT adapter to a transformers model, and read and write it under canonical names."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from macft.backends.base import LoraSpec, MergedAdapter
from macft.backends.shared import check_state_fits, initial_lora_a, select_targets
from macft.weights.adapters.peft import State
from macft.weights.adapters.shapes import PREFIX

_ADAPTER = ".default"


def attach(model: torch.nn.Module, spec: LoraSpec, seed: int) -> tuple[torch.nn.Module, list[str]]:
    """Put an adapter on every target, A drawn as every engine draws it; returns the model and the targets."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}."
    ]
    targets = select_targets(linears, spec.target)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers under a name that transformers is about to drop
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if name.endswith("lora_A.weight"):
                rank, width = parameter.shape
                parameter.copy_(torch.from_numpy(initial_lora_a(seed, name, rank, width)))
    return model, targets


def compute_in(model: torch.nn.Module, dtype: torch.dtype, *, under_autocast: bool) -> None:
    """Let adapters compute in a type; `under_autocast` they stay in float32, and each product casts its operands.

    The float32 copies of the operands that PEFT makes would be kept beside autocast's own. DoRA's magnitudes become
    float32 norms, as its forward pass computes them.
    """
    if dtype == torch.float32:
        return
    if not under_autocast:
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.to(dtype)
        return
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if not module.lora_magnitude_vector:
            module.cast_input_dtype_enabled = False
        for magnitude in module.lora_magnitude_vector.values():
            weight = dequantize_module_weight(module.get_base_layer()).float()
            magnitude.weight.data.copy_(torch.linalg.norm(weight, dim=1))


def merge(model: torch.nn.Module, adapter: MergedAdapter) -> torch.nn.Module:
    """Add an adapter to the weights of its targets; raises ConfigError or ModelError if it does not fit."""
    wrapped, _ = attach(model, adapter.lora, seed=0)
    set_trainable_state(wrapped, adapter.state)
    return wrapped.merge_and_unload()


def canonical_name(name: str) -> str:
    """The name PEFT saves a parameter under; a full model's parameters keep their own names."""
    if not name.startswith(PREFIX):
        return name
    name = name.replace(_ADAPTER, "")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> parameter, for all that are trained."""
    return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy on the host."""
    found = tensor.detach().float().cpu()
    # a device's values are copied already
    return (found.clone() if found.data_ptr() == tensor.data_ptr() else found).numpy()


def set_trainable_state(model: torch.nn.Module, state: State) -> None:
    """Replace the trainable parameters by arrays under canonical names; raises ModelError if they do not fit."""
    parameters = trainable_parameters(model)
    check_state_fits(state, {name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name], dtype=np.float32)))
