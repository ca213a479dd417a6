"""What `to_gguf` takes and refuses: layouts of experts, types of numbers, rows in parts, heads, problems of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from support.gguf_converter import Job, convert
from support.tiny_export import CASES, LLAMA3, YARN, exported, write_model

from macft.errors import ModelError
from macft.gguf.architectures import ARCHITECTURES
from macft.gguf.exporter.tensors import module_rule, notes, to_gguf
from macft.gguf.format import GgufModel
from macft.gguf.writing.mixes import is_always_f32
from macft.weights.layouts.mlx import as_hf, hf_config, mlx_config, to_hf, to_mlx
from macft.weights.source import open_model
from macft.weights.tensors.lazy import LazyTensor, from_array, renamed

Model = tuple[dict[str, Any], list[LazyTensor]]
pytestmark = pytest.mark.torch
FAMILIES = ("llama", "mixtral", "qwen2_moe", "qwen3_moe", "gemma3_text", "gpt_oss", "qwen3_next", "qwen3_5_moe_text")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """source("llama") is (config, tensors) of that case, built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Model:
        if name not in built:
            built[name] = write_model(tmp_path_factory.mktemp("model"), CASES[name])
        return as_hf(open_model(built[name]))

    return get


def export(model: Model, **changes: Any) -> GgufModel:
    config = {**model[0], **changes}
    return to_gguf(config, model[1], vocab_rows=config["vocab_size"])


def arrays(model: GgufModel) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.read() for tensor in model.tensors}


def assert_same(found: GgufModel, expected: GgufModel, rounding: float = 0.0) -> None:
    assert found.architecture == expected.architecture
    assert {key: str(value) for key, value in found.fields.items()} == {
        key: str(value) for key, value in expected.fields.items()
    }
    first, second = arrays(found), arrays(expected)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=0, atol=rounding, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_rows_in_parts_are_the_rows_of_the_whole(source: Callable[[str], Model], name: str) -> None:
    rng = np.random.default_rng(1)
    for tensor in export(source(name)).tensors:
        assert tensor.rows is not None, tensor.name
        inner = rng.integers(0, tensor.shape[0] + 1, 5)
        cuts = sorted({0, tensor.shape[0], *map(int, inner)})
        parts = [tensor.rows(start, stop) for start, stop in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), tensor.read(), err_msg=tensor.name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mlx_layout_of_a_model_exports_alike(source: Callable[[str], Model], name: str) -> None:
    """mlx-lm holds some norms plus one: taken back and added again they are rounded once more."""
    config, tensors = source(name)
    in_mlx = to_mlx(config, tensors)
    changed = mlx_config(config, in_mlx)
    back = hf_config(changed, in_mlx), to_hf(changed, in_mlx)
    assert_same(export(back), export((config, tensors)), rounding=2.4e-7)


@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"))
def test_experts_that_are_fused_as_transformers_has_them_in_memory_export_alike(
    source: Callable[[str], Model], name: str
) -> None:
    config, tensors = source(name)
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    by_name = {tensor.name: tensor for tensor in tensors}
    fused = [tensor for tensor in tensors if f".{block}.experts." not in tensor.name]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.{block}.experts"
        gate, up, down = (
            np.stack([by_name[f"{prefix}.{expert}.{part}.weight"].read() for expert in range(config["num_experts"])])
            for part in names
        )
        fused.append(from_array(f"{prefix}.gate_up_proj", np.concatenate([gate, up], axis=1)))
        fused.append(from_array(f"{prefix}.down_proj", down))
    assert_same(export((config, fused)), export((config, tensors)))


