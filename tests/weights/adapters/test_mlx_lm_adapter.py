"""mlx-lm's adapters where macft reads them: on both engines, in round trips of any shape, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from support.engines import load_model
from support.tiny_adapters import mlx_adapter_logits, peft_logits, save_mlx, save_peft
from support.tiny_layouts import PROMPT
from support.tiny_models import write_model
from support.toy_backend import ENGINES, toy_settings, write_rows, write_toy_model

from macft.backends.adapters import spec_of_adapter
from macft.backends.base import ModelSpec
from macft.conversion.adapter import convert_adapter
from macft.data.batches import collate
from macft.data.tokenization.table import TokenizedExample
from macft.errors import ModelError
from macft.inference.load import ChatOptions, compare_answers
from macft.objectives.losses import Sft
from macft.training.run import train
from macft.weights.adapters.formats import read_any_adapter
from macft.weights.adapters.mlx_lm import write_mlx_adapter
from macft.weights.adapters.peft import Adapter, AdapterConfig, read_adapter, write_adapter, write_peft_adapter
from macft.weights.folder import ModelFolder
from macft.weights.model_config import read_config

pytestmark = pytest.mark.usefixtures("small_threads")


@pytest.fixture(scope="module")
def qwen2_model(tmp_path_factory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture
def adapter(qwen2_model, tmp_path) -> Path:
    """An adapter of mlx-lm on two linear layers of the last block."""
    save_mlx(qwen2_model, tmp_path / "mlx", keys=["self_attn.q_proj", "mlp.up_proj"], num_layers=1)
    return tmp_path / "mlx"


def our_logps(engine: str, base: Path, folder: Path) -> np.ndarray:
    """[T-1] of the prompt by one of our backends."""
    adapter = read_any_adapter(folder, read_config(base))
    backend = load_model(engine, ModelSpec(folder=base, lora=spec_of_adapter(adapter), precision="float32"))
    backend.set_trained_state(adapter.state)
    batch = collate([TokenizedExample(np.int32(PROMPT), np.arange(len(PROMPT)) > 0)])
    return backend.logps(batch, Sft().positions(batch))[0]


def logps_of(logits: np.ndarray) -> np.ndarray:
    """[T-1] log-probabilities of the prompt's own tokens."""
    shifted = logits[:-1].astype(np.float64) - logits[:-1].max(axis=1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logps[np.arange(len(PROMPT) - 1), PROMPT[1:]]


@pytest.mark.mlx
@pytest.mark.torch
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_mlx_lm_computes_the_same_on_our_engines(engine, dora, qwen2_model, tmp_path):
    save_mlx(qwen2_model, tmp_path / "mlx", keys=["self_attn.q_proj", "mlp.up_proj"], num_layers=1, dora=dora)
    expected = logps_of(mlx_adapter_logits(qwen2_model, tmp_path / "mlx"))
    assert np.abs(our_logps(engine, qwen2_model, tmp_path / "mlx") - expected).max() < 1e-5


@pytest.mark.mlx
@pytest.mark.torch
def test_what_our_mlx_engine_trains_computes_the_same_in_mlx_lm_and_peft(qwen2_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    train(toy_settings(qwen2_model, rows, tmp_path / "run", "mlx", max_steps=4))
    expected = logps_of(peft_logits(qwen2_model, tmp_path / "run"))
    assert convert_adapter(tmp_path / "run", tmp_path / "mlx", "mlx", ModelFolder("base", qwen2_model)) == []
    assert np.abs(logps_of(mlx_adapter_logits(qwen2_model, tmp_path / "mlx")) - expected).max() < 1e-5
    # the hash of the base and the template come along
    assert read_any_adapter(tmp_path / "mlx").base_hash == read_adapter(tmp_path / "run").base_hash
    assert (tmp_path / "mlx" / "chat_template.jinja").is_file()
    for engine in ("mlx", "torch"):
        assert np.abs(our_logps(engine, qwen2_model, tmp_path / "mlx") - expected).max() < 1e-5


@pytest.mark.mlx
@pytest.mark.torch
def test_what_peft_saves_computes_the_same_on_our_mlx_engine_also_by_way_of_mlx_lm(qwen2_model, tmp_path):
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2})
    expected = logps_of(save_peft(qwen2_model, config, tmp_path / "peft"))
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx", ModelFolder("base", qwen2_model))
    for folder in ("peft", "mlx"):
        assert np.abs(our_logps("mlx", qwen2_model, tmp_path / folder) - expected).max() < 1e-5


