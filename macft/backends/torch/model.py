"""Load a transformers model from a folder, in the precision of this device."""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from macft.backends.base import ModelSpec
from macft.backends.batch_layout import rope_problem
from macft.backends.shared import initial_value
from macft.backends.torch.attention import needs_repeated_heads, use_repeated
from macft.backends.torch.device import compute_dtype, idle_gpus_note, pick_device
from macft.backends.torch.out_of_memory import explaining_out_of_memory
from macft.errors import MacftError, MissingPackageError, ModelError
from macft.weights.layouts.mlx import LAYOUTS, as_hf
from macft.weights.model_config import check_text_model, read_config
from macft.weights.quantization.affine import LOAD_GROUP_SIZE, quantization_of, roundtrip_affine
from macft.weights.quantization.fp8 import fp8_of
from macft.weights.source import open_model, rewritten
from macft.weights.tensors.lazy import Array, LazyTensor, from_rows, read_rows


@dataclass(frozen=True)
class LoadedTorchModel:
    """A transformers model on its device, its compute type, and what the user should be told."""

    model: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    notes: list[str]
    rope_problem: str | None  # why rows cannot hold several examples


def load(spec: ModelSpec, device: torch.device | None = None) -> LoadedTorchModel:
    """Load a folder in HF or MLX layout, quantized or not, in the precision of the device."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # some containers switch float32 products to TF32, which has 10 bits
    torch.set_float32_matmul_precision("highest")
    device = device or pick_device()
    notes = idle_gpus_note(device)
    dtype = compute_dtype(spec.precision, device, notes)
    # A fully trained model keeps float32 weights and computes in `dtype` under autocast.
    weight_dtype = torch.float32 if spec.full else dtype
    try:
        with explaining_out_of_memory(device, f"loading the weights in {str(dtype)[6:]}", "load"):
            model = _from_folder(spec, device, weight_dtype, notes).to(device)
    except MacftError:
        raise
    except Exception as error:  # any problem of a foreign loader
        architecture = read_config(spec.folder)["model_type"]
        raise ModelError(
            f"{spec.folder}: the torch backend cannot load this {architecture} model: transformers says: "
            f"{' '.join(str(error).split())[:160].rstrip('.')}; give a causal language model"
        ) from error
    model.config.use_cache = False
    _train_every_row(model)
    if needs_repeated_heads(device, dtype):
        use_repeated(model)
    problem = rope_problem(read_config(spec.folder), spec.max_length)
    return LoadedTorchModel(model, device, dtype, notes, problem)


def _from_folder(spec: ModelSpec, device: torch.device, dtype: torch.dtype, notes: list[str]) -> torch.nn.Module:
    config = read_config(spec.folder)
    check_text_model(config)
    if spec.from_scratch:
        return _started(config, spec.seed, dtype)
    if quantization_of(config) is not None:
        notes.append("the MLX-quantized base is dequantized: PyTorch has no kernels for it")
        return _from_tensors(spec.folder, *_dequantized(spec.folder), dtype)
    if spec.quantization_bit is None:
        source = rewritten(spec.folder)
        if source is None:
            return _pretrained(spec, dtype, device)
        return _from_tensors(spec.folder, source.config, source.tensors, dtype)
    if device.type == "cuda":
        if fp8_of(config) is not None:
            raise ModelError(
                f"{spec.folder}: held in fp8, which bitsandbytes cannot quantize again; leave quantization_bit out, or "
                f"write it unquantized first: macft convert model {spec.folder} NEW --to hf"
            )
        return _pretrained(spec, dtype, device, _bitsandbytes(spec.quantization_bit, dtype))
    notes.append(
        f"quantization_bit {spec.quantization_bit}: values are rounded to MLX's affine groups, then computed dense"
    )
    return _from_tensors(spec.folder, *_roundtripped(spec.folder, spec.quantization_bit), dtype)


def _train_every_row(model: torch.nn.Module) -> None:
    """Give the padding token's row of an embedding its gradient: in texts it is a token like any other, often eos."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _empty(config: PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """A model whose parameters have no values yet."""
    with no_init_weights():
        return AutoModelForCausalLM.from_config(_with_pad_inside(config), dtype=dtype)