@pytest.mark.parametrize("name", ("qwen3_5_text", "qwen3_5_moe_text"))
def test_a_text_model_within_another_is_exported_alike(source: Callable[[str], Model], name: str) -> None:
    config, tensors = source(name)
    inner = {key: value for key, value in config.items() if key != "architectures"}
    wrapped = {"model_type": name.removesuffix("_text"), "text_config": inner, "vision_config": {"depth": 1}}
    moved = [renamed(tensor, tensor.name.replace("model.", "model.language_model.", 1)) for tensor in tensors]
    extra = [from_array(n, np.ones((2, 2), np.float32)) for n in ("model.visual.merger.weight", "mtp.fc.weight")]
    found = to_gguf(wrapped, [*moved, *extra], vocab_rows=config["vocab_size"])
    assert_same(found, export((config, tensors)))


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("name", ("llama", "gemma2", "qwen3_5_text"))
def test_sixteen_bit_weights_stay_as_they_are_and_norms_are_not_rounded(
    source: Callable[[str], Model], name: str, dtype: Any
) -> None:
    config, tensors = source(name)
    short = [from_array(tensor.name, tensor.read().astype(dtype)) for tensor in tensors]
    long = [from_array(tensor.name, tensor.read().astype(np.float32)) for tensor in short]
    found, expected = export((config, short)), export((config, long))
    for tensor, whole in zip(found.tensors, expected.tensors, strict=True):
        assert tensor.read().dtype == tensor.dtype
        assert tensor.dtype == dtype or is_always_f32(tensor.name, tensor.shape)
        np.testing.assert_array_equal(tensor.read().astype(np.float32), whole.read(), err_msg=tensor.name)


def test_numbers_that_gguf_does_not_have_become_float32(source: Callable[[str], Model]) -> None:
    config, tensors = source("llama")
    double = [from_array(tensor.name, tensor.read().astype(np.float64)) for tensor in tensors]
    assert {tensor.read().dtype for tensor in export((config, double)).tensors} == {np.dtype(np.float32)}


def test_old_and_new_spelling_of_rope_settings_export_alike(source: Callable[[str], Model]) -> None:
    config, tensors = source("llama, llama3")
    new = {key: value for key, value in config.items() if not key.startswith("rope_")}
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    old = {**new, "rope_theta": LLAMA3["rope_theta"], "rope_scaling": {**scaling, "type": "llama3"}}
    older = {**old, "rope_scaling": {**scaling, "rope_type": "llama3"}}
    newer = {**new, "rope_parameters": LLAMA3}
    for spelling in (old, older, newer):
        assert_same(export((spelling, tensors)), export((config, tensors)))


def test_only_gemma3_loses_rows_that_have_no_token(source: Callable[[str], Model]) -> None:
    for name, is_cut in (("gemma3_text, untied, linear, capped", True), ("gemma2", False), ("llama", False)):
        config, tensors = source(name)
        rows = config["vocab_size"]
        found = {tensor.name: tensor for tensor in to_gguf(config, tensors, vocab_rows=rows - 5).tensors}
        whole = {tensor.name: tensor for tensor in tensors}["model.embed_tokens.weight"].read()
        for key in {"token_embd.weight", "output.weight"} & found.keys():
            assert found[key].shape[0] == found[key].read().shape[0] == rows - 5 * is_cut
        np.testing.assert_array_equal(found["token_embd.weight"].read(), whole[: rows - 5 * is_cut])


def test_a_vocabulary_larger_than_the_embedding_is_refused(source: Callable[[str], Model]) -> None:
    config, tensors = source("llama")
    with pytest.raises(ModelError, match=r"493 tokens, but model.embed_tokens.weight only 492 rows"):
        to_gguf(config, tensors, vocab_rows=config["vocab_size"] + 1)


def with_head(tensors: list[LazyTensor], change: float = 0.0) -> list[LazyTensor]:
    embedding = next(tensor for tensor in tensors if tensor.name == "model.embed_tokens.weight").read()
    return [*tensors, from_array("lm_head.weight", embedding + np.float32(change))]


