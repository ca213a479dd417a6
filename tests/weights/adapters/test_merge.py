"""Merging adapters: against real PEFT, by hand, in transformers and mlx-lm; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from support.tiny_models import VOCABULARY, write_mlx_quantized, write_model
from transformers import AutoModelForCausalLM

from macft.conversion.merged import MergeReport, export_merged
from macft.errors import MacftError, ModelError
from macft.weights.adapters.fitting import fit
from macft.weights.adapters.merge import merge_adapters
from macft.weights.adapters.peft import Adapter, AdapterConfig, read_adapter
from macft.weights.folder import ModelFolder
from macft.weights.quantization.affine import dequantize_affine, quantize_affine
from macft.weights.tensors.lazy import LazyTensor, from_array
from macft.weights.writer import write_model as write

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {"target_modules": LINEARS},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "alpha 5.5, two modules": {"target_modules": ["v_proj", "up_proj"], "lora_alpha": 5.5},
}
# of a model whose head is its embedding
SHARED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "dora on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
}
TOKENS = torch.tensor([np.random.default_rng(0).integers(3, VOCABULARY, 24).tolist()])
# merged sums are rounded once more than the adapter's own path computes; logits here are of the order of 10
CLOSE = 1e-4


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits[0].float().numpy()


def mlx_logits_of(folder: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(TOKENS.numpy())).astype(mx.float32))[0]


def write_peft(base: Path, folder: Path, seed: int = 0, **settings) -> Path:
    """An adapter that PEFT itself made and saved, all its numbers random."""
    settings = {"r": 4, "lora_alpha": 8, **settings}
    torch.manual_seed(seed)
    model = get_peft_model(model_of(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def merge(base: Path, *adapters: Path, to: Path, **options) -> MergeReport:
    return export_merged(ModelFolder(base.name, base), [read_adapter(folder) for folder in adapters], to, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tied llama."""
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """An untied qwen2: biases on q, k and v."""
    return write_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="module")
def plain(qwen, tmp_path_factory) -> Path:
    return write_peft(qwen, tmp_path_factory.mktemp("plain"), target_modules=LINEARS)


