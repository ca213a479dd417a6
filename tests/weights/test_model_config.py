"""Configs in both spellings: mlx-lm and transformers must compute the same model from one dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from macft.errors import ModelError
from macft.weights.model_config import check_window, normalize_config, read_config

TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_theta": 123456.0, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 123456.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LOCAL = {"rope_theta": 4321.0, "rope_type": "default"}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
# model type -> (what its config adds, whether mlx-lm goes wrong when the config is not normalized)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"rope_parameters": ROPE}, True),
    "llama3_scaling": ("llama", {"rope_parameters": LLAMA3}, True),
    "linear_scaling": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}, True),
    "qwen2": ("qwen2", {"rope_parameters": ROPE}, True),
    "qwen3": ("qwen3", {"rope_parameters": ROPE, "head_dim": 32}, False),
    "mistral": ("mistral", {"rope_parameters": ROPE, "sliding_window": 64}, True),
    "mixtral": ("mixtral", {"rope_parameters": ROPE, **MOE}, True),
    "phi3": ("phi3", {"rope_parameters": ROPE}, True),
    "phi3_partial": ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, True),
    "smollm3": ("smollm3", {"rope_parameters": ROPE, "num_hidden_layers": 5}, True),
    "smollm3_window": (
        "smollm3",
        {
            "rope_parameters": ROPE, "use_sliding_window": True, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        True,
    ),
    "gemma2": (
        "gemma2",
        {"rope_parameters": ROPE, "sliding_window": 64, "head_dim": 32, "tie_word_embeddings": True},
        True,
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": LOCAL},
            "num_hidden_layers": 7, "sliding_window": 16, "head_dim": 32,
        },
        True,
    ),
    "gemma3_every_third": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": LOCAL,
            },
            "num_hidden_layers": 4, "sliding_window": 16, "head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
        True,
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"rope_parameters": ROPE, **MOE, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
        True,
    ),
}  # fmt: skip


def saved_model(folder: Path, case: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A random model as transformers saves it: its config.json, and its logits [tokens, vocab]."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra, _ = MODELS[case]
    # deep copies: transformers fills defaults into the dictionaries it is given
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps({**TINY, **extra})))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return read_config(folder), torch_logits(model)


TOKENS = [[(7 * i * i + 3 * i) % 97 for i in range(48)]]


def torch_logits(model: Any) -> np.ndarray[Any, Any]:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor(TOKENS)).logits[0].numpy())


def mlx_logits(folder: Path, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    with mx.stream(mx.cpu):
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        weights: dict[str, Any] = {}
        for path in folder.glob("*.safetensors"):
            weights |= mx.load(str(path))
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        model.load_weights(list(weights.items()))
        return np.array(model(mx.array(TOKENS))[0].astype(mx.float32))


@pytest.mark.torch
@pytest.mark.mlx
@pytest.mark.parametrize("case", MODELS)
def test_a_normalized_config_gives_both_engines_the_same_logits(tmp_path: Path, case: str) -> None:
    config, expected = saved_model(tmp_path, case)
    found = mlx_logits(tmp_path, normalize_config(config))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-4 * max(scale, 1.0)


@pytest.mark.torch
@pytest.mark.mlx
@pytest.mark.parametrize("case", [case for case, (_, _, is_wrong) in MODELS.items() if is_wrong])
def test_mlx_lm_goes_wrong_without_normalizing(tmp_path: Path, case: str) -> None:
    """The reason for normalize_config; once this fails for a type, mlx-lm has learned the new spelling."""
    config, expected = saved_model(tmp_path, case)
    try:
        found = mlx_logits(tmp_path, config)
    except (TypeError, IndexError):  # a required key is missing, or a layer that is not there
        return
    assert np.abs(found - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.torch
@pytest.mark.parametrize("case", MODELS)
def test_transformers_computes_the_same_from_the_normalized_config(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    config, expected = saved_model(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps(normalize_config(config)))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert np.array_equal(torch_logits(again), expected)
    assert normalize_config(normalize_config(config)) == normalize_config(config)


@pytest.mark.torch
@pytest.mark.parametrize("case", MODELS)
def test_the_old_spelling_alone_means_the_same_model(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    config, expected = saved_model(tmp_path, case)
    old = normalize_config(config)
    for key in ("rope_parameters", "dtype", "num_local_experts"):
        old.pop(key, None)
    renewed = normalize_config(old)
    assert renewed.get("rope_theta") == 123456.0
    (tmp_path / "config.json").write_text(json.dumps(renewed))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert np.array_equal(torch_logits(again), expected)


@pytest.mark.torch
@pytest.mark.mlx
@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("mistral", {}),
        ("mixtral", MOE),
        ("gemma2", {"head_dim": 32, "tie_word_embeddings": True}),
        ("phi3", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "head_dim": 32}),
    ],
)
def test_mlx_lm_ignores_the_windows_that_are_refused(
    tmp_path: Path, model_type: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the window both engines agree, past it they do not: check_window draws the line there."""
    window = len(TOKENS[0])
    for sliding_window, agrees in ((window, True), (window - 8, False)):
        entry = (model_type, {"rope_parameters": ROPE, "sliding_window": sliding_window, **extra}, True)
        monkeypatch.setitem(MODELS, "window", entry)
        config, expected = saved_model(tmp_path / str(sliding_window), "window")
        found = mlx_logits(tmp_path / str(sliding_window), normalize_config(config))
        assert (np.abs(found - expected).max() < 1e-4 * max(np.abs(expected).max(), 1.0)) == agrees
        if agrees:
            check_window(config, window)
        else:
            with pytest.raises(ModelError, match=f"cutoff_len is {window}, but {model_type} attends over"):
                check_window(config, window)
            check_window(config, sliding_window)


