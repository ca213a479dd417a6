"""Compute logits of a model with adapters, as PEFT or litgpt itself reads them, to verify a conversion with."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import PeftModel

from macft.backends.base import MergedAdapter, ModelSpec
from macft.backends.torch import lora
from macft.backends.torch.memory import device_for_float32
from macft.backends.torch.model import load
from macft.backends.torch.out_of_memory import explaining_out_of_memory
from macft.backends.torch.step import whole_logits
from macft.errors import MissingPackageError, ModelError
from macft.weights.adapters.peft import WEIGHTS_NAME
from macft.weights.layouts.litgpt import is_litgpt
from macft.weights.tensors.safetensors import open_safetensors
from macft.weights.tensors.torch_pickle import open_torch_file

_WHOLE = re.compile(r"\.(embed_tokens|lm_head)\.(token_adapter\.)?(base_layer\.)?weight$")


def logits(folder: Path, adapters: Sequence[MergedAdapter | Path], tokens: Sequence[int]) -> np.ndarray:
    """See `LogitsModule.logits`; of adapters given as folders PEFT merges all but the last."""
    if is_litgpt(folder):
        return _litgpt_logits(folder, tokens)
    spec = ModelSpec(folder, lora=None, precision="float32")
    loaded = load(spec, device_for_float32(folder))
    model = loaded.model
    for index, adapter in enumerate(adapters):
        if isinstance(adapter, MergedAdapter):
            model = lora.merge(model, adapter)
        else:
            model = _with_adapter(model, adapter)
            if index < len(adapters) - 1:
                _unshare(model)
                model = model.merge_and_unload()
    with explaining_out_of_memory(loaded.device, f"computing the logits of {folder.name} in float32", "load"):
        return whole_logits(model.eval(), loaded.device, tokens)


def _litgpt_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V] of a litgpt checkpoint, by litgpt's own model; raises MissingPackageError without litgpt."""
    try:
        litgpt = importlib.import_module("litgpt")
    except ImportError:
        raise MissingPackageError(
            "--verify of a litgpt checkpoint needs litgpt, not installed here: pip install litgpt, or leave it out"
        ) from None
    settings = yaml.safe_load((folder / "model_config.yaml").read_text(encoding="utf-8"))
    model = litgpt.GPT(litgpt.Config(**settings))
    state = {t.name: torch.from_numpy(t.read().astype(np.float32)) for t in open_torch_file(folder / "lit_model.pth")}
    model.load_state_dict(state)
    return whole_logits(model.float().eval(), torch.device("cpu"), tokens)


def _unshare(model: torch.nn.Module) -> None:
    """Give every module parameters of its own: PEFT would merge into a shared one what is for one of its uses."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                module.register_parameter(name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _vocabulary_rows(folder: Path) -> int | None:
    """The rows of an embedding or head that an adapter's file holds as a whole."""
    found = (tensor for tensor in open_safetensors(folder / WEIGHTS_NAME).tensors if _WHOLE.search(tensor.name))
    return next((tensor.shape[0] for tensor in found), None)


def _with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        if (rows := _vocabulary_rows(folder)) is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # any problem of a foreign loader
        raise ModelError(f"{folder}: PEFT cannot load it: {' '.join(str(error).split())[:160]}") from error
