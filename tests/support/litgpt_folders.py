"""Write litgpt checkpoints of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from macft.weights.source import open_model
from support.tiny_models import VOCABULARY

BASE: dict[str, Any] = {
    "hf_config": {}, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "head_size": 16,
    "intermediate_size": 128, "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "padding_multiple": 512,
    "block_size": 256, "rope_base": 123456, "norm_eps": 1e-5,
}  # fmt: skip
LLAMA = {
    **BASE, "name": "tiny-llama", "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
}  # fmt: skip


def write_lit(folder: Path, settings: dict[str, Any], state: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    torch.save(state, folder / "lit_model.pth")
    return folder


def lit_state(source: Path, *, interleaved: bool = False) -> dict[str, torch.Tensor]:
    """A transformers llama under litgpt's names, by the documented layout."""
    found = {t.name: torch.from_numpy(np.array(t.read())) for t in open_model(source).tensors}
    state = {"transformer.wte.weight": found["model.embed_tokens.weight"]}
    state["lm_head.weight"] = found.get("lm_head.weight", state["transformer.wte.weight"])
    state["transformer.ln_f.weight"] = found["model.norm.weight"]
    names = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(2):
        for lit, hf in names.items():
            state[f"transformer.h.{layer}.{lit}.weight"] = found[f"model.layers.{layer}.{hf}.weight"]
        q, k, v = (found[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        if interleaved:
            # two groups: two heads of 16 rows ask one head of keys
            rows = torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])
            state[f"transformer.h.{layer}.attn.attn.weight"] = rows
        else:
            state[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat([q, k, v])
    return state