def test_a_window_that_is_switched_off_is_no_reason_to_refuse() -> None:
    check_window({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, 4096)
    check_window({"model_type": "mistral", "sliding_window": None}, 4096)
    check_window({"model_type": "gemma3_text", "sliding_window": 16}, 4096)


def test_layers_and_scalings_that_mlx_lm_cannot_follow_are_refused() -> None:
    uneven = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="layer_types"):
        check_window({"model_type": "gemma3_text", "layer_types": uneven}, 16)
    long_rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    with pytest.raises(ModelError, match="longrope"):
        check_window({"model_type": "phi3", "rope_parameters": long_rope}, 2048)


def test_a_published_llama_config_gains_the_new_spelling() -> None:
    old = {"model_type": "llama", "rope_theta": 500000.0, "torch_dtype": "bfloat16",
           "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                            "original_max_position_embeddings": 8192, "rope_type": "llama3"}}  # fmt: skip
    new = normalize_config(old)
    assert new["rope_parameters"] == {**old["rope_scaling"], "rope_theta": 500000.0}
    assert new["dtype"] == "bfloat16"
    assert {key: new[key] for key in ("rope_theta", "torch_dtype")} == {
        "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert "rope_parameters" not in old


def test_a_config_without_any_rope_base_takes_the_one_of_transformers() -> None:
    # mlx-lm would take 1e6 for qwen2, transformers takes 1e4
    assert normalize_config({"model_type": "qwen2"})["rope_theta"] == 10_000.0
    assert normalize_config({"model_type": "smollm3"})["rope_parameters"]["rope_theta"] == 2_000_000.0
    assert "rope_theta" not in normalize_config({"model_type": "gpt2"})


def test_spellings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ModelError, match="dtype is 'float16' but torch_dtype is 'float32'"):
        normalize_config({"model_type": "llama", "dtype": "float16", "torch_dtype": "float32"})
    with pytest.raises(ModelError, match=r"rope_theta is 1\.0 but rope_parameters says 2\.0"):
        normalize_config({"model_type": "llama", "rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}})


def test_a_bad_config_file_gives_one_clear_line(tmp_path: Path) -> None:
    for content, message in (
        (None, "a model folder needs config.json"),
        ('{"model_type": "llama",\n oops}', "config.json line 2: not JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ("{}", '"model_type" is None'),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError) as caught:
            read_config(tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
