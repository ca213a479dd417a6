"""Attaches a PEFT adapter to a transformers model, and reads and writes it under canonical names."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from macft.backends.base import PEFT_PREFIX, LoraSpec, State, Under, initial_lora_a, select_targets
from macft.errors import ConfigError, ModelError

_ADAPTER = ".default"


def attach(model: torch.nn.Module, spec: LoraSpec, seed: int) -> tuple[torch.nn.Module, list[str]]:
    """The model with an adapter on every target, A drawn as every backend draws it; and the targets."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}."
    ]
    try:
        targets = select_targets(linears, spec.target)
    except KeyError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ConfigError(
            f"lora_target {error.args[0]!r} matches no linear layer; this model has {', '.join(names)}"
        ) from None
    if not targets:
        raise ModelError(
            f"the torch backend finds no linear layers in the blocks of this {model.config.model_type} model; "
            "set finetuning_type to full, or take another model"
        )
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


def merge(model: torch.nn.Module, under: Under) -> torch.nn.Module:
    """The model with an adapter added to its weights; raises ConfigError or ModelError if it does not fit."""
    wrapped, _ = attach(model, under.lora, seed=0)
    set_trainable_state(wrapped, under.state)
    return wrapped.merge_and_unload()


def canonical_name(name: str) -> str:
    """The name PEFT saves a parameter under; a full model's parameters keep their own names."""
    if not name.startswith(PEFT_PREFIX):
        return name
    name = name.replace(_ADAPTER, "")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> parameter, of all that are trained."""
    return {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def trainable_state(model: torch.nn.Module) -> State:
    """Trained parameters as float32 numpy arrays."""
    return {name: to_numpy(p) for name, p in trainable_parameters(model).items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy on the host."""
    return tensor.detach().float().cpu().numpy().copy()


def set_trainable_state(model: torch.nn.Module, state: State) -> None:
    """Put arrays under canonical names back; raises ModelError naming all that do not fit."""
    have = trainable_parameters(model)
    problems = [f"missing {name}" for name in have if name not in state]
    problems += [f"unknown {name}" for name in state if name not in have]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the model wants {list(parameter.shape)}"
        for name, parameter in have.items()
        if name in state and tuple(state[name].shape) != tuple(parameter.shape)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(f"the adapter does not fit this model: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, parameter in have.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name], dtype=np.float32)))
