"""Export a model folder with its adapters as GGUF files, and note what a user should know about them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from macft.errors import ModelError, join_problems
from macft.gguf.exporter.lora import adapter_to_gguf
from macft.gguf.exporter.tensors import architecture_of, to_gguf
from macft.gguf.exporter.tensors import notes as architecture_notes
from macft.gguf.format import Field, GgufModel
from macft.gguf.vocabulary.fields import required_name, sampling_fields, tokenizer_fields
from macft.gguf.vocabulary.files import read_vocabulary
from macft.gguf.writing.writer import Written, write_gguf
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.fitting import fit, tokenizer_folder, without_copies
from macft.weights.adapters.merge import merge_adapters
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder
from macft.weights.layouts.mlx import as_hf
from macft.weights.model_config import read_config
from macft.weights.source import open_model
from macft.weights.tensors.lazy import LazyTensor

logger = logging.getLogger("macft")

# Under 6 bits a weight. The figures are docs/export.md's, and those of its verification with the quickstart's adapter.
_COARSE = ("q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m")
_SMALL = 1_000_000_000
_PHI = re.compile("phi-?3", re.IGNORECASE)
_SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True)
class GgufReport:
    """The files written, and lines a user should read, warnings among them."""

    files: tuple[Written, ...]
    notes: tuple[str, ...]


def export_gguf(
    model: ModelFolder,
    adapters: Sequence[Adapter],
    outputs: Mapping[str, Path],
    *,
    template: str | None,
    check: Callable[[str, Path], None] | None = None,
) -> GgufReport:
    """Write a model, adapters merged, as one GGUF file for each quantization of `outputs`, in one pass.

    `template` is the Jinja chat template to embed; the notes are logged before anything is written. Raises ModelError
    for an unknown architecture and for weights or tokenizer files that do not fit, and what `check` raises of a
    quantization and its file, which has no name yet; nothing is then left behind.
    """
    gguf, notes = read_gguf_model(model, adapters, template=template, quants=outputs)
    for note in notes:
        logger.warning(note)
    written = write_gguf(gguf, outputs, if_not_finite=if_not_finite(model, adapters), check=check)
    return GgufReport(tuple(written), tuple(notes))


def if_not_finite(model: ModelFolder, adapters: Sequence[Adapter]) -> str:
    """What NaN among the weights means, for `write_gguf`."""
    if not adapters:
        return f"{model.name} is broken; download it again"
    return f"{model.name} or an adapter on it is broken; download or train it again"


def read_gguf_model(
    model: ModelFolder, adapters: Sequence[Adapter], *, template: str | None, quants: Collection[str]
) -> tuple[GgufModel, list[str]]:
    """(The model in GGUF form, none of its weights read yet, notes for the user on it and on these quantizations.)"""
    given_config, tensors = as_hf(open_model(model.path, exact=True))
    architecture_of(given_config)
    adapters = [without_copies(adapter, tensors) for adapter in adapters]
    fitted = fit(given_config, tensors, adapters)
    config, merged = fitted.config, merge_adapters(fitted.tensors, fitted.adapters)
    vocabulary = read_vocabulary(tokenizer_folder(model.path, adapters), config)
    vocab_rows = len(vocabulary.tokens.texts)
    gguf = to_gguf(config, merged, vocab_rows=vocab_rows)
    rows = _embedding_rows(gguf, vocab_rows)
    fields: dict[str, Field] = {"general.architecture": gguf.architecture, "general.type": "model"}
    fields |= sampling_fields(model.path)
    fields["general.name"] = _name(model, adapters, required_name(vocabulary))
    fields["general.size_label"] = _size_label(gguf.tensors)
    fields |= gguf.fields
    fields |= tokenizer_fields(vocabulary, config, template=template, vocab_rows=rows)
    notes = [*architecture_notes(config), *_notes(model, adapters), *fitted.notes]
    notes += _coarse_notes(gguf.tensors, quants)
    return GgufModel(gguf.architecture, fields, gguf.tensors), notes


def export_lora(model: ModelFolder, adapter: Adapter, output: Path) -> GgufReport:
    """Write an adapter as the LoRA file that llama.cpp takes with `--lora`; in float32, as its base is at run time."""
    config, tensors = as_hf(open_model(model.path, exact=True))
    adapter = without_copies(adapter, tensors)
    gguf = adapter_to_gguf(read_config(model.path), adapter)
    # nothing is merged: this raises what does not fit
    fitted = fit(config, tensors, [adapter])
    merge_adapters(fitted.tensors, fitted.adapters)
    notes = _notes(model, [adapter])
    broken = f"{adapter.folder} is broken; train it again"
    return GgufReport(tuple(write_gguf(gguf, {"f32": output}, if_not_finite=broken)), tuple(notes))


def _embedding_rows(gguf: GgufModel, vocab_rows: int) -> int:
    rows = next((tensor.shape[0] for tensor in gguf.tensors if tensor.name == "token_embd.weight"), None)
    if rows is None:
        raise ModelError(join_problems("no embedding among the tensors", [tensor.name for tensor in gguf.tensors[:5]]))
    if rows < vocab_rows:
        raise ModelError(
            f"the tokenizer has {vocab_rows} tokens and the embedding {rows} rows: they do not belong together; "
            "use the tokenizer the model was trained with"
        )
    return rows


def _name(model: ModelFolder, adapters: Sequence[Adapter], required: str | None) -> str:
    """The model's name; `required` in it makes llama.cpp treat special tokens as Phi-3's tokenizer does."""
    own = model.name.rstrip("/").rpartition("/")[2]
    name = " + ".join([own, *(adapter.folder.absolute().name for adapter in adapters)])
    if required is None:
        return _PHI.sub("Phi 3", name)
    return name if required in name.lower() else f"{name} ({required})"


def _coarse_notes(tensors: Sequence[LazyTensor], quants: Collection[str]) -> list[str]:
    """What too few bits do to a small model."""
    coarse = [quant for quant in quants if quant in _COARSE]
    if not coarse or _parameters(tensors) >= _SMALL:
        return []
    return [
        f"{', '.join(coarse)}: this hurts so small a model ({_size_label(tensors)} parameters): the likeliest next "
        "token of SmolLM2-135M stays the same at 67 to 86% of positions with q4_k_m, at 94% with q8_0; take --quant "
        "q8_0"
    ]


def _parameters(tensors: Sequence[LazyTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _size_label(tensors: Sequence[LazyTensor]) -> str:
    """The number of parameters as model names state it: 135M, 1.5B."""
    count = float(_parameters(tensors))
    scale, letter = next(((scale, letter) for scale, letter in _SIZES if count >= scale), (1.0, ""))
    value = count / scale
    return f"{value:.0f}{letter}" if value >= 10 or value == round(value) else f"{value:.1f}{letter}"


def _notes(model: ModelFolder, adapters: Sequence[Adapter]) -> list[str]:
    return [note for adapter in adapters if (note := other_base_note(adapter, model))]
