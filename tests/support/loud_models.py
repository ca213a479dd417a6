"""Build random models whose logits are as far apart as a trained model's, so that rounding to 16 bits shows."""

from __future__ import annotations

from pathlib import Path

from support.tiny_models import write_model


def write_loud_model(folder: Path, architecture: str = "llama", **sizes) -> Path:
    """16 layers of width 128, wide weights and a head eight times as large: logits of deviation 5 to 10."""
    import torch
    from safetensors.torch import load_file, save_file

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        **sizes,
    }
    write_model(folder, architecture, **sizes)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 8 * tensors["lm_head.weight"]
    with torch.no_grad():
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
