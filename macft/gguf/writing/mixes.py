"""Choose the type of each tensor by its name and shape, as llama.cpp's converter and quantizer do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GgmlType

from macft.gguf.format import Shape

# matrices that stay as they are
_NOT_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|^position_embd|^token_types"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"
# blocks of 256 numbers to blocks of 32
_FALLBACKS = {
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
# always F32: routers of experts and short convolutions, small and read by code that knows only F32
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_CONVOLUTIONS = ("ssm_conv1d.weight", "shortconv.conv.weight")
_POSITIONS = ("position_embd.weight", "token_types.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_UNNUMBERED = -1


@dataclass(frozen=True)
class ModelSize:
    """What a mix needs to know of a model besides the names and shapes of its tensors."""

    layers: int
    experts: int
    has_eightfold_values: bool  # the 70B models, whose attn_v is an eighth of attn_q

    @staticmethod
    def of(architecture: str, fields: Mapping[str, Any]) -> ModelSize:
        """Read the fields of a GGUF file; a missing number counts as 0."""

        def number(key: str, default: int = 0) -> int:
            value = fields.get(f"{architecture}.{key}", default)
            # some architectures have one number for each layer
            return int(value[0] if np.ndim(value) else value)

        layers = number("block_count")
        heads = number("attention.head_count")
        is_grouped = number("attention.head_count_kv", heads) != heads
        is_70b = layers == 80 and (architecture == "qwen2" or (architecture == "llama" and is_grouped))
        return ModelSize(layers, number("expert_count"), is_70b)


def is_always_f32(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor stays F32 in any file: vectors, norms, biases, routers, short convolutions, all but weights.

    The rule of llama.cpp's converter (`prepare_tensors`); `name` and `shape` are those of the GGUF tensor.
    """
    if len(shape) <= 1 or not name.endswith((".weight", ".lora_a", ".lora_b")):
        return True
    short = name.split(".", 2)[2] if name.startswith("blk.") else name
    return name.endswith("_norm.weight") or short in (*_ROUTERS, *_CONVOLUTIONS, *_POSITIONS)


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama.cpp sorts tensors: those outside of layers first, then layer by layer, by name."""
    found = _LAYER.match(name)
    return int(found[1]) if found else _UNNUMBERED, name


def may_quantize(name: str, shape: Shape) -> bool:
    """Whether llama.cpp's quantizer touches the tensor: weights of two or more axes, except for a list of names."""
    is_matrix = prod(shape[:-1]) > 1
    return is_matrix and name.endswith("weight") and not _NOT_QUANTIZED.search(name)


def fitting_type(kind: GgmlType, columns: int) -> GgmlType:
    """`kind`, or its replacement where its blocks do not divide a row; F16 where no blocks do."""
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    other = _FALLBACKS.get(kind, GgmlType.F16)
    return other if columns % GGML_QUANT_SIZES[other][0] == 0 else GgmlType.F16


def mixed_types(quant: str, base: GgmlType, tensors: Mapping[str, Shape], size: ModelSize) -> dict[str, GgmlType]:
    """The expected type, before `fitting_type`, of every tensor that may be quantized, in file order.

    `quant` is the name of the mix in lower case (q4_k_m), `base` its type for whatever no rule names. These are
    the rules of `llama_tensor_get_type_impl`; the exceptions for Falcon, which is not exported, are left out.
    """
    is_tied = _OUTPUT not in tensors
    num_values = sum(_is_value(name) for name in tensors)
    seen_values = seen_downs = 0
    types: dict[str, GgmlType] = {}
    for name in sorted((n for n in tensors if may_quantize(n, tensors[n])), key=file_order):
        if name == _OUTPUT or (is_tied and name in _EMBEDDINGS):
            types[name] = _head_type(base, tensors[name][-1])
        elif _is_value(name):
            types[name] = _value_type(quant, base, seen_values, num_values, size)
            seen_values += 1
        elif "attn_k.weight" in name:
            types[name] = GgmlType.Q8_0 if size.experts == 8 else base
        elif "ffn_down" in name:
            layer = file_order(name)[0] if size.experts > 1 else seen_downs
            types[name] = _down_type(quant, base, layer, size.layers)
            seen_downs += 1
        elif "attn_output.weight" in name:
            types[name] = _attention_output_type(quant, base, size)
        else:
            types[name] = base
    return types


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _is_favored(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _head_type(base: GgmlType, columns: int) -> GgmlType:
    if base == GgmlType.Q8_0 or columns % GGML_QUANT_SIZES[base][0]:
        return GgmlType.Q8_0
    return GgmlType.Q6_K


def _value_type(quant: str, base: GgmlType, layer: int, layers: int, size: ModelSize) -> GgmlType:
    if size.experts == 8:
        return GgmlType.Q8_0
    kind = base
    if quant == "q3_k_m":
        kind = GgmlType.Q5_K if layer < 2 else GgmlType.Q4_K
    elif quant in ("q4_k_m", "q5_k_m") and _is_favored(layer, layers):
        kind = GgmlType.Q6_K
    elif quant == "q4_k_s" and layer < 4:
        kind = GgmlType.Q5_K
    if size.has_eightfold_values and kind in (GgmlType.Q3_K, GgmlType.Q4_K):
        return GgmlType.Q5_K
    return kind


def _down_type(quant: str, base: GgmlType, layer: int, layers: int) -> GgmlType:
    if quant == "q3_k_m":
        return GgmlType.Q5_K if layer < layers // 16 else GgmlType.Q4_K
    if quant in ("q4_k_m", "q5_k_m") and _is_favored(layer, layers):
        return GgmlType.Q6_K
    if quant == "q4_k_s" and layer < layers // 8:
        return GgmlType.Q5_K
    return base


def _attention_output_type(quant: str, base: GgmlType, size: ModelSize) -> GgmlType:
    if size.experts == 8:
        return GgmlType.Q5_K if quant in ("q3_k_m", "q4_k_s", "q4_k_m") else base
    return GgmlType.Q4_K if quant == "q3_k_m" else base