# --- the same as PEFT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_the_merged_model_answers_as_base_and_adapter_do_in_peft(architecture, kind, tmp_path):
    base = write_model(tmp_path / "base", architecture)
    adapter = write_peft(base, tmp_path / "adapter", **KINDS[kind])
    report = merge(base, adapter, to=tmp_path / "merged")
    model = PeftModel.from_pretrained(model_of(base), adapter)
    expected, untouched = logits_of(model), logits_of(model_of(base))
    found = logits_of(model_of(tmp_path / "merged"))
    assert np.abs(expected - untouched).max() > 0.1
    assert np.abs(found - expected).max() < CLOSE
    assert report.modules == sum(".lora_A." in name for name in load_file(adapter / "adapter_model.safetensors"))
    theirs = {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(ours) == set(load_file(base / "model.safetensors"))
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_are_the_float32_sum_rounded_once(dtype, qwen, plain, tmp_path):
    half = tmp_path / "half"
    model_of(qwen, getattr(torch, dtype)).save_pretrained(half)
    merge(half, plain, to=tmp_path / "merged")
    exact = PeftModel.from_pretrained(model_of(half), plain).merge_and_unload().state_dict()
    found = model_of(tmp_path / "merged", getattr(torch, dtype)).state_dict()
    assert set(found) == set(exact)
    for name, value in found.items():
        assert value.dtype == getattr(torch, dtype), name
        rounded = exact[name].to(value.dtype)
        # where the float32 sums differ in their last digit, rounding may fall on the other side
        assert (value != rounded).float().mean() < 1e-3, name
        assert torch.allclose(value.float(), rounded.float(), rtol=2**-7 if dtype == "bfloat16" else 2**-10), name


@pytest.mark.parametrize("kind", SHARED)
def test_an_adapter_on_a_shared_embedding_unties_it_and_changes_what_it_was_trained_on(kind, llama, tmp_path):
    adapter = write_peft(llama, tmp_path / "adapter", **SHARED[kind])
    report = merge(llama, adapter, to=tmp_path / "merged")
    expected = logits_of(PeftModel.from_pretrained(model_of(llama), adapter))
    assert np.abs(logits_of(model_of(tmp_path / "merged")) - expected).max() < CLOSE
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("the result has two" in note for note in report.notes)


def test_a_shared_embedding_that_no_adapter_changes_stays_shared(llama, tmp_path):
    merge(llama, write_peft(llama, tmp_path / "adapter", target_modules=["q_proj"]), to=tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_several_adapters_are_merged_in_order_each_on_what_those_before_it_left(qwen, tmp_path):
    first = write_peft(qwen, tmp_path / "first", seed=1, target_modules=LINEARS)
    second = write_peft(qwen, tmp_path / "second", seed=2, target_modules=["q_proj", "o_proj"], use_dora=True)
    merge(qwen, first, second, to=tmp_path / "merged")
    model = PeftModel.from_pretrained(model_of(qwen), first).merge_and_unload()
    # PEFT sets the magnitude from the file, so this is the second adapter on the first one's result
    expected = logits_of(PeftModel.from_pretrained(model, second))
    assert np.abs(logits_of(model_of(tmp_path / "merged")) - expected).max() < CLOSE
    merge(qwen, second, first, to=tmp_path / "swapped")
    assert np.abs(logits_of(model_of(tmp_path / "swapped")) - expected).max() > 0.01


# --- other engines, other layouts


@pytest.mark.mlx
@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_mlx_lm_gives_the_merged_model_the_logits_transformers_gives_it(layout, qwen, plain, tmp_path):
    merge(qwen, plain, to=tmp_path / "merged", layout=layout)
    expected = logits_of(PeftModel.from_pretrained(model_of(qwen), plain))
    assert np.abs(mlx_logits_of(tmp_path / "merged") - expected).max() < 1e-3


@pytest.mark.mlx
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_base_is_dequantized_and_the_adapter_kept_whole(bits, qwen, plain, tmp_path):
    base = write_mlx_quantized(qwen, tmp_path / "base", bits)
    report = merge(base, plain, to=tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (qwen, tmp_path / "merged"))
    assert set(after) == set(before) and {value.dtype for value in after.values()} == {np.dtype(np.float32)}
    plain_base = tmp_path / "dequantized"
    export_merged(ModelFolder("base", base), [adapter_of_nothing(plain)], plain_base)
    expected = logits_of(PeftModel.from_pretrained(model_of(plain_base), plain))
    assert np.abs(logits_of(model_of(tmp_path / "merged")) - expected).max() < CLOSE
    assert np.abs(logits_of(model_of(plain_base)) - mlx_logits_of(base)).max() < 1e-3
    assert "quantization" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert report.adapter_loss is None and any("is quantized" in note for note in report.notes)


@pytest.mark.mlx
def test_an_mxfp4_base_is_dequantized_and_summed_in_float32(qwen, plain, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    base = tmp_path / "base"
    base.mkdir()
    model, config = quantize_model(*load_model(qwen), 32, 4, mode="mxfp4")
    save_model(base, model)
    save_config(config, base / "config.json")
    merge(base, plain, to=tmp_path / "merged")
    raw, state = mx.load(str(base / "model.safetensors")), load_file(plain / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    parts = (raw[f"{module}.weight"], raw[f"{module}.scales"])
    delta = 2 * state[f"base_model.model.{module}.lora_B.weight"] @ state[f"base_model.model.{module}.lora_A.weight"]
    expected = np.array(mx.dequantize(*parts, mode="mxfp4", dtype=mx.float32)) + delta
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{module}.weight"]
    assert found.dtype == ml_dtypes.bfloat16
    assert (found != expected.astype(ml_dtypes.bfloat16)).mean() < 1e-3
    assert np.abs(found.astype(np.float32) - expected).max() < 2**-8 * np.abs(expected).max()


def adapter_of_nothing(folder: Path) -> Adapter:
    """The adapter with B = 0."""
    adapter = read_adapter(folder)
    state = {name: value * (".lora_B." not in name) for name, value in adapter.state.items()}
    return Adapter(adapter.folder, adapter.config, state, None)


@pytest.mark.mlx
@pytest.mark.parametrize("_", range(3))  # threads meet otherwise each time
def test_requantizing_tells_the_measured_share_of_the_adapter_that_it_erased(_, qwen, tmp_path):
    base = write_mlx_quantized(qwen, tmp_path / "base", 4)
    adapter = write_peft(qwen, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    report = merge(base, adapter, to=tmp_path / "merged", layout="mlx", requantize=True)
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert {name: (value.dtype, value.shape) for name, value in old.items()} == {
        name: (value.dtype, value.shape) for name, value in new.items()
    }
    state = load_file(adapter / "adapter_model.safetensors")
    lost = merged = 0.0
    for name in (name for name in state if ".lora_A." in name):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = 2.0 * state[name.replace("lora_A", "lora_B")] @ state[name]
        weight = dequantize_affine(
            *(old[f"{module}.{part}"] for part in ("weight", "scales", "biases")), bits=4, group_size=64
        )
        back = dequantize_affine(
            *(new[f"{module}.{part}"] for part in ("weight", "scales", "biases")), bits=4, group_size=64
        )
        again = dequantize_affine(*quantize_affine(weight, bits=4, group_size=64), bits=4, group_size=64)
        lost += float(np.square(back - again - delta).sum())
        merged += float(np.square(delta).sum())
    assert report.adapter_loss == pytest.approx((lost / merged) ** 0.5, rel=1e-4) and report.adapter_loss > 0.1
    assert any("erased" in note and f"{report.adapter_loss:.0%}" in note for note in report.notes)
    assert np.isfinite(mlx_logits_of(tmp_path / "merged")).all()


@pytest.mark.mlx
def test_quantizing_the_result_equals_merging_and_then_quantizing_with_mlx_lm(qwen, plain, tmp_path):
    merge(qwen, plain, to=tmp_path / "whole")
    write_mlx_quantized(tmp_path / "whole", tmp_path / "theirs", 4)
    report = merge(qwen, plain, to=tmp_path / "ours", layout="mlx", bits=4)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert report.adapter_loss is not None and 0 < report.adapter_loss < 1


# --- the numbers, by hand


def adapter_with(state: dict[str, np.ndarray], rank: int = 1, alpha: float = 1.0, **settings) -> Adapter:
    config = AdapterConfig("base", rank, alpha, 0.0, ("x",), **settings)
    named = {f"base_model.model.{name}": np.asarray(value, np.float32) for name, value in state.items()}
    return Adapter(Path("adapter"), config, named, None)


def test_a_row_is_the_base_plus_scale_times_b_times_a():
    base = from_array("x.weight", np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32))
    adapter = adapter_with({"x.lora_A.weight": [[10, 100]], "x.lora_B.weight": [[1], [0], [2]]}, alpha=0.5)
    (merged,) = merge_adapters([base], [adapter])
    assert merged.read().tolist() == [[6, 52], [3, 4], [15, 106]]
    assert merged.rows is not None and merged.rows(2, 3).tolist() == [[15, 106]]


def test_dora_gives_each_row_the_length_of_its_magnitude():
    base = from_array("x.weight", np.array([[3.0, 0.0], [0.0, 1.0]], np.float32))
    state = {"x.lora_A.weight": [[0, 4]], "x.lora_B.weight": [[1], [0]], "x.lora_magnitude_vector": [10, 7]}
    (merged,) = merge_adapters([base], [adapter_with(state, use_dora=True)])
    assert merged.read() == pytest.approx(np.array([[6, 8], [0, 7]]))


def test_dora_on_an_embedding_measures_columns_of_what_earlier_adapters_left():
    base = from_array("x.weight", np.array([[2.0], [2.0]], np.float32))
    first = {"x.lora_embedding_A": [[1, 2]], "x.lora_embedding_B": [[1]]}
    second = {"x.lora_embedding_A": [[0, 0]], "x.lora_embedding_B": [[0]], "x.lora_magnitude_vector": [10]}
    (merged,) = merge_adapters([base], [adapter_with(first), adapter_with(second, use_dora=True)])
    # [3, 4] of length 5, made 10 long
    assert merged.read() == pytest.approx(np.array([[6], [8]]))
    assert merged.rows is not None and merged.rows(1, 2) == pytest.approx(np.array([[8]]))


def test_a_matrix_that_the_adapter_brings_along_takes_the_place_of_the_bases():
    """PEFT saves the matrix an embedding's adapter was trained on; a second adapter's copy lacks the first's sum."""
    base = from_array("x.weight", np.array([[1.0], [2.0]], np.float32))
    first = {"x.lora_A.weight": [[1]], "x.lora_B.weight": [[1], [1]], "x.base_layer.weight": [[10], [20]]}
    second = {**first, "x.base_layer.weight": [[10], [20]]}
    (merged,) = merge_adapters([base], [adapter_with(first), adapter_with(second)])
    assert merged.read().tolist() == [[12], [22]]
    with pytest.raises(ModelError, match=r"x: trained on \[3, 1\] in place of the model's \[2, 1\]"):
        merge_adapters([base], [adapter_with({**first, "x.base_layer.weight": [[1], [2], [3]]})])


def test_two_updates_in_bfloat16_are_rounded_once():
    # 256 + 0.75 + 0.75: each alone rounds back to 256 in bfloat16, whose step there is 2; together they do not
    base = from_array("x.weight", np.array([[256.0]], ml_dtypes.bfloat16))
    step = adapter_with({"x.lora_A.weight": [[0.75]], "x.lora_B.weight": [[1]]})
    (merged,) = merge_adapters([base], [step, step])
    assert merged.read().astype(float).tolist() == [[258.0]]


@pytest.mark.parametrize("shape", [(1, 40), (7, 300), (300, 7), (2500, 257), (40, 9000)])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_blocks_and_tiles_of_any_shape_sum_to_the_whole_product(shape, rank):
    rng = np.random.default_rng(rank)
    weight = rng.normal(size=shape).astype(np.float32)
    a, b = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
    adapter = adapter_with({"x.lora_A.weight": a, "x.lora_B.weight": b}, rank=rank, alpha=rank)
    (merged,) = merge_adapters([from_array("x.weight", weight)], [adapter])
    expected = weight.astype(np.float64) + b.astype(np.float32).astype(np.float64) @ a.astype(np.float32)
    assert np.abs(merged.read() - expected).max() < 1e-5 * rank**0.5


def test_a_tensor_that_can_only_be_read_whole_is_read_once(tmp_path):
    reads = []

    def read() -> np.ndarray:
        reads.append(1)
        return np.zeros((1 << 12, 1 << 10), np.float32)

    tensor = LazyTensor("x.weight", np.dtype(np.float32), (1 << 12, 1 << 10), read)
    adapter = adapter_with({"x.lora_A.weight": np.ones((1, 1 << 10)), "x.lora_B.weight": np.ones((1 << 12, 1))})
    merged = merge_adapters([tensor], [adapter])
    write(tmp_path / "out", {"model_type": "llama"}, merged, source_folder=tmp_path, layout="hf")
    assert len(reads) == 1 and (load_file(tmp_path / "out" / "model.safetensors")["x.weight"] == 1).all()


# --- what is refused


def test_every_misfit_of_every_adapter_is_named_at_once():
    base = [from_array("x.weight", np.ones((3, 2), np.float32)), from_array("i.weight", np.ones((3, 2), np.int32))]
    base.append(from_array("z.weight", np.ones((3, 2), np.float32)))
    first = adapter_with(
        {
            "x.lora_A.weight": np.ones((1, 5)),
            "x.lora_B.weight": np.ones((3, 1)),
            "y.lora_A.weight": np.ones((1, 2)),
            "y.lora_B.weight": np.ones((3, 1)),
            "z.lora_A.weight": np.ones((1, 2)),
            "x.something": np.ones(2),
        }
    )
    second = adapter_with(
        {
            "x.lora_A.weight": np.full((1, 2), np.nan),
            "x.lora_B.weight": np.ones((3, 1)),
            "i.lora_A.weight": np.ones((1, 2)),
            "i.lora_B.weight": np.ones((3, 1)),
        }
    )
    with pytest.raises(ModelError) as caught:
        merge_adapters(base, [first, second])
    for problem in (
        "x: [3, 2] in the model, the adapter's lora_A.weight [1, 5] and lora_B.weight [3, 1] of rank 1 are for [3, 5]",
        "y: the model has no such module",
        "z: has lora_A.weight; expected lora_A.weight, lora_B.weight",
        "x.something is not a tensor of a LoRA adapter",
        "x.lora_A.weight holds NaN or infinite numbers",
        "i: int32 [3, 2] in the model, expected a matrix of floats",
    ):
        assert problem in str(caught.value)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(plain, tmp_path):
    wider = write_model(tmp_path / "wider", "qwen2", intermediate_size=192)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: \[192, 64\] in the model.* are for \[128, 64\]"):
        merge(wider, plain, to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_numbers_too_large_for_the_type_are_named_and_nothing_is_left(qwen, tmp_path):
    half = tmp_path / "half"
    model_of(qwen, torch.float16).save_pretrained(half)
    adapter = write_peft(qwen, tmp_path / "adapter", target_modules=["v_proj"])
    state = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    state[name] *= 1e7
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj\.weight: \d+ of 2048 numbers are NaN or inf"):
        merge(half, adapter, to=tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "half"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "requantize": True, "layout": "mlx"}, "contradict each other"),
        ({"bits": 4}, "add --to mlx, or leave --bits out"),
        ({"requantize": True, "layout": "mlx"}, "is not quantized"),
        ({"bits": 7, "layout": "mlx"}, "7 bits"),
    ],
)
def test_options_that_cannot_be_together_are_refused(options, words, qwen, plain, tmp_path):
    with pytest.raises(MacftError, match=words):
        merge(qwen, plain, to=tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_a_shared_matrix_that_cannot_be_found_is_refused():
    adapter = adapter_with({"lm_head.lora_A.weight": [[1]], "lm_head.lora_B.weight": [[1]]})
    with pytest.raises(ModelError, match="the shared matrix was not found"):
        fit({"tie_word_embeddings": True}, [from_array("wte.weight", np.ones((1, 1)))], [adapter])


# --- memory


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    """4 matrices of 16 MB, then 36: the peak moves by far less than the 512 MB in between."""
    peaks = []
    for layers in (4, 36):
        code = f"""
import resource, sys
from pathlib import Path
import numpy as np
from macft.weights.tensors.lazy import LazyTensor
from macft.weights.adapters.merge import merge_adapters
from macft.weights.adapters.peft import Adapter, AdapterConfig
from macft.weights.writer import write_model
shape = (2048, 2048)
names = [f"m{{i}}" for i in range({layers})]
tensors = [LazyTensor(n + ".weight", np.dtype(np.float32), shape, lambda: np.ones(shape, np.float32)) for n in names]
state = {{f"base_model.model.{{n}}.lora_{{x}}.weight": np.ones((4, 2048) if x == "A" else (2048, 4), np.float32)
          for n in names for x in "AB"}}
adapter = Adapter(Path("a"), AdapterConfig("b", 4, 4.0, 0.0, ("m",)), state, None)
write_model(Path(sys.argv[1]), {{"model_type": "llama"}}, merge_adapters(tensors, [adapter]),
            source_folder=Path(sys.argv[1]), layout="hf")
status = Path("/proc/self/status")
print(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""
        if not Path("/proc/self/status").exists():
            pytest.skip("no /proc/self/status here, which gives the peak of a single process")
        command = [sys.executable, "-c", code, str(tmp_path / str(layers))]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 100, peaks
