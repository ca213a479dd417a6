"""Write random adapters of PEFT and of mlx-lm for tiny models, and compute logits with the two libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from macft.weights.adapters.peft import AdapterConfig, write_adapter
from macft.weights.folder import weights_hash
from macft.weights.model_config import normalize_config, read_config
from support.tiny_layouts import PROMPT


def save_peft(model: Path, config: Any, folder: Path, seed: int = 1) -> np.ndarray:
    """Save a random adapter as PEFT does; [tokens, vocabulary] of the prompt with it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), replace(config, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return _torch_logits(theirs)


def peft_logits(model: Path, folder: Path) -> np.ndarray:
    """[tokens, vocabulary] through PEFT's own loading; fails if a tensor of the adapter is missing or unknown."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        assert set(get_peft_model_state_dict(theirs, save_embedding_layers=False)) == set(file.keys())
    return _torch_logits(theirs)


def _torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROMPT])).logits[0].float().numpy()


def save_mlx(model: Path, folder: Path, *, keys: list[str] | None, num_layers: int = -1, dora: bool = False) -> None:
    """Save a random adapter of rank 3 as mlx-lm does; all it takes by itself when `keys` is None."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    shape = {"rank": 3, "scale": 1.7, "dropout": 0.0}
    if keys is not None:
        shape["keys"] = keys
    theirs = _load(model)
    theirs.freeze()
    linear_to_lora_layers(theirs, num_layers, shape, use_dora=dora)
    mx.random.seed(3)
    found = {name: value for name, value in tree_flatten(theirs.trainable_parameters())}
    state = {name: value + 0.1 * mx.random.normal(value.shape) for name, value in found.items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), state)
    kind = "dora" if dora else "lora"
    content = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": shape, "model": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def mlx_adapter_logits(model: Path, folder: Path) -> np.ndarray:
    """[tokens, vocabulary] through mlx-lm's own loading."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    return np.array(load_adapters(_load(model), str(folder))(mx.array([PROMPT]))[0].astype(mx.float32))


def _load(model: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(model, model_config=normalize_config(read_config(model)))[0]


def write_peft(
    folder: Path, base: Path, *, rank: int = 4, alpha: float = 8.0, size: float = 0.1, seed: int = 0
) -> Path:
    """A random adapter on q_proj and down_proj of the tiny llama."""
    rng = np.random.default_rng(seed)
    state = {}
    for layer in range(2):
        for module, (rows, columns) in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            state[f"{name}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32) * size
            state[f"{name}.lora_B.weight"] = rng.normal(size=(64, rank)).astype(np.float32) * size
            assert rows == 64
    folder.mkdir()
    config = AdapterConfig(str(base), rank, alpha, 0.0, ("q_proj", "down_proj"))
    write_adapter(folder, config, state, weights_hash(base))
    return folder


def write_word_tokenizer(folder: Path, count: int) -> None:
    """A tokenizer of `count` words, w0 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
