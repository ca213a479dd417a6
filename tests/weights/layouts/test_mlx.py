"""The layout table against mlx-lm's own sanitize, tensor by tensor, there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.tiny_layouts import CASES, bytes_of, mlx_array, mlx_bytes, mlx_model, write_case

from macft.docs import layout_table
from macft.errors import ModelError
from macft.weights.layouts.mlx import (
    LAYOUTS,
    hf_config,
    layout_of,
    lost_in_mlx,
    mlx_config,
    to_hf,
    to_mlx,
)
from macft.weights.layouts.mlx_rules import DROP_ROTARY, SHIFT_NORMS, is_shifted_norm
from macft.weights.source import Source, open_model
from macft.weights.tensors.lazy import LazyTensor, cast, from_array, renamed

pytestmark = pytest.mark.mlx

# mlx-lm knows its own files of these, and cannot read what transformers saves unquantized
NOT_SANITIZED = ("gpt_oss",)
# mlx-lm fails to load these with the copy of a tied head, which we drop
HEAD_TOO_MUCH = ("phi3", "olmoe", "qwen3_5_text")
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """source(case) is the case as transformers saved it, built once."""
    built: dict[str, Source] = {}

    def get(case: str) -> Source:
        if case not in built:
            built[case] = open_model(write_case(tmp_path_factory.mktemp("case"), case))
            assert built[case].layout == "hf"
        return built[case]

    return get


def fused_experts(tensors: list[LazyTensor]) -> list[LazyTensor]:
    """Experts of their own as transformers has them in memory: one tensor of gate over up, one of down, a layer."""
    experts = {tensor.name: tensor for tensor in tensors if ".mlp.experts." in tensor.name}
    rest = [tensor for tensor in tensors if tensor.name not in experts]
    for block in sorted({name.partition(".experts.")[0] for name in experts}):
        count = len({name.split(".")[5] for name in experts if name.startswith(f"{block}.")})

        def of(projection: str, block: str = block, count: int = count) -> np.ndarray:
            return np.stack([experts[f"{block}.experts.{e}.{projection}.weight"].read() for e in range(count)])

        gate_up = np.concatenate([of("gate_proj"), of("up_proj")], axis=1)
        rest.append(from_array(f"{block}.experts.gate_up_proj", gate_up))
        rest.append(from_array(f"{block}.experts.down_proj", of("down_proj")))
    return rest


def with_leftovers(case: str, source: Source) -> list[LazyTensor]:
    """The tensors with those that mlx-lm drops: the copy of a tied head, and a layer that predicts further tokens."""
    tensors = list(source.tensors)
    drops_head = "lm_head.weight" not in {t.name for t in tensors} and " tied" in case
    if drops_head and CASES[case][0] not in HEAD_TOO_MUCH:
        tensors += [
            renamed(tensor, "lm_head.weight") for tensor in tensors if tensor.name.endswith("embed_tokens.weight")
        ]
    if CASES[case][0].startswith(("qwen3_next", "qwen3_5")):
        tensors.append(from_array("mtp.layers.0.input_layernorm.weight", np.ones(64, np.float32)))
    if CASES[case][0] in ("llama", "qwen2", "smollm3", "olmo2"):
        tensors.append(from_array("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32)))
    return tensors


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_SANITIZED])
def test_the_table_gives_what_sanitize_gives(case, dtype, source):
    found = source(case)
    tensors = [cast(tensor, dtype) for tensor in with_leftovers(case, found)]
    if CASES[case][0] == "qwen3_5_moe_text":
        tensors = fused_experts(tensors)  # all that mlx-lm reads of this type
    config = mlx_config(found.config, tensors)
    sanitized = {tensor.name: mlx_array(tensor.read()) for tensor in tensors}
    model = mlx_model(config)
    if hasattr(model, "sanitize"):
        sanitized = model.sanitize(sanitized)
    ours = bytes_of(to_mlx(found.config, tensors))
    expected = mlx_bytes(sanitized)
    assert ours.keys() == expected.keys()
    assert [name for name in ours if ours[name] != expected[name]] == []


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_takes_every_tensor_and_misses_none(case, source):
    """Sanitize, which mlx-lm runs on its own files too, leaves them alone; loading is strict about names."""
    found = source(case)
    config = mlx_config(found.config, found.tensors)
    model = mlx_model(config)
    weights = {tensor.name: mlx_array(tensor.read()) for tensor in to_mlx(found.config, found.tensors)}
    before = mlx_bytes(weights)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    assert mlx_bytes(weights) == before
    model.load_weights(list(weights.items()), strict=True)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_to_the_bit(case, dtype, source):
    """But for norms that are shifted, of which a plain list of tensors keeps what one more leaves of their digits."""
    found = source(case)
    tensors = [cast(tensor, dtype) for tensor in found.tensors]
    there = to_mlx(found.config, tensors)
    config = mlx_config(found.config, tensors)
    back = to_hf(config, there)
    before, after = bytes_of(tensors), bytes_of(back)
    shifted = {tensor.name for tensor in tensors if is_shifted_norm(tensor)}
    if SHIFT_NORMS not in layout_of(config).rules:
        shifted = set()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name] and name not in shifted] == []
    arrays = {tensor.name: tensor.read().astype(np.float32) for tensor in back}
    finest = float(ml_dtypes.finfo(dtype).eps)
    for tensor in tensors:
        if tensor.name in shifted:
            # one and a norm of at most 0.5 lie below 2, where half a digit is eps / 2
            assert np.abs(arrays[tensor.name] - tensor.read().astype(np.float32)).max() <= finest / 2
    assert hf_config(config, there)["model_type"] == found.config["model_type"]


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe", "olmoe", "qwen3_next", "qwen3_5_moe_text"])
def test_experts_fused_as_in_memory_give_the_same_stacks(case, source):
    found = source(case)
    assert bytes_of(to_mlx(found.config, fused_experts(found.tensors))) == bytes_of(to_mlx(found.config, found.tensors))


def test_mixtral_as_transformers_holds_it_in_memory_is_read_too(source):
    found = source("mixtral")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    plain = []
    for tensor in found.tensors:
        name = tensor.name.replace("block_sparse_moe", "mlp")
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        plain.append(renamed(tensor, name))
    fused = fused_experts(plain)
    assert "model.layers.0.mlp.gate.weight" in {tensor.name for tensor in fused}
    assert bytes_of(to_mlx(found.config, fused)) == bytes_of(to_mlx(found.config, found.tensors))


def test_a_wrapped_qwen3_5_gives_the_text_model_and_names_what_is_lost(source):
    """As published: text_config inside, model.language_model before the names, a vision tower, mtp.*."""
    found = source("qwen3_5_text")
    text = {key: value for key, value in found.config.items() if key != "architectures"}
    wrapped: dict[str, Any] = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}}
    tensors = [renamed(t, t.name.replace("model.", "model.language_model.", 1)) for t in found.tensors]
    extra = [from_array(name, np.ones(3, np.float32)) for name in ("model.visual.norm.bias", "mtp.norm.weight")]
    assert lost_in_mlx(wrapped, tensors + extra) == ["model.visual.norm.bias", "mtp.norm.weight"]
    there = to_mlx(wrapped, tensors + extra)
    assert bytes_of(there) == bytes_of(to_mlx(found.config, found.tensors))
    config = mlx_config(wrapped, tensors + extra)
    assert config["model_type"] == "qwen3_5" and config["hidden_size"] == 64 and "vision_config" not in config
    back = to_hf(wrapped, there)
    assert [t.name for t in back] == [t.name for t in found.tensors]
    assert hf_config(wrapped, there)["model_type"] == "qwen3_5_text"


def test_nothing_is_read_before_it_is_asked_for(source):
    def unread() -> Any:
        raise AssertionError("was read")

    for case in CASES:
        found = source(case)
        closed = [replace(tensor, read=unread, rows=lambda *_: unread()) for tensor in found.tensors]
        config = mlx_config(found.config, closed)
        assert len(to_hf(config, to_mlx(found.config, closed))) == len(closed)


def test_an_expert_is_read_by_itself(source):
    """So that a stack is not read once an expert, nor held in memory."""
    found = source("qwen3_moe")
    asked: list[tuple[str, int, int]] = []

    def watched(tensor: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> Any:
            asked.append((tensor.name, start, stop))
            return tensor.rows(start, stop)

        return replace(tensor, rows=rows)

    there = [watched(tensor) for tensor in to_mlx(found.config, found.tensors)]
    by_name = {tensor.name: tensor for tensor in to_hf(mlx_config(found.config, there), there)}
    by_name["model.layers.1.mlp.experts.2.up_proj.weight"].read()
    assert asked == [("model.layers.1.mlp.switch_mlp.up_proj.weight", 2, 3)]


def test_an_unknown_model_type_is_refused_by_name_with_the_list():
    with pytest.raises(ModelError, match=r"model_type rwkv9: .* known are cohere, cohere2, .*qwen3_next, .*starcoder2"):
        to_mlx({"model_type": "rwkv9"}, [])


def test_problems_of_experts_are_named_all_at_once(source):
    found = source("qwen3_moe")
    missing = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors = [tensor for tensor in found.tensors if tensor.name != missing]
    tensors.append(from_array("model.layers.1.mlp.experts.4.up_proj.weight", np.ones((64, 64), np.float32)))
    other = "model.layers.1.mlp.experts.0.down_proj.weight"
    tensors = [from_array(other, np.ones((64, 65), np.float32)) if t.name == other else t for t in tensors]
    with pytest.raises(ModelError) as caught:
        to_mlx(found.config, tensors)
    message = str(caught.value)
    assert "model.layers.0.mlp.switch_mlp.up_proj.weight: no expert 2 of 4" in message
    assert "model.layers.1.mlp.switch_mlp.up_proj.weight: expert 4, but config.json has 4" in message
    assert "float32 [64, 64], float32 [64, 65]" in message


@pytest.mark.parametrize("case", ["qwen3_moe", "granitemoe", "mixtral", "gpt_oss", "qwen3_next", "qwen3_5_text"])
def test_a_model_in_the_mlx_layout_is_not_converted_twice(case, source):
    found = source(case)
    with pytest.raises(ModelError, match=r"MLX layout|not one of the unquantized experts"):
        to_mlx(found.config, to_mlx(found.config, found.tensors))


def test_a_model_in_the_hf_layout_is_not_shifted_back(source):
    found = source("qwen3_next")
    with pytest.raises(ModelError, match=r"linear_attn.conv1d.weight is \[128, 1, 4\]"):
        to_hf(found.config, found.tensors)


def test_a_tied_head_of_its_own_numbers_is_refused_when_read(source):
    found = source("llama tied")
    head = from_array("lm_head.weight", np.ones((199, 64), np.float32))
    there = {tensor.name: tensor for tensor in to_mlx(found.config, [*found.tensors, head])}
    assert "lm_head.weight" not in there
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        there["model.embed_tokens.weight"].read()


def test_a_config_that_does_not_say_is_untied_if_it_stores_a_head(source):
    """mlx-lm would take it for tied, and drop the head."""
    for case, tied in (("llama", False), ("llama tied", True)):
        found = source(case)
        silent = {key: value for key, value in found.config.items() if key != "tie_word_embeddings"}
        assert mlx_config(silent, found.tensors)["tie_word_embeddings"] is tied
        assert bytes_of(to_mlx(silent, found.tensors)) == bytes_of(to_mlx(found.config, found.tensors))


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("qwen2_moe", {"tie_word_embeddings": True}, "MLX cannot tie the head of qwen2_moe"),
        ("gemma2", {"tie_word_embeddings": False}, "MLX always ties the head of gemma2"),
        ("llama tied", {"tie_word_embeddings": False}, "no lm_head.weight, though"),
        ("qwen3_moe", {"num_experts": None, "num_local_experts": None}, "num_experts is None"),
    ],
)
def test_what_mlx_cannot_represent_is_refused(case, change, message, source):
    found = source(case)
    with pytest.raises(ModelError, match=message):
        to_mlx({**found.config, **change}, found.tensors)


def test_layers_in_an_order_mlx_cannot_run_are_refused(source):
    found = source("qwen3_next")
    kinds = ["linear_attention", "full_attention"] * 2
    assert mlx_config({**found.config, "layer_types": kinds}, found.tensors)["full_attention_interval"] == 2
    with pytest.raises(ModelError, match="layer_types does not have full_attention on every Nth layer"):
        mlx_config({**found.config, "layer_types": kinds[:2] + kinds[1::-1]}, found.tensors)


def test_every_model_type_is_tested_and_stands_once_in_the_printed_table():
    tested = {model_type for model_type, _ in CASES.values()}
    assert set(LAYOUTS) - tested == {"qwen3_5", "qwen3_5_moe"}  # the same entries as with _text
    rows = [line.split(" | ") for line in layout_table().splitlines()[2:]]
    assert sorted(", ".join(row[0].removeprefix("| ") for row in rows).split(", ")) == sorted(LAYOUTS)
    changes = {name: row[1] for row in rows for name in row[0].removeprefix("| ").split(", ")}
    for name, layout in LAYOUTS.items():
        for rule in layout.rules:
            assert (rule.note in changes[name]) == (rule is not DROP_ROTARY)
