"""Open a litgpt checkpoint of a llama-like or phi-like model in Hugging Face layout, without reading its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from macft.errors import ModelError, raise_problems
from macft.weights.layouts.litgpt_config import LitConfig, read_lit_config
from macft.weights.model_config import normalize_config, read_config
from macft.weights.source import Source
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows, renamed
from macft.weights.tensors.torch_pickle import open_torch_file

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"

_HEAD = "lm_head.weight"
_EMBEDDING = "transformer.wte.weight"
_ROWS = 4096  # compared at a time
_LLAMA = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_PHI = {
    "norm_1": "input_layernorm",
    "attn.proj": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
# modules outside the blocks: (litgpt, Hugging Face); phi has another name for its last norm
_WHOLE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_litgpt(folder: Path) -> bool:
    """Whether a folder is a litgpt checkpoint."""
    return folder.is_dir() and ((folder / WEIGHTS).is_file() or (folder / CONFIG).is_file())


def open_litgpt(folder: Path) -> Source:
    """Open the checkpoint's model, its numbers unchanged.

    litgpt stores q, k and v of a layer as one matrix (one after the other; in older versions group by group) and
    stores the head even when it is the embedding. Raises ModelError for a file that is missing, damaged or
    pickles more than tensors, and for a model that is neither llama-like nor phi-like, with every reason.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; a litgpt checkpoint folder has {CONFIG}, {WEIGHTS}")
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{folder / CONFIG}: not readable as YAML: {' '.join(str(error).split())[:160]}") from None
    lit = read_lit_config(folder / CONFIG, settings)
    found = {tensor.name: tensor for tensor in open_torch_file(folder / WEIGHTS)}
    _refuse_adapters(folder, found)
    found = _modern(lit, found)
    shapes = dict(_shapes(lit))
    _check(folder, lit, found, shapes)
    is_tied = lit.model_type != "phi" and _are_equal(found[_HEAD], found[_EMBEDDING])
    tensors = [part for name in shapes if not (is_tied and name == _HEAD) for part in _converted(lit, name, found)]
    config = {**lit.hf, **_token_ids(folder), "tie_word_embeddings": is_tied, "dtype": found[_EMBEDDING].dtype.name}
    return Source(folder, normalize_config(config), "hf", tensors, None, frozenset())


def litgpt_notes(folder: Path) -> tuple[str, ...]:
    """Notes for the user on what a checkpoint folder holds and a model folder has no place for."""
    if not (folder / "prompt_style.json").is_file() or (folder / "chat_template.jinja").is_file():
        return ()
    return ("litgpt's prompt_style.json has no place in a model folder: name a chat template with --template",)


def _refuse_adapters(folder: Path, found: dict[str, LazyTensor]) -> None:
    if any("lora_" in name for name in found):
        raise ModelError(f"{folder / WEIGHTS}: holds LoRA matrices besides the model; run `litgpt merge_lora` first")
    if any("adapter" in name or "gating_factor" in name for name in found):
        raise ModelError(
            f"{folder / WEIGHTS}: holds an adapter of a kind that only litgpt has; there is no HF layout for it"
        )


def _modern(lit: LitConfig, found: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors with q, k, v of old checkpoints (attn.attn, group by group) in today's order (attn.qkv)."""
    result = {}
    for name, tensor in found.items():
        new = name.replace(".attn.attn.", ".attn.qkv.")
        result[new] = tensor if new == name else _regrouped(lit, new, tensor)
    return result


def _regrouped(lit: LitConfig, name: str, tensor: LazyTensor) -> LazyTensor:
    """Reorder [q.. k v] of each group to all q, all k, all v."""

    def read() -> Array:
        groups = tensor.read().reshape(lit.groups, lit.heads // lit.groups + 2, lit.head_size, *tensor.shape[1:])
        parts = groups[:, :-2], groups[:, -2], groups[:, -1]
        return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in parts])

    return LazyTensor(name, tensor.dtype, tensor.shape, read)


