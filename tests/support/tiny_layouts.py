"""Build a tiny random model of each architecture in the layout table, tied and untied, with biases and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from macft.weights.tensors.lazy import LazyTensor
from support.tiny_models import VOCABULARY, write_model

PROMPT = [(index * 7) % (VOCABULARY - 3) + 3 for index in range(20)]

_HYBRID = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 128}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

# case: (model type, sizes); a case is named for its model type and what is special about it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _UNTIED),
    "llama tied": ("llama", _TIED),
    "llama biased": ("llama", {**_UNTIED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", _TIED),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", _TIED),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOW}),
    "gemma3_text": ("gemma3_text", {}),
    "gemma3_text untied": ("gemma3_text", _UNTIED),
    "phi": ("phi", {}),
    "phi3": ("phi3", _WINDOW),
    "phi3 tied": ("phi3", {**_TIED, **_WINDOW}),
    "smollm3": ("smollm3", {}),
    "smollm3 untied": ("smollm3", _UNTIED),
    "starcoder2": ("starcoder2", {**_WINDOW}),
    "stablelm": ("stablelm", {}),
    "stablelm biased": ("stablelm", {"use_qkv_bias": True}),
    "granite": ("granite", {}),
    "granite tied": ("granite", _TIED),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"head_dim": 16, "num_hidden_layers": 4, **_WINDOW}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, **_WINDOW}),
    "helium": ("helium", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "granitemoe": ("granitemoe", _LOCAL_EXPERTS),
    "granitemoe tied": ("granitemoe", {**_LOCAL_EXPERTS, **_TIED}),
    "qwen2_moe": ("qwen2_moe", _SHARED),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **_EXPERTS}),
    "qwen3_moe tied": ("qwen3_moe", {"head_dim": 16, **_EXPERTS, **_TIED}),
    "qwen3_moe with a dense layer": ("qwen3_moe", {"head_dim": 16, **_EXPERTS, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe tied": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, **_TIED}),
    "mixtral": ("mixtral", _LOCAL_EXPERTS),
    "mixtral tied": ("mixtral", {**_LOCAL_EXPERTS, **_TIED}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, **_LOCAL_EXPERTS, **_WINDOW}),
    "qwen3_next": ("qwen3_next", {**_HYBRID, **_SHARED}),
    "qwen3_next tied": ("qwen3_next", {**_HYBRID, **_SHARED, **_TIED}),
    "qwen3_5_text": ("qwen3_5_text", _HYBRID),
    "qwen3_5_text tied": ("qwen3_5_text", {**_HYBRID, **_TIED}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_HYBRID, **_SHARED}),
}


def write_case(folder: Path, case: str, **sizes: Any) -> Path:
    """The model of a case as transformers saves it, in float32; `sizes` go over those of the case."""
    model_type, own = CASES[case]
    return write_model(folder, model_type, **{**own, **sizes})


def mlx_array(array: np.ndarray) -> Any:
    """The same numbers in MLX, bfloat16 included."""
    import mlx.core as mx

    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.ascontiguousarray(array))


def numpy_array(array: Any) -> np.ndarray:
    """The same numbers in numpy, bfloat16 included."""
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return np.array(mx.contiguous(array).view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def bytes_of(tensors: list[LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What each tensor is, to the bit; fails where a tensor is not what it says."""
    found = {}
    for tensor in tensors:
        array = tensor.read()
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), tensor.name
        assert tensor.name not in found
        found[tensor.name] = (array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes())
    return found


def mlx_bytes(weights: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """`bytes_of` arrays of MLX."""
    arrays = {name: numpy_array(array) for name, array in weights.items()}
    return {
        name: (array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()
    }


def mlx_model(config: dict[str, Any]) -> Any:
    """The module that mlx-lm makes for a config."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(dict(config)))


def mlx_logits(folder: Path) -> np.ndarray:
    """[tokens, vocabulary] of the prompt, through mlx-lm's own loading of a folder."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from macft.weights.model_config import normalize_config, read_config

    model, _ = load_model(folder, model_config=normalize_config(read_config(folder)))
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def torch_logits(folder: Path) -> np.ndarray:
    """[tokens, vocabulary] of the prompt, through transformers; fails if it misses or does not know a tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0].numpy()
