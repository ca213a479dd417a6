"""Save tiny random models of every exportable architecture, as transformers does, with a tokenizer."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Type

from macft.gguf.exporter.tensors import to_gguf
from macft.gguf.format import Field, GgufModel
from macft.weights.layouts.mlx import as_hf
from macft.weights.source import open_model
from support.tiny_gguf import write_spm_model
from support.tiny_tokenizer import write_tiny_model

WINDOW = 12
ROPE = {"rope_theta": 123456.0, "rope_type": "default"}
LOCAL = {"rope_theta": 5678.0, "rope_type": "default"}
LLAMA3 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {**ROPE, "rope_type": "linear", "factor": 4}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 3.3],
            "long_factor": [1.5, 2.0, 3.0, 4.5, 6.25, 8.0, 9.5, 11.3]}  # fmt: skip
TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}
MOE = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
GEMMA2 = {"num_hidden_layers": 4, "sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32,
          "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
          "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32,
          "rope_parameters": {"full_attention": ROPE, "sliding_attention": LOCAL}}  # fmt: skip
SHARED = {**MOE, "shared_expert_intermediate_size": 80}
HYBRID = {"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
          "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}  # fmt: skip
SECTIONS = {"rope_parameters": {**HYBRID["rope_parameters"], "mrope_section": [3, 3, 2]}}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Case:
    """A model type with settings under which every entry of the config shows in the logits.

    `differs` names fields, and "tensors", that the converter writes otherwise, each with the reason.
    `lengths` are those of the prompts on which llama.cpp and transformers are compared.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    spm: bool = False
    differs: dict[str, str] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 2, 11, 13, 40, 60)


_BASE = "the converter leaves gemma2's rope base out, and llama.cpp takes 10000 for it"
_PERIOD = "the converter leaves the period of the layers without a window out, and llama.cpp takes its own"
_ATTENTION = "llama.cpp overwrites yarn_attn_factor, which the converter writes; attn_factor works"
_NEXT = "the converter counts layers of multi-token prediction that are not among the tensors"
_MTP = {"block_count": _NEXT, "nextn_predict_layers": _NEXT}