def test_a_copy_of_a_tied_head_is_left_out_if_it_is_one(source: Callable[[str], Model]) -> None:
    config, tensors = source("llama tied, biased")
    copied = export((config, with_head(tensors)))
    assert_same(copied, export((config, tensors)))
    assert "output.weight" not in arrays(copied)
    differing = export((config, with_head(tensors, 0.5)))
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        arrays(differing)
    untied = export((config, with_head(tensors, 0.5)), tie_word_embeddings=False)
    assert "output.weight" in arrays(untied)


def test_llama_cpp_gets_the_head_it_wants(source: Callable[[str], Model]) -> None:
    """qwen2moe and gpt-oss do not load without one, gemma2 has no place for it."""
    config, tensors = source("qwen2_moe")
    headless = [tensor for tensor in tensors if tensor.name != "lm_head.weight"]
    found = arrays(export((config, headless), tie_word_embeddings=True))
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])
    with pytest.raises(ModelError, match=r"lm_head.weight is missing"):
        export((config, headless), tie_word_embeddings=False)
    config, tensors = source("gemma2")
    with pytest.raises(ModelError, match=r"llama.cpp always ties the head of gemma2"):
        export((config, with_head(tensors)), tie_word_embeddings=False)


def test_all_tensors_that_do_not_fit_are_named_at_once(source: Callable[[str], Model]) -> None:
    config, tensors = source("llama")
    wrong = [from_array("model.layers.0.extra.weight", np.zeros(3, np.float32))]
    for tensor in tensors:
        if tensor.name == "model.layers.1.mlp.up_proj.weight":
            wrong.append(replace(tensor, shape=(95, 64)))
        elif tensor.name != "model.norm.weight":
            wrong.append(tensor)
    with pytest.raises(ModelError) as caught:
        export((config, wrong))
    lines = str(caught.value).splitlines()
    assert lines == [
        "the tensors do not make a llama model:",
        "  model.layers.0.extra.weight is not a tensor of llama",
        "  model.layers.1.mlp.up_proj.weight has shape [95, 64], [96, 64] was expected",
        "  model.norm.weight is missing",
    ]