def _shapes(lit: LitConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of litgpt's model with its shape, in the order in which they are written."""
    width, inner = lit.width, lit.inner
    rows = (lit.heads + 2 * lit.groups) * lit.head_size
    yield _EMBEDDING, (lit.vocabulary, width)
    is_phi = lit.model_type == "phi"
    modules: dict[str, tuple[tuple[int, ...], bool]] = {"norm_1": ((width,), is_phi)}
    modules["attn.qkv"] = (rows, width), lit.qkv_bias
    if lit.has_qk_norms:
        modules |= {"attn.norm_q": ((lit.head_size,), False), "attn.norm_k": ((lit.head_size,), False)}
    modules["attn.proj"] = (width, lit.heads * lit.head_size), lit.bias
    if is_phi:
        modules["mlp.fc"] = (inner, width), lit.bias
    else:
        modules |= {"norm_2": ((width,), False), "mlp.fc_1": ((inner, width), lit.bias)}
        modules["mlp.fc_2"] = (inner, width), lit.bias
    modules["mlp.proj"] = (width, inner), lit.bias
    for layer in range(lit.layers):
        for module, (shape, has_bias) in modules.items():
            yield f"transformer.h.{layer}.{module}.weight", shape
            if has_bias:
                yield f"transformer.h.{layer}.{module}.bias", shape[:1]
    yield "transformer.ln_f.weight", (width,)
    if is_phi:
        yield "transformer.ln_f.bias", (width,)
    yield _HEAD, (lit.vocabulary, width)
    if is_phi:
        yield "lm_head.bias", (lit.vocabulary,)


def _check(folder: Path, lit: LitConfig, found: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is not a tensor of this model" for name in found if name not in shapes]
    for name, shape in shapes.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name].shape != shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, expected {list(shape)}")
    headline = f"{folder / WEIGHTS}: the tensors do not match the {lit.model_type} model of {CONFIG}:"
    raise_problems(headline, problems)


def _converted(lit: LitConfig, name: str, found: dict[str, LazyTensor]) -> list[LazyTensor]:
    """What one of litgpt's tensors becomes: usually one tensor with another name."""
    tensor = found[name]
    module, _, kind = name.rpartition(".")
    if module in _WHOLE:
        new = "model.final_layernorm" if (lit.model_type, module) == ("phi", "transformer.ln_f") else _WHOLE[module]
        return [renamed(tensor, f"{new}.{kind}")]
    layer, _, module = module.removeprefix("transformer.h.").partition(".")
    block = f"model.layers.{layer}"
    if lit.model_type == "phi3":
        if module == "attn.qkv":
            return [renamed(tensor, f"{block}.self_attn.qkv_proj.{kind}")]
        if module == "mlp.fc_1":
            return [_joined(f"{block}.mlp.gate_up_proj.{kind}", tensor, found[name.replace("fc_1", "fc_2")])]
        if module == "mlp.fc_2":
            return []
    if module == "attn.qkv":
        query, group = lit.heads * lit.head_size, lit.groups * lit.head_size
        starts = {"q_proj": (0, query), "k_proj": (query, group), "v_proj": (query + group, group)}
        return [_cut(f"{block}.self_attn.{new}.{kind}", tensor, *place) for new, place in starts.items()]
    names = _PHI if lit.model_type == "phi" else _LLAMA
    return [renamed(tensor, f"{block}.{names[module]}.{kind}")]


def _cut(name: str, tensor: LazyTensor, start: int, count: int) -> LazyTensor:
    shape = (count, *tensor.shape[1:])
    return from_rows(name, tensor.dtype, shape, lambda first, last: read_rows(tensor, start + first, start + last))


def _joined(name: str, first: LazyTensor, second: LazyTensor) -> LazyTensor:
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return LazyTensor(name, first.dtype, shape, lambda: np.concatenate([first.read(), second.read()]))


def _are_equal(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two matrices hold the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        read_rows(first, start, stop).tobytes() == read_rows(second, start, stop).tobytes()
        for start in range(0, first.shape[0], _ROWS)
        for stop in [min(start + _ROWS, first.shape[0])]
    )


def _token_ids(folder: Path) -> dict[str, Any]:
    """The ids of special tokens from config.json, which litgpt keeps of a model it downloaded; None without it."""
    found = read_config(folder) if (folder / "config.json").is_file() else {}
    return {key: found.get(key) for key in _TOKENS}
