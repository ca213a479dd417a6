"""From a GGUF tensor's name and shape to whether it stays in float32, whatever the file's quantization."""

from __future__ import annotations

from collections.abc import Sequence

# Routers of experts and short convolutions: small, and read by code that knows F32 alone.
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_CONVOLUTIONS = ("ssm_conv1d.weight", "shortconv.conv.weight")
_EMBEDDINGS = ("position_embd.weight", "token_types.weight")


def is_always_f32(name: str, shape: Sequence[int]) -> bool:
    """True for vectors, norms, biases, routers, short convolutions and all that is not called a weight.

    The rule of llama.cpp's converter (`prepare_tensors`); `name` and `shape` are those of the GGUF tensor.
    """
    if len(shape) <= 1 or not name.endswith((".weight", ".lora_a", ".lora_b")):
        return True
    short = name.split(".", 2)[2] if name.startswith("blk.") else name
    return name.endswith("_norm.weight") or short in (*_ROUTERS, *_CONVOLUTIONS, *_EMBEDDINGS)