ROPE, PART = {"rope_theta": 10000.0}, "partial_rotary_factor"
REFUSED = {
    "hidden_size is None": ("llama", {"hidden_size": None}),
    "max_position_embeddings is 'x'": ("llama", {"max_position_embeddings": "x"}),
    "rms_norm_eps is None": ("llama", {"rms_norm_eps": None}),
    "hidden_act is 'gelu'": ("llama", {"hidden_act": "gelu"}),
    "rope_type is 'longrope'": ("llama", {"rope_parameters": {**ROPE, "rope_type": "longrope"}}),
    "rope_type is 'llama3'": ("qwen2", {"rope_parameters": {**LLAMA3}}),
    "factor of the rope settings is None": ("qwen3", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "truncate is false": (
        "qwen3",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.0, "truncate": False}},
    ),
    "partial_rotary_factor is 0.5": ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "4 heads of 32 are not hidden_size 64": ("qwen2", {"head_dim": 32}),
    "norm_topk_prob is False": ("qwen3_moe", {"norm_topk_prob": False}),
    "norm_topk_prob is True": ("qwen2_moe", {"norm_topk_prob": True}),
    "some layers have no experts": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "no_rope_layers is not every fourth layer": ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}),
    "query_pre_attn_scalar is 24": ("gemma3_text", {"query_pre_attn_scalar": 24}),
    "layer_types is not every Nth": (
        "gemma3_text",
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5},
    ),
    "attn_logit_softcapping is None": ("gemma2", {"attn_logit_softcapping": None}),
    "4 heads of 16 do not go with 3 key heads": ("llama", {"num_key_value_heads": 3, "head_dim": 16}),
    "sliding_window is None": ("gpt_oss", {"sliding_window": None}),
    "no layer has a window": ("gemma2", {"layer_types": ["full_attention"] * 4}),
    "attn_logit_softcapping is 50.0": ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    "use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
    "long_factor has no numbers, 8 were expected": (
        "phi3",
        {"rope_parameters": {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8}},
    ),
    "linear_key_head_dim and linear_value_head_dim differ": ("qwen3_next", {"linear_value_head_dim": 32}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(source: Callable[[str], Model], message: str) -> None:
    name, changes = REFUSED[message]
    config, tensors = source(name)
    without = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", PART)}
    with pytest.raises(ModelError, match=message):
        export((without if "rope_parameters" in changes else config, tensors), **changes)


def test_what_has_no_exact_form_in_gguf_is_noted(source: Callable[[str], Model]) -> None:
    config, _ = source("mistral")
    assert notes(config) == []
    assert notes({**config, "sliding_window": 4096}) == [
        "the model attends over 4096 tokens, llama.cpp over all: beyond 4096 tokens answers can differ"
    ]
    config, _ = source("qwen2")
    assert notes({**config, "sliding_window": 4096, "use_sliding_window": False}) == []
    assert len(notes({**config, "sliding_window": 4096, "use_sliding_window": True})) == 1
    assert "more than 64 tokens" in notes(source("phi3, longrope")[0])[0]
    oss = {**source("gpt_oss, yarn")[0], "rope_parameters": {**YARN, "truncate": False}}
    assert "rounds the bounds" in notes(oss)[0]
    assert all(not notes(source(name)[0]) for name in ("llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_5_text"))


def test_an_unknown_model_type_is_refused_with_the_list() -> None:
    with pytest.raises(
        ModelError, match=r"model_type 'bert' cannot become a GGUF file \(known: llama, mistral, mixtral"
    ):
        to_gguf({"model_type": "bert"}, [], vocab_rows=1)
    assert ARCHITECTURES["qwen3_moe"].name == "qwen3moe"


@pytest.mark.parametrize("name", ("llama", "llama tied, biased", "qwen3", "phi3", "glm4", "smollm3"))
def test_a_module_becomes_the_matrix_that_its_rule_names(source: Callable[[str], Model], name: str) -> None:
    config, tensors = source(name)
    found = arrays(export((config, tensors)))
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    assert len(matrices) > 7
    for tensor in matrices:
        target, change = module_rule(config, tensor.name.removesuffix(".weight"))
        rows = tensor.read()
        np.testing.assert_array_equal(found[f"{target}.weight"], change(rows) if change else rows)


@pytest.mark.parametrize(
    ("name", "module"),
    (
        ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz"),
        ("qwen3_5_text", "model.layers.0.linear_attn.out_proj"),
        ("llama", "model.layers.0.self_attn.rotary"),
        ("llama", "model.norm"),
    ),
)
def test_a_module_without_a_matrix_of_its_own_is_refused(
    source: Callable[[str], Model], name: str, module: str
) -> None:
    with pytest.raises(ModelError, match=f"{module} has no matrix of its own"):
        module_rule(source(name)[0], module)


def test_the_same_tensors_stay_float32_as_in_llama_cpps_converter(tmp_path: Path) -> None:
    names = (
        "llama tied, biased",
        "qwen2_moe",
        "gemma3_text",
        "phi3, longrope",
        "gpt_oss",
        "qwen3_next",
        "qwen3_5_text",
    )
    folders = {name: write_model(tmp_path / str(index), CASES[name]) for index, name in enumerate(names)}
    jobs = [
        Job(str(folder), str(folder / "half.gguf"), "f16", pre="" if CASES[name].spm else "gpt-2")
        for name, folder in folders.items()
    ]
    convert(jobs)
    for folder in folders.values():
        reader = gguf.GGUFReader(folder / "half.gguf")
        expected = {tensor.name for tensor in reader.tensors if tensor.tensor_type.name == "F32"}
        model = exported(folder)
        assert {tensor.name for tensor in model.tensors if is_always_f32(tensor.name, tensor.shape)} == expected
        assert expected < {tensor.name for tensor in model.tensors}