def _with_pad_inside(config: PretrainedConfig) -> PretrainedConfig:
    """The config without a padding token that the embedding has no row for, on which PyTorch would fail."""
    # phi3's default is 32000, whatever the vocabulary
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not 0 <= pad < config.vocab_size:
        config.pad_token_id = None
    return config


def _started(config: dict[str, Any], seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """A model that was never trained."""
    model = _empty(AutoConfig.for_model(**config), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(initial_value(config, seed, name, parameter.shape)))
    model.tie_weights()
    return model.eval()


def _pretrained(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, quantization: BitsAndBytesConfig | None = None
) -> torch.nn.Module:
    """Load a model as its files say, straight to its device.

    Tensors that the files lack, which transformers would draw at random, are an error.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        spec.folder,
        config=_with_pad_inside(AutoConfig.from_pretrained(spec.folder)),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        quantization_config=quantization,
        # else transformers would apply an adapter that lies in the folder: this is where it looks for one instead
        adapter_kwargs={"subfolder": "no-adapter"},
        # through the host's memory a model of 8 billion parameters would pass whole
        device_map=None if device.type == "cpu" else {"": device},
    )
    if invalid := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ModelError(
            f"{spec.folder}: {len(invalid)} tensors that the torch backend expects in this {model.config.model_type} "
            f"model are missing or of another shape, {invalid[0]} first; download it again, or correct config.json"
        )
    return model


def _dequantized(folder: Path) -> tuple[dict[str, Any], list[LazyTensor]]:
    """(config, float32 tensors) of an MLX-quantized folder, in the HF layout where MLX's own is known."""
    source = open_model(folder, exact=True)
    stacked = next((tensor.name for tensor in source.tensors if ".switch_mlp." in tensor.name), None)
    if stacked:
        raise ModelError(
            f"{folder}: {stacked} is a stack of experts in MLX's own layout, which only MLX can load; for PyTorch: "
            f"macft convert model {folder} NEW --to hf"
        )
    return as_hf(source) if source.config["model_type"] in LAYOUTS else (source.config, source.tensors)


def _roundtripped(folder: Path, bits: int) -> tuple[dict[str, Any], list[LazyTensor]]:
    """(config, tensors) of a folder, matrices rounded as MLX rounds them when it quantizes at load."""
    source = open_model(folder)
    return source.config, [_rounded(tensor, bits) for tensor in source.tensors]


def _rounded(tensor: LazyTensor, bits: int) -> LazyTensor:
    shape = tensor.shape
    if len(shape) != 2 or not tensor.name.endswith(".weight") or shape[-1] % LOAD_GROUP_SIZE:
        return tensor

    def rows(start: int, stop: int) -> Array:
        return roundtrip_affine(read_rows(tensor, start, stop), bits=bits, group_size=LOAD_GROUP_SIZE)

    return from_rows(tensor.name, np.dtype(np.float32), shape, rows)


def _from_tensors(
    folder: Path, config: dict[str, Any], tensors: list[LazyTensor], dtype: torch.dtype
) -> torch.nn.Module:
    """A model with these values; raises ModelError unless they are exactly those that it needs."""
    model = _empty(AutoConfig.for_model(**config), dtype)
    # a copy: arrays may be read-only views of the file
    state = {t.name: torch.from_numpy(np.array(t.read(), np.float32)).to(dtype) for t in tensors}
    tied = set(model.all_tied_weights_keys)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if lost := [*(name for name in missing if name not in tied), *unexpected]:
        raise ModelError(f"{folder}: tensors missing or unknown to {config['model_type']}: {', '.join(lost[:5])}")
    model.tie_weights()
    return model.eval()


def _bitsandbytes(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("quantization_bit on CUDA needs bitsandbytes: pip install bitsandbytes")
    # in 8 bits it says at every product that it casts to float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Keep only the inputs of the blocks and compute the rest again in the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized matrix counts as many as it stands for."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    # bitsandbytes packs two numbers of 4 bits into a byte
    return trainable, sum(
        math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in parameters
    )