@pytest.mark.mlx
def test_training_goes_on_from_an_adapter_of_mlx_lm(qwen2_model, adapter, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    keys = {"adapter_name_or_path": str(adapter), "learning_rate": 1e-9, "max_steps": 1}
    run = toy_settings(qwen2_model, rows, tmp_path / "out", "mlx", **keys)
    run.model_fields_set.discard("lora_rank")
    train(run)
    before, after = read_any_adapter(adapter), read_adapter(tmp_path / "out")
    assert set(after.config.target_modules) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert before.state.keys() == after.state.keys()
    assert max(float(np.abs(before.state[name] - after.state[name]).max()) for name in before.state) < 1e-7


@pytest.mark.mlx
def test_compare_answers_with_an_adapter_of_mlx_lm(qwen2_model, adapter):
    conversations = [[{"role": "user", "content": "hello"}]]
    options = ChatOptions("mlx")
    assert list(compare_answers(str(qwen2_model), [str(adapter)], conversations, options, max_new_tokens=3)) == [
        str(qwen2_model),
        f"+ {adapter}",
    ]


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """A LoRA adapter on linear layers of any shape, of one rank."""
    rank = draw(st.integers(1, 5))
    use_dora = draw(st.booleans())
    names = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    each = st.tuples(st.integers(0, 11), st.sampled_from(names))
    modules = sorted({f"model.layers.{layer}.{name}" for layer, name in draw(st.sets(each, min_size=1, max_size=6))})
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    state = {}
    for module in modules:
        rows, columns = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        prefix = f"base_model.model.{module}"
        state[f"{prefix}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
        state[f"{prefix}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32)
        if use_dora:
            state[f"{prefix}.lora_magnitude_vector"] = rng.normal(size=rows).astype(np.float32)
    config = AdapterConfig(
        base=draw(st.sampled_from(["", "org/base"])),
        rank=rank,
        alpha=draw(st.floats(0.01, 500)),
        dropout=draw(st.sampled_from([0.0, 0.25])),
        target_modules=tuple(modules),
        use_rslora=draw(st.booleans()),
        use_dora=use_dora,
    )
    return Adapter(Path("random"), config, state, draw(st.sampled_from([None, "abc"])))


def scale_of(config: AdapterConfig) -> float:
    return config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)


@given(adapters())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_adapter_of_any_shape_survives_the_way_to_mlx_lm_and_back_to_the_bit(tmp_path_factory, adapter):
    folder = tmp_path_factory.mktemp("any")
    write_mlx_adapter(folder, adapter)
    found = read_any_adapter(folder)
    peft = folder / "peft"
    peft.mkdir()
    write_peft_adapter(peft, found)
    for back in (found, read_any_adapter(peft)):
        assert set(back.state) == set(adapter.state)
        assert all(np.array_equal(back.state[name], adapter.state[name]) for name in adapter.state)
        assert scale_of(back.config) == pytest.approx(scale_of(adapter.config), rel=1e-12)
        assert (back.config.rank, back.config.use_dora, back.config.base, back.base_hash) == (
            adapter.config.rank,
            adapter.config.use_dora,
            adapter.config.base,
            adapter.base_hash,
        )
        assert set(back.config.target_modules) == set(adapter.config.target_modules)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.floats(0.1, 30))


@given(st.lists(shapes, min_size=1, max_size=5), st.integers(1, 5), st.floats(0.1, 30), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_rank_and_scale_give_every_module_the_update_it_had(tmp_path_factory, modules, rank, alpha, use_rslora):
    folder = tmp_path_factory.mktemp("patterns")
    rng = np.random.default_rng(0)
    state, expected, ranks, alphas = {}, {}, {}, {}
    for index, (rows, columns, own_rank, own_alpha) in enumerate(modules):
        name = f"model.layers.{index}.q_proj"
        a, b = rng.normal(size=(own_rank, columns)), rng.normal(size=(rows, own_rank))
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
        ranks[f"layers.{index}.q_proj"], alphas[f"layers.{index}.q_proj"] = own_rank, own_alpha
        expected[name] = own_alpha / (own_rank**0.5 if use_rslora else own_rank) * (b @ a)
    write_adapter(folder, AdapterConfig("", rank, alpha, 0.0, ("q_proj",), use_rslora), state, None)
    content = json.loads((folder / "adapter_config.json").read_text())
    content |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    found = read_adapter(folder)
    for name, delta in expected.items():
        a, b = (found.state[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert len(a) == b.shape[1] == found.config.rank
        assert np.abs(scale_of(found.config) * (b @ a) - delta).max() < 1e-5 * max(1, np.abs(delta).max())


def edit(folder: Path, change) -> None:
    """Change the tensors of an adapter of mlx-lm."""
    path = folder / "adapters.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def configure(folder: Path, **keys) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


A = "model.layers.1.self_attn.q_proj.lora_a"
B = "model.layers.1.self_attn.q_proj.lora_b"
SHAPE = {"rank": 3, "scale": 1.0, "dropout": 0.0}


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "adapters.safetensors").write_bytes(b"12"), "not a readable safetensors file"),
        (
            lambda f: (f / "adapters.safetensors").write_bytes((f / "adapters.safetensors").read_bytes()[:-4]),
            "not a readable safetensors file",
        ),
        (lambda f: (f / "adapters.safetensors").unlink(), "no adapters.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda f: configure(f, fine_tune_type="full"), "fine_tune_type is full.*whole model"),
        (lambda f: configure(f, fine_tune_type="x"), "fine_tune_type is 'x'"),
        (lambda f: configure(f, fine_tune_type="dora"), "q_proj has lora_a, lora_b; expected lora_a, lora_b, m"),
        (lambda f: configure(f, lora_parameters=None), "lora_parameters is None"),
        (lambda f: configure(f, lora_parameters={"rank": 3, "alpha": 6}), "scale is None.*alpha / rank"),
        (lambda f: configure(f, lora_parameters=SHAPE | {"rank": 0}), "rank is 0"),
        (lambda f: configure(f, lora_parameters=SHAPE | {"rank": 4}), "not of rank 4"),
        (lambda f: configure(f, lora_parameters=SHAPE | {"dropout": "x"}), "dropout is 'x'"),
        (lambda f: edit(f, lambda s: s.pop(B)), "q_proj has lora_a; expected lora_a, lora_b"),
        (lambda f: edit(f, lambda s: s.clear()), "holds no LoRA tensors"),
        (lambda f: edit(f, lambda s: s.update({A: s[A] * np.nan})), "q_proj.lora_a holds NaN"),
        (lambda f: edit(f, lambda s: s.update({"lm_head.weight": s[A]})), "lm_head.weight is not a tensor of a LoRA"),
        (lambda f: edit(f, lambda s: s.update({A.replace("1", "9"): s[A], B.replace("1", "9"): s[B]})), "for layer 9"),
        (lambda f: edit(f, lambda s: s.update({A.replace("1", "0"): s[A], B.replace("1", "0"): s[B]})), "num_layers"),
    ],
)
def test_a_damaged_adapter_of_mlx_lm_is_named(spoil, said, qwen2_model, adapter):
    spoil(adapter)
    with pytest.raises(ModelError, match=rf"(?s){said}") as error:
        read_any_adapter(adapter, read_config(qwen2_model))
    assert str(adapter) in str(error.value)


@pytest.mark.mlx
def test_unknown_tensors_of_mlx_lm_are_all_listed(adapter):
    names = ("model.norm.weight", "lm_head.weight", "x")
    edit(adapter, lambda state: state.update(dict.fromkeys(names, np.ones(2, np.float32))))
    with pytest.raises(ModelError) as error:
        read_any_adapter(adapter)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == sorted(names)


@pytest.mark.mlx
def test_dora_on_an_embedding_of_mlx_lm_is_refused(tmp_path):
    base = write_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    save_mlx(base, tmp_path / "mlx", keys=["model.embed_tokens"], dora=True)
    with pytest.raises(ModelError, match=r"a norm for each token in mlx-lm.*fuse"):
        read_any_adapter(tmp_path / "mlx", read_config(base))


@pytest.mark.mlx
def test_without_its_base_an_adapter_on_experts_or_embeddings_is_refused(tmp_path):
    sizes = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    base = write_model(tmp_path / "base", "qwen3_moe", **sizes)
    for keys, said in ((["mlp.switch_mlp.up_proj"], "name the base"), (["model.embed_tokens"], "depends on the base")):
        folder = tmp_path / said
        save_mlx(base, folder, keys=keys)
        with pytest.raises(ModelError, match=said):
            read_any_adapter(folder)


def test_a_folder_that_is_no_adapter_and_a_pickled_one_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors.*adapters\.safetensors"):
        read_any_adapter(tmp_path)
    write_adapter(tmp_path, AdapterConfig("", 1, 1.0, 0.0, ("x",)), {}, None)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is pickled"):
        read_any_adapter(tmp_path)
