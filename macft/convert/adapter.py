"""An adapter folder of PEFT or mlx-lm in; the adapter, or a folder of it in the other's format, out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from macft.errors import ModelError, UsageError, join_problems
from macft.files import new_dir, write_json
from macft.weights.adapters.experts import fuse_experts, has_experts
from macft.weights.adapters.merge import merge_adapters
from macft.weights.adapters.mlx_lm import EMBED, HEAD, MLX_WEIGHTS_NAME, read_mlx_adapter, write_mlx_adapter
from macft.weights.adapters.peft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    metadata_of,
    peft_config,
    read_adapter,
    read_json_config,
)
from macft.weights.adapters.shapes import COPY, join_modules, split_modules
from macft.weights.folder import ModelFolder, weights_hash
from macft.weights.layouts.mlx import flat_config, to_hf, to_mlx
from macft.weights.source import Source, open_model
from macft.weights.tensors.lazy import LazyTensor, renamed
from macft.weights.tensors.stream import write_state

__all__ = ["adapter_format", "convert_adapter", "read_any_adapter", "write_mlx_adapter", "write_peft_adapter"]

AdapterFormat = Literal["mlx", "peft"]

_BESIDE = ("chat_template.jinja", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


def adapter_format(folder: Path) -> AdapterFormat:
    """Whose adapter this is, by its files; ModelError, with what was found, when it is neither's."""
    is_mlx, is_peft = ((folder / name).exists() for name in (MLX_WEIGHTS_NAME, WEIGHTS_NAME))
    if is_mlx and not is_peft:
        return "mlx"
    if is_peft and not is_mlx:
        return "peft"
    raw = read_json_config(folder)
    if "peft_type" in raw:
        return "peft"
    if "lora_parameters" in raw or "fine_tune_type" in raw:
        return "mlx"
    raise ModelError(
        f"{folder / CONFIG_NAME}: no peft_type and no lora_parameters; expected an adapter of PEFT ({WEIGHTS_NAME}) or "
        f"of mlx-lm ({MLX_WEIGHTS_NAME})"
    )


def read_any_adapter(
    folder: Path, base_config: Mapping[str, Any] | None = None, *, with_saved: bool = False
) -> Adapter:
    """Read an adapter of PEFT or mlx-lm; its state has PEFT's names and layout, one module for each expert.

    `base_config`, the base's config.json, is needed for adapters on embeddings, heads and experts, `with_saved` as in
    `read_adapter`. Raises ModelError that names everything in the folder that would be computed otherwise.
    """
    config = flat_config(base_config) if base_config is not None else None
    if adapter_format(folder) == "peft":
        return read_adapter(folder, config, with_saved=with_saved)
    return read_mlx_adapter(folder, config)


def write_peft_adapter(folder: Path, adapter: Adapter, base_config: Mapping[str, Any] | None = None) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them into an existing folder.

    Experts and routers become target_parameters. Returns notes for the user.
    """
    config = adapter.config
    problems: list[str] = []
    modules = split_modules(adapter.state, config.use_dora, problems)
    if problems:
        raise ModelError(join_problems(f"{adapter.folder}: PEFT cannot hold this adapter", problems))
    fused = fuse_experts(modules, base_config, config.rank)
    as_parameters = {name.rpartition(".")[0] for name in fused.parameters}
    targets = [name for name in fused.modules if name.removesuffix(".base_layer") not in as_parameters]
    content = peft_config(config) | {"target_modules": targets}
    notes: list[str] = []
    if fused.parameters:
        content |= {"target_parameters": list(fused.parameters), "lora_dropout": 0.0}
        if config.dropout:
            notes.append(f"lora_dropout is 0 in place of {config.dropout}: PEFT has none on experts")
    if fused.gate_up_rank != config.rank:
        key = "experts.gate_up_proj"
        content["rank_pattern"] = {key: fused.gate_up_rank}
        content["alpha_pattern"] = {key: config.alpha * fused.gate_up_rank / config.rank}
        notes.append(f"gate and up of the experts are one parameter in PEFT: its rank is {fused.gate_up_rank}")
    write_state(folder / WEIGHTS_NAME, join_modules(fused.modules), metadata=metadata_of("pt", adapter.base_hash))
    write_json(folder / CONFIG_NAME, content)
    return notes


def convert_adapter(src: Path, dst: Path, to: AdapterFormat, base: ModelFolder | None = None) -> list[str]:
    """Convert an adapter folder of PEFT into one of mlx-lm, or the reverse; whole as `dst`, or nothing.

    With `base` every tensor is checked against the model's own. Returns notes for the user. Raises UsageError
    when there is nothing to convert or `dst` exists, ModelError for what does not fit or cannot be held.
    """
    if dst.exists():
        raise UsageError(f"{dst}: exists already; name a folder that does not, or remove this one")
    if adapter_format(src) == to:
        raise UsageError(f"{src}: is an adapter of {'mlx-lm' if to == 'mlx' else 'PEFT'} already")
    base_config, notes = None, []
    if base is None:
        notes.append("no base was named: that the adapter fits its base was not checked")
        adapter = read_any_adapter(src)
    else:
        tensors, base_config = _hf_tensors(open_model(base.path))
        adapter = _fitted(read_any_adapter(src, base_config), base, tensors)
        if adapter.base_hash is not None and adapter.base_hash != weights_hash(base.path):
            notes.append(f"{src} was trained on {adapter.config.base}, whose weights are not those of {base.name}")
    with new_dir(dst) as folder:
        if to == "mlx":
            write_mlx_adapter(folder, adapter, base_config)
        else:
            notes += write_peft_adapter(folder, adapter, base_config)
        for pattern in _BESIDE:
            for file in sorted(src.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
    return notes


def _hf_tensors(source: Source) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The model's tensors by HF name, each expert and a tied head included, and its config, which says if it ties."""
    config, tensors = flat_config(source.config), source.tensors
    if source.layout == "mlx":
        tensors = to_hf(config, tensors)
    elif has_experts(config):
        tensors = to_hf(config, to_mlx(config, tensors))
    by_name = {tensor.name: tensor for tensor in tensors}
    head = f"{HEAD}.weight"
    embedding = next((tensor for tensor in tensors if tensor.name.endswith(f"{EMBED}.weight")), None)
    config.setdefault("tie_word_embeddings", head not in by_name)
    if head not in by_name and embedding is not None:
        by_name[head] = renamed(embedding, head)
    return by_name, config


def _fitted(adapter: Adapter, base: ModelFolder, tensors: Mapping[str, LazyTensor]) -> Adapter:
    """The adapter without copies of the base's own matrices; ModelError lists all that does not fit the base."""
    try:
        merge_adapters(list(tensors.values()), [adapter])
    except ModelError as error:
        problems = str(error).partition("\n")[2]
        trained_on = adapter.config.base or "another base"
        raise ModelError(f"{adapter.folder}: made for {trained_on}, does not fit {base.name}:\n{problems}") from None
    modules = split_modules(adapter.state, adapter.config.use_dora, [])
    for name, parts in modules.items():
        copy = parts.get(COPY)
        if copy is not None and np.array_equal(copy, tensors[f"{name}.weight"].read().astype(np.float32)):
            del parts[COPY]
    return replace(adapter, state=join_modules(modules))
