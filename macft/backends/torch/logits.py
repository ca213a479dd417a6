"""A model folder, adapters and token ids in; the logits that PyTorch computes of them in float32 out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import PeftModel

from macft.backends.base import ModelSpec, Under
from macft.backends.torch import lora
from macft.backends.torch.model import load
from macft.errors import MissingPackageError, ModelError
from macft.weights.tensors.torch_pickle import open_torch_file

NATIVE_FORMAT = "peft"


def logits(folder: Path, adapters: Sequence[Under | Path], tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V]; an adapter given as a folder is read and attached by PEFT itself, the last one unmerged."""
    loaded = load(ModelSpec(folder, lora=None, precision="float32"))
    model = loaded.model
    for index, adapter in enumerate(adapters):
        if isinstance(adapter, Under):
            model = lora.merge(model, adapter)
        else:
            model = _with_adapter(model, adapter)
            if index < len(adapters) - 1:
                model = model.merge_and_unload()
    return _compute(model.eval(), loaded.device, tokens)


def litgpt_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 [T, V] of a litgpt checkpoint, by litgpt's own model; MissingPackageError without litgpt."""
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
    return _compute(model.float().eval(), torch.device("cpu"), tokens)


def _with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # any problem of a foreign loader
        raise ModelError(f"{folder}: PEFT cannot load it: {' '.join(str(error).split())[:160]}") from error


def _compute(model: torch.nn.Module, device: torch.device, tokens: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)], device=device))
    found = output if isinstance(output, torch.Tensor) else output.logits
    return found[0].float().cpu().numpy()
