"""Convert an adapter folder of PEFT into one of mlx-lm, or the reverse."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.errors import ModelError, UsageError, join_problems
from macft.files import new_dir
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.experts import has_experts
from macft.weights.adapters.fitting import without_copies
from macft.weights.adapters.formats import AdapterFormat, adapter_format, read_any_adapter
from macft.weights.adapters.merge import merge_problems
from macft.weights.adapters.mlx_lm import refuse_own_tensors, write_mlx_adapter
from macft.weights.adapters.peft import Adapter, write_peft_adapter
from macft.weights.folder import ModelFolder
from macft.weights.layouts.mlx import flat_config, to_hf, to_mlx
from macft.weights.layouts.mlx_rules import EMBEDDING, HEAD
from macft.weights.source import Source, open_model
from macft.weights.tensors.lazy import LazyTensor, renamed

_BESIDE = ("chat_template.jinja", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


def convert_adapter(src: Path, dst: Path, to: AdapterFormat, base: ModelFolder | None = None) -> list[str]:
    """Convert an adapter folder of PEFT into one of mlx-lm, or the reverse, as the complete folder `dst` or nothing.

    With `base`, every tensor is checked against the model's. Returns notes for the user. Raises UsageError when
    there is nothing to convert or `dst` exists, ModelError for what does not fit or cannot be represented.
    """
    if dst.exists():
        raise UsageError(f"{dst}: exists already; name a folder that does not, or remove this one")
    if adapter_format(src) == to:
        raise UsageError(f"{src}: is already an adapter of {'mlx-lm' if to == 'mlx' else 'PEFT'}")
    base_config, notes = None, []
    if base is None:
        notes.append("no base was named: whether the adapter fits its base was not checked")
        adapter = read_any_adapter(src, with_saved=True)
    else:
        tensors, base_config = _hf_tensors(open_model(base.path))
        adapter = without_copies(read_any_adapter(src, base_config, with_saved=True), list(tensors.values()))
        if to == "mlx":
            refuse_own_tensors(adapter)
        _check_fit(adapter, base, tensors)
        if note := other_base_note(adapter, base):
            notes.append(note)
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
    """The model's tensors by HF name, with single experts and a tied head, and its config, which says if it ties."""
    config, tensors = flat_config(source.config), source.tensors
    if source.layout == "mlx":
        tensors = to_hf(config, tensors)
    elif has_experts(config):
        tensors = to_hf(config, to_mlx(config, tensors))
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = next((tensor for tensor in tensors if tensor.name.endswith(EMBEDDING)), None)
    config.setdefault("tie_word_embeddings", HEAD not in by_name)
    if HEAD not in by_name and embedding is not None:
        by_name[HEAD] = renamed(embedding, HEAD)
    return by_name, config


def _check_fit(adapter: Adapter, base: ModelFolder, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise ModelError that lists everything that does not fit the base."""
    if problems := merge_problems(tensors, adapter):
        trained_on = adapter.config.base or "another base"
        raise ModelError(join_problems(f"{adapter.folder}: made for {trained_on}, does not fit {base.name}:", problems))
