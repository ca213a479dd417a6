"""The names and shapes of a model's tensors in; the type of each, as llama.cpp's quantizer mixes them, out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

Shape = tuple[int, ...]

# matrices that stay as they are
_NOT_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|^position_embd|^token_types"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"
# blocks of 256 numbers to blocks of 32
_FALLBACKS = {Kind.Q3_K: Kind.Q4_0, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
_LAYER = re.compile(r"blk\.(\d+)\.")
_UNNUMBERED = -1


@dataclass(frozen=True)
class ModelSize:
    """What a mix asks about a model besides the names and shapes of its tensors."""

    layers: int
    experts: int
    has_eightfold_values: bool  # the 70B models, whose attn_v is an eighth of attn_q

    @staticmethod
    def of(architecture: str, fields: Mapping[str, Any]) -> ModelSize:
        """Read from the fields of a GGUF file; numbers that are missing count as none."""

        def number(key: str, otherwise: int = 0) -> int:
            value = fields.get(f"{architecture}.{key}", otherwise)
            # some architectures have one number for each layer
            return int(value[0] if np.ndim(value) else value)

        layers = number("block_count")
        heads = number("attention.head_count")
        is_grouped = number("attention.head_count_kv", heads) != heads
        is_70b = layers == 80 and (architecture == "qwen2" or (architecture == "llama" and is_grouped))
        return ModelSize(layers, number("expert_count"), is_70b)


def file_order(name: str) -> tuple[int, str]:
    """What llama.cpp sorts tensors by: those of no layer first, then layer by layer, by name."""
    found = _LAYER.match(name)
    return int(found[1]) if found else _UNNUMBERED, name


def may_quantize(name: str, shape: Shape) -> bool:
    """Whether llama.cpp's quantizer touches the tensor: weights of two axes and more, but for a list of names."""
    is_matrix = prod(shape[:-1]) > 1
    return is_matrix and name.endswith("weight") and not _NOT_QUANTIZED.search(name)


def fitting_type(kind: Kind, columns: int) -> Kind:
    """`kind`, or what takes its place where its blocks do not divide a row; F16 where no blocks do."""
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    other = _FALLBACKS.get(kind, Kind.F16)
    return other if columns % GGML_QUANT_SIZES[other][0] == 0 else Kind.F16


def mixed_types(quant: str, base: Kind, tensors: Mapping[str, Shape], size: ModelSize) -> dict[str, Kind]:
    """The expected type, before `fitting_type`, of every tensor that may be quantized, in file order.

    `quant` is the name of the mix in lower case (q4_k_m), `base` its type for whatever no rule names. These are
    the rules of `llama_tensor_get_type_impl`; Falcon's exceptions, which is not written here, are left out.
    """
    is_tied = _OUTPUT not in tensors
    num_values = sum(_is_value(name) for name in tensors)
    seen_values = seen_downs = 0
    types: dict[str, Kind] = {}
    for name in sorted((n for n in tensors if may_quantize(n, tensors[n])), key=file_order):
        if name == _OUTPUT or (is_tied and name in _EMBEDDINGS):
            types[name] = _head_type(base, tensors[name][-1])
        elif _is_value(name):
            types[name] = _value_type(quant, base, seen_values, num_values, size)
            seen_values += 1
        elif "attn_k.weight" in name:
            types[name] = Kind.Q8_0 if size.experts == 8 else base
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


def _head_type(base: Kind, columns: int) -> Kind:
    if base == Kind.Q8_0 or columns % GGML_QUANT_SIZES[base][0]:
        return Kind.Q8_0
    return Kind.Q6_K


def _value_type(quant: str, base: Kind, layer: int, layers: int, size: ModelSize) -> Kind:
    if size.experts == 8:
        return Kind.Q8_0
    kind = base
    if quant == "q3_k_m":
        kind = Kind.Q5_K if layer < 2 else Kind.Q4_K
    elif quant in ("q4_k_m", "q5_k_m") and _is_favored(layer, layers):
        kind = Kind.Q6_K
    elif quant == "q4_k_s" and layer < 4:
        kind = Kind.Q5_K
    if size.has_eightfold_values and kind in (Kind.Q3_K, Kind.Q4_K):
        return Kind.Q5_K
    return kind


def _down_type(quant: str, base: Kind, layer: int, layers: int) -> Kind:
    if quant == "q3_k_m":
        return Kind.Q5_K if layer < layers // 16 else Kind.Q4_K
    if quant in ("q4_k_m", "q5_k_m") and _is_favored(layer, layers):
        return Kind.Q6_K
    if quant == "q4_k_s" and layer < layers // 8:
        return Kind.Q5_K
    return base


def _attention_output_type(quant: str, base: Kind, size: ModelSize) -> Kind:
    if size.experts == 8:
        return Kind.Q5_K if quant in ("q3_k_m", "q4_k_s", "q4_k_m") else base
    return Kind.Q4_K if quant == "q3_k_m" else base