CASES = {
    "llama": Case("llama", {"head_dim": 32}),
    "llama tied, biased": Case("llama", {**BIASED, **TIED}),
    "llama, llama3": Case("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama, linear": Case("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": Case("llama", {"rope_parameters": YARN}),
    "llama, yarn attention": Case(
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}},
        differs={"rope.scaling.attn_factor": _ATTENTION, "rope.scaling.yarn_attn_factor": _ATTENTION},
    ),
    "llama, dynamic": Case("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 32}, spm=True),
    "mixtral": Case("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}, spm=True),
    "qwen2": Case("qwen2"),
    "qwen2 tied, yarn": Case("qwen2", {**TIED, "rope_parameters": YARN}),
    "qwen3": Case("qwen3", {"head_dim": 32}),
    "qwen3 tied": Case("qwen3", {"head_dim": 32, **TIED}),
    "qwen2_moe": Case("qwen2_moe", {**MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "head_dim": 32}),
    "qwen3_moe tied": Case("qwen3_moe", {**MOE, "head_dim": 16, **TIED}),
    "gemma2": Case("gemma2", GEMMA2, spm=True, differs={"rope.freq_base": _BASE}),
    "gemma2, period 3": Case(
        "gemma2",
        {**GEMMA2, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        spm=True,
        differs={"rope.freq_base": _BASE, "attention.sliding_window_pattern": _PERIOD},
    ),
    "gemma3_text": Case("gemma3_text", GEMMA3, spm=True),
    "gemma3_text, untied, linear, capped": Case(
        "gemma3_text",
        {**GEMMA3, "tie_word_embeddings": False, "final_logit_softcapping": 2.0,
         "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
        spm=True,
    ),
    "gemma3_text, period 3": Case(
        "gemma3_text",
        {**GEMMA3, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
        spm=True,
        differs={"attention.sliding_window_pattern": _PERIOD},
    ),
    "phi3": Case("phi3", {"sliding_window": 2047}, spm=True),
    "phi3, longrope": Case(  # llama.cpp picks a table by its context size of 256, transformers by the text's length
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        spm=True,
        lengths=(65, 80, 100),
    ),
    "phi3 tied, partial": Case(
        "phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.75}, "num_key_value_heads": 4, **TIED}, spm=True
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 5, **TIED}),
    "smollm3 untied": Case("smollm3", {"num_hidden_layers": 4}),
    "glm4": Case("glm4", {"head_dim": 32, "attention_bias": True,
                          "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_oss": Case("gpt_oss", {"head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
                                "sliding_window": WINDOW, "num_hidden_layers": 4, "rope_parameters": ROPE}),
    "gpt_oss, yarn": Case("gpt_oss", {"head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
                                      "sliding_window": WINDOW, "num_hidden_layers": 2,
                                      "rope_parameters": YARN}),
    "qwen3_next": Case("qwen3_next", {**HYBRID, **SHARED}, differs=_MTP),
    "qwen3_5_text": Case("qwen3_5_text", {**HYBRID, **SECTIONS}, differs=_MTP),
    "qwen3_5_text tied, period 2": Case(
        "qwen3_5_text",
        {**HYBRID, **SECTIONS, **TIED, "num_hidden_layers": 3,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        differs={**_MTP, "full_attention_interval": "the converter takes 4 without the key, transformers layer_types"},
    ),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", {**HYBRID, **SHARED, **SECTIONS}, differs=_MTP),
}  # fmt: skip


def write_model(folder: Path, case: Case, dtype: str = "float32") -> Path:
    """A random model saved by transformers, with a small tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = write_spm_model(folder) if case.spm else len(_byte_level(folder))
    sizes = {
        "vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": ROPE, "tie_word_embeddings": False,
    }  # fmt: skip
    if case.model_type.startswith("gemma"):
        del sizes["tie_word_embeddings"]
    # a copy: transformers writes into the dictionaries of rope settings, which the cases share
    config = AutoConfig.for_model(case.model_type, **deepcopy({**sizes, **case.settings}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which would hide a missing one
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if "block_count" in case.differs:  # the converter stops without it
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "mtp_num_hidden_layers": 1}))
    return folder


def _byte_level(folder: Path) -> dict[str, int]:
    """The tokens of a tokenizer.json, among them one that llama.cpp's converter wants of glm4."""
    from tokenizers import Tokenizer

    path = str(write_tiny_model(folder) / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(path)
    found: dict[str, int] = tokenizer.get_vocab()
    return found


def exported(folder: Path, vocab_rows: int | None = None) -> GgufModel:
    """What `to_gguf` makes of a folder, whose tokenizer has a token for each row unless `vocab_rows` says less."""
    config, tensors = as_hf(open_model(folder))
    return to_gguf(config, tensors, vocab_rows=vocab_rows or config["vocab_size"])


def typed(value: Field) -> tuple[str, Any]:
    """(GGUF type, value) that a field is written as."""
    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    if type(value) in kinds:
        return kinds[type(value)].name, np.float32(value) if isinstance(value, float) else value
    assert isinstance(value, np.ndarray)
    return f"[{value.dtype}]", value.tolist()


def read_fields(reader: gguf.GGUFReader, architecture: str) -> dict[str, tuple[str, Any]]:
    """(type, value) of the fields that begin with the architecture's name, which is left out."""
    found = {}
    for key, entry in reader.fields.items():
        if key.startswith(f"{architecture}."):
            kind = entry.types[-1].name
            kind = f"[{entry.parts[entry.data[0]].dtype}]" if entry.types[0] == Type.ARRAY else kind
            found[key.removeprefix(f"{architecture}.")] = (kind, entry.contents())
    return found


def token_ids(folder: Path, count: int) -> list[int]:
    """Random token ids."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [int(token) for token in np.random.default_rng(3).integers(8, size, count)]


def end_tokens(file: gguf.GGUFReader) -> list[int]:
    """The ids that may end llama.cpp's answer: control tokens, and those with a role."""
    types = file.fields["tokenizer.ggml.token_type"].contents()
    roles = [entry.contents() for key, entry in file.fields.items() if key.endswith("_token_id")]
    return sorted({index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} | {*roles})


def plain_token(file: gguf.GGUFReader) -> int:
    """The id of a token that is a whole character: llama.cpp holds its numbers back until a character is whole."""
    found: int = file.fields["tokenizer.ggml.tokens"].contents().index("a")
    return found


def torch_logps(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary] log-probabilities of transformers, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    logps: np.ndarray[Any, Any] = torch.log_softmax(logits, -1).numpy()
    return logps


def torch_greedy(folder: Path, tokens: list[int], count: int, without: list[int]) -> list[int]:
    """The `count` likeliest tokens one after the other, none of them in `without`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1]
            logits[without] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[len(tokens) :]
