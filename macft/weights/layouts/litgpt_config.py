"""Translate litgpt's model_config.yaml into a Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.errors import ModelError, raise_problems

# Settings that no llama-like or phi-like model of transformers has, with the values that change nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "norm_qk_type": ("default",),
    "post_attention_norm": (False,),
    "post_mlp_norm": (False,),
    "attention_scores_scalar": (None,),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "rope_interleave": (False,),
    "rope_local_base_freq": (None,),
    "rope_indices": (None,),
    "scale_embeddings": (False,),
    "latent_attention": (None,),
    "norm_1": (True,),
    "norm_2": (True,),
    "n_expert": (0,),
}
# Settings that change nothing, or nothing without experts.
_IDLE = frozenset(
    {
        "name", "hf_config", "org", "vocab_size", "padding_multiple", "moe_intermediate_size", "n_expert_per_token",
        "n_shared_expert", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "first_k_dense_replace",
        "routed_scaling_factor", "norm_topk_prob", "rope_n_elem",
    }
)  # fmt: skip
_SIZES = (
    "n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size",
    "block_size",
)  # fmt: skip
_CHOICES = ("mlp_class_name", "norm_class_name", "parallel_residual", "bias", "rotary_percentage", "norm_eps")
# Settings with the value litgpt assumes when an older file lacks them.
_DEFAULTS: dict[str, Any] = {
    "shared_attention_norm": False,
    "attn_bias": False,
    "lm_head_bias": False,
    "norm_qk": False,
    "gelu_approximate": "none",
    "rope_base": 10000,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
}
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
_ACTIVATIONS = {"tanh": "gelu_new", "none": "gelu"}
# of the model types that a litgpt checkpoint can become
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclass(frozen=True)
class LitConfig:
    """Sizes of a litgpt model; `hf` is the config.json of the same model in HF layout."""

    model_type: str
    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    bias: bool  # of every linear layer in the blocks
    qkv_bias: bool
    has_qk_norms: bool
    hf: dict[str, Any]


def read_lit_config(path: Path, settings: Any) -> LitConfig:
    """Check the settings of model_config.yaml; ModelError lists everything that cannot be translated."""
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: holds a {type(settings).__name__}, expected a mapping")
    problems = [f"{key} is missing" for key in (*_SIZES, *_CHOICES) if settings.get(key) is None]
    raise_problems(f"{path}: not the configuration of a litgpt model:", problems)
    found = {**_DEFAULTS, **settings}
    problems += [
        f"{key} is {found[key]!r}, expected a whole number above 0"
        for key in _SIZES
        if type(found[key]) is not int or found[key] < 1
    ]
    problems += [
        f"{key} is {found[key]!r}, expected a number above 0"
        for key in ("rotary_percentage", "norm_eps", "rope_base", "rope_condense_ratio")
        if type(found[key]) not in (int, float) or not found[key] > 0
    ]
    raise_problems(f"{path}: not the configuration of a litgpt model:", problems)
    if found["n_head"] % found["n_query_groups"]:
        problems.append(f"n_head is {found['n_head']}, not a multiple of n_query_groups {found['n_query_groups']}")
    known = _IDLE.union(_HARMLESS, _SIZES, _CHOICES, _DEFAULTS)
    problems += [f"{key} is {value!r}, an unknown setting" for key, value in found.items() if key not in known]
    problems += [
        f"{key} is {found[key]!r}, which no HF layout has a place for"
        for key, harmless in _HARMLESS.items()
        if key in found and found[key] not in harmless
    ]
    model_type = _model_type(found, problems)
    _check_family(model_type, found, problems)
    rope = _rope(found, problems)
    headline = f"{path}: this model cannot be converted (llama-like and phi-like models can):"
    raise_problems(headline, problems)
    return LitConfig(
        model_type=model_type,
        layers=found["n_layer"],
        width=found["n_embd"],
        inner=found["intermediate_size"],
        heads=found["n_head"],
        groups=found["n_query_groups"],
        head_size=found["head_size"],
        vocabulary=found["padded_vocab_size"],
        bias=bool(found["bias"]),
        qkv_bias=bool(found["bias"] or found["attn_bias"]),
        has_qk_norms=bool(found["norm_qk"]),
        hf=_hf(model_type, found, rope),
    )


def _model_type(found: dict[str, Any], problems: list[str]) -> str:
    name = str(found.get("name") or "")
    form = tuple(
        found[key] for key in ("mlp_class_name", "norm_class_name", "parallel_residual", "shared_attention_norm")
    )
    if form == ("GptNeoxMLP", "LayerNorm", True, True):
        return "phi"
    if form != ("LLaMAMLP", "RMSNorm", False, False) or "Gemma" in name:
        problems.append(
            f"{name}: {found['mlp_class_name']}, {found['norm_class_name']}, parallel_residual "
            f"{found['parallel_residual']} is neither llama-like nor phi-like"
        )
        return "llama"
    if name.lower().startswith(("phi-3", "phi-4")):
        return "phi3"
    if found["norm_qk"]:
        return "qwen3"
    if found["attn_bias"] and not found["bias"]:
        return "qwen2"
    return "mistral" if _has_window(found) else "llama"


def _has_window(found: dict[str, Any]) -> bool:
    """Whether a sliding window is narrower than the longest sequence."""
    window = found["sliding_window_size"]
    return isinstance(window, int) and window < found["block_size"]


def _check_family(model_type: str, found: dict[str, Any], problems: list[str]) -> None:
    """Add problems with what this model type has no setting for."""
    rotary = found["rotary_percentage"]
    if model_type not in ("phi", "phi3") and rotary != 1.0:
        problems.append(f"rotary_percentage is {rotary}, but {model_type} rotates whole heads")
    if bool(found["lm_head_bias"]) != (model_type == "phi"):
        problems.append(f"lm_head_bias is {found['lm_head_bias']}, which {model_type} cannot have")
    if model_type == "phi" and not found["bias"]:
        problems.append("bias is False, but phi has biases")
    if model_type in ("mistral", "qwen3", "phi3") and (found["bias"] or found["attn_bias"]):
        problems.append(f"bias or attn_bias is set, but {model_type} has none")
    if model_type in ("phi", "phi3", "qwen2") and found["head_size"] * found["n_head"] != found["n_embd"]:
        problems.append(f"head_size is {found['head_size']}, but {model_type} has n_embd / n_head")
    if found["norm_qk"] and model_type != "qwen3":
        problems.append(f"norm_qk is set, but {model_type} does not normalize queries")
    if model_type == "phi" and found["gelu_approximate"] not in _ACTIVATIONS:
        problems.append(f"gelu_approximate is {found['gelu_approximate']!r}; expected {' or '.join(_ACTIVATIONS)}")
    _check_window(model_type, found, problems)


def _check_window(model_type: str, found: dict[str, Any], problems: list[str]) -> None:
    if _has_window(found):
        layers = (found["sliding_window_indices"] or [1] * found["n_layer"])[: found["n_layer"]]
        if model_type not in ("mistral", "phi3"):
            problems.append(f"sliding_window_size is {found['sliding_window_size']}, but {model_type} has no window")
        elif set(layers) != {1}:
            problems.append("sliding_window_indices leaves out layers, but the window of these models is on all")


def _rope(found: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(found["rope_base"]), "rope_type": "default"}
    adjustments, ratio = found["rope_adjustments"], found["rope_condense_ratio"]
    if adjustments is not None and ratio != 1:
        problems.append("rope_adjustments and rope_condense_ratio are both set")
    elif ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio)}
    elif isinstance(adjustments, dict) and set(adjustments) == {"factor"}:
        rope |= {"rope_type": "linear", "factor": float(adjustments["factor"])}
    elif isinstance(adjustments, dict) and set(adjustments) == _LLAMA3_ROPE:
        rest = {key: value for key, value in adjustments.items() if key != "original_max_seq_len"}
        length = adjustments["original_max_seq_len"]
        rope |= {"rope_type": "llama3", **rest, "original_max_position_embeddings": length}
    elif adjustments is not None:
        problems.append(f"rope_adjustments is {adjustments!r}; known are only factor, and {', '.join(_LLAMA3_ROPE)}")
    if found["rotary_percentage"] != 1.0:
        rope["partial_rotary_factor"] = float(found["rotary_percentage"])
    return rope


def _hf(model_type: str, found: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": found["padded_vocab_size"],
        "hidden_size": found["n_embd"],
        "intermediate_size": found["intermediate_size"],
        "num_hidden_layers": found["n_layer"],
        "num_attention_heads": found["n_head"],
        "num_key_value_heads": found["n_query_groups"],
        "max_position_embeddings": found["block_size"],
        "rope_parameters": rope,
    }
    if model_type == "phi":
        own = {"hidden_act": _ACTIVATIONS[found["gelu_approximate"]], "layer_norm_eps": found["norm_eps"]}
        return {**config, **own, "qk_layernorm": False}
    config |= {"hidden_act": "silu", "rms_norm_eps": found["norm_eps"]}
    if model_type in ("llama", "mistral", "qwen3"):
        config["head_dim"] = found["head_size"]
    if model_type == "llama":
        config |= {"attention_bias": bool(found["bias"]), "mlp_bias": bool(found["bias"])}
    if model_type in ("mistral", "phi3"):
        config["sliding_window"] = found["sliding_window_size"] if _has_window(found) else None
    if model_type in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    if model_type == "qwen3":
        config["attention_bias"] = False
    if model_type == "phi3":
        config["original_max_position_embeddings"] = found["block_size"]
    return config
