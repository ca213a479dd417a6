"""Turn a LoRA adapter into the GGUF form that llama.cpp takes with --lora, and Ollama as ADAPTER."""

from __future__ import annotations

import numpy as np

from macft.errors import ModelError, join_problems
from macft.gguf.architectures import ARCHITECTURES
from macft.gguf.exporter.tensors import module_rule
from macft.gguf.format import Field, GgufModel
from macft.weights.adapters.peft import Adapter
from macft.weights.adapters.shapes import EMBEDDING, LINEAR, scale_of, split_modules
from macft.weights.model_config import Config
from macft.weights.tensors.lazy import Array, LazyTensor, from_array

_HEAD = "output"


def adapter_to_gguf(config: Config, adapter: Adapter) -> GgufModel:
    """The GGUF form of an adapter (of mlx-lm too: it has been read into PEFT's form) on a model with this config.json.

    W + alpha / rank * B A is what llama.cpp computes, with one alpha for the file, so alpha is scale x rank, for
    rsLoRA too. Where the rows of a matrix have another order in GGUF (q and k of llama), B's rows have it. Raises
    ModelError, naming every module, for what such a file cannot hold: DoRA, modules trained in full, adapters on
    embeddings, on a head that is the embedding, on single experts.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise ModelError(f"{adapter.folder}: adapters on {config.get('model_type')} cannot be GGUF files")
    problems: list[str] = []
    if adapter.config.use_dora:
        problems.append("use_dora: DoRA scales the rows of the sum, which llama.cpp cannot express")
    problems += [f"{name} is of the model itself (modules_to_save, bias, trained tokens)" for name in adapter.own.names]
    modules = split_modules(adapter.state, adapter.config.use_dora, problems)
    if not modules:
        problems.append("holds no LoRA tensors")
    scale = scale_of(adapter.config.rank, adapter.config.alpha, adapter.config.use_rslora)
    tensors: list[LazyTensor] = []
    for module, parts in modules.items():
        if parts.keys() & {*EMBEDDING}:
            problems.append(f"{module} is an embedding, which llama.cpp may share with the head")
        elif set(parts) >= set(LINEAR):
            tensors += _pair(config, module, parts[LINEAR[0]], parts[LINEAR[1]] * np.float32(scale != 0), problems)
    if problems:
        way = "merge the adapter instead: macft export gguf MODEL --adapter DIR, without --adapter-only"
        raise ModelError(join_problems(f"{adapter.folder}: cannot be a GGUF adapter; {way}", problems))
    fields: dict[str, Field] = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "general.name": adapter.folder.name,
        "adapter.type": "lora",
        # llama.cpp reads an alpha of 0 as a scale of 1; B is zero then
        "adapter.lora.alpha": float(scale * adapter.config.rank or adapter.config.rank),
    }
    return GgufModel(architecture.name, fields, tensors)


def _pair(config: Config, module: str, a: Array, b: Array, problems: list[str]) -> list[LazyTensor]:
    """A [rank, columns] and B [rows, rank] of a module under their GGUF names; [] and a line more in `problems`."""
    try:
        name, change = module_rule(config, module)
        if name == _HEAD and config.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma")):
            raise ModelError(f"{module} is the embedding too, so the GGUF file has no separate head")
        if change is not None:
            b = np.ascontiguousarray(change(b))
    except ModelError as error:
        problems.append(str(error))
        return []
    except ValueError:
        problems.append(f"{module}: B has {b.shape[0]} rows, which are not those of the heads of this model")
        return []
    return [from_array(f"{name}.weight.lora_a", a), from_array(f"{name}.weight.lora_b", b)]
