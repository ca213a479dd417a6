"""GGUF types: each tensor has the one llama.cpp would give it, and its bytes are ggml's."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from macft.errors import UsageError
from macft.gguf.format import GgufModel
from macft.gguf.writing.mixes import ModelSize, file_order, fitting_type, may_quantize
from macft.gguf.writing.quantize import QUANTS, _library, count_overflow, pack, plan_types
from macft.weights.tensors.lazy import LazyTensor

HIDDEN, FFN, ROWS = 512, 768, 32


def a_model(
    layers: int,
    *,
    tied: bool = False,
    experts: int = 0,
    hidden: int = HIDDEN,
    ffn: int = FFN,
    architecture: str = "llama",
    fused: bool = False,
    dtype: type = ml_dtypes.bfloat16,
    kv_heads: int = 2,
) -> GgufModel:
    """A model of names and shapes whose numbers cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (ROWS, hidden)
    for layer in range(layers):
        values = {"attn_qkv": (ROWS, hidden)} if fused else {n: (ROWS, hidden) for n in ("attn_q", "attn_k", "attn_v")}
        up, down = (ffn, hidden), (hidden, ffn)
        if experts:
            forward = {"ffn_gate_inp": (experts, hidden)}
            forward |= {"ffn_gate_exps": (experts, *up), "ffn_up_exps": (experts, *up)}
            forward |= {"ffn_down_exps": (experts, *down), "ffn_down_shexp": down}
        else:
            forward = {"ffn_gate": up, "ffn_up": up, "ffn_down": down}
        norms = {"attn_norm": (hidden,), "attn_q_norm": (2, hidden)}
        block = {**norms, **values, "attn_output": (hidden, hidden), **forward}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        shapes[f"blk.{layer}.attn_q.bias"] = (ROWS,)

    def unread() -> np.ndarray:
        raise AssertionError("read")

    fields = {
        "general.architecture": architecture,
        f"{architecture}.block_count": layers,
        f"{architecture}.attention.head_count": 8,
        f"{architecture}.attention.head_count_kv": kv_heads,
    }
    if experts:
        fields[f"{architecture}.expert_count"] = experts
    tensors = [LazyTensor(name, np.dtype(dtype), shape, unread) for name, shape in reversed(shapes.items())]
    return GgufModel(architecture, fields, tensors)


def types_of(model: GgufModel, quant: str) -> dict[str, str]:
    return {name: kind.name for name, kind in plan_types(model, quant).types.items()}


def by_layer(types: dict[str, str], role: str) -> str:
    """The types of one role in each layer, each as one letter: its bits."""
    names = sorted((name for name in types if f".{role}.weight" in name), key=file_order)
    return "".join(types[name][1] for name in names)


# --- which type

# The first and the last eighth of the layers and every third between have more bits (6); worked out by hand.
MORE_4 = {9: "644644666", 17: "66446446446446666", 32: "66664464464464464464464464466666"}
MORE_5 = {layers: text.replace("4", "5") for layers, text in MORE_4.items()}

# quant: the types of attn_v and of ffn_down by the number of layers, of attn_output, and of all other matrices
MIXES = {
    "q8_0": ({n: "8" * n for n in (9, 17, 32)}, {n: "8" * n for n in (9, 17, 32)}, "Q8_0", "Q8_0"),
    "q6_k": ({n: "6" * n for n in (9, 17, 32)}, {n: "6" * n for n in (9, 17, 32)}, "Q6_K", "Q6_K"),
    "q5_k_m": (MORE_5, MORE_5, "Q5_K", "Q5_K"),
    "q5_k_s": ({n: "5" * n for n in (9, 17, 32)}, {n: "5" * n for n in (9, 17, 32)}, "Q5_K", "Q5_K"),
    "q4_k_m": (MORE_4, MORE_4, "Q4_K", "Q4_K"),
    # the first four values; the first eighth of the downs
    "q4_k_s": (
        {n: "5555" + "4" * (n - 4) for n in (9, 17, 32)},
        {9: "5" + "4" * 8, 17: "55" + "4" * 15, 32: "5555" + "4" * 28},
        "Q4_K",
        "Q4_K",
    ),
    # the first two values; the first sixteenth of the downs
    "q3_k_m": (
        {n: "55" + "4" * (n - 2) for n in (9, 17, 32)},
        {9: "4" * 9, 17: "5" + "4" * 16, 32: "55" + "4" * 30},
        "Q4_K",
        "Q3_K",
    ),
    "q4_0": ({n: "4" * n for n in (9, 17, 32)}, {n: "4" * n for n in (9, 17, 32)}, "Q4_0", "Q4_0"),
}


@pytest.mark.parametrize("layers", [9, 17, 32])
@pytest.mark.parametrize("quant", MIXES)
def test_each_mix_gives_each_layer_the_type_of_the_table(quant, layers):
    values, downs, attention_output, base = MIXES[quant]
    types = types_of(a_model(layers), quant)
    assert by_layer(types, "attn_v") == values[layers] and by_layer(types, "ffn_down") == downs[layers]
    for role, kind in {"attn_output": attention_output, **dict.fromkeys(("attn_q", "attn_k", "ffn_up"), base)}.items():
        assert {types[f"blk.{layer}.{role}.weight"] for layer in range(layers)} == {kind}, role
    assert types["token_embd.weight"] == base
    assert types["output.weight"] == ("Q8_0" if quant == "q8_0" else "Q6_K")
    assert {types[n] for n in types if "norm" in n or n.endswith("bias")} == {"F32"}


@pytest.mark.parametrize("quant", MIXES)
def test_a_tied_embedding_has_the_type_of_the_head(quant):
    types = types_of(a_model(9, tied=True), quant)
    assert types["token_embd.weight"] == ("Q8_0" if quant == "q8_0" else "Q6_K") and "output.weight" not in types


@pytest.mark.parametrize("quant", MIXES)
def test_a_fused_attention_is_mixed_as_its_values(quant):
    assert by_layer(types_of(a_model(17, fused=True), quant), "attn_qkv") == MIXES[quant][0][17]


def test_layers_are_counted_in_the_order_of_their_numbers_not_of_their_names():
    """blk.10 stands after blk.9: in an order by name the tenth layer would be the third."""
    assert by_layer(types_of(a_model(17), "q4_k_s"), "attn_v") == "5555" + "4" * 13


@pytest.mark.parametrize("quant", MIXES)
def test_eight_experts_get_exact_keys_and_values(quant):
    types = types_of(a_model(9, experts=8), quant)
    assert by_layer(types, "attn_v") == by_layer(types, "attn_k") == "8" * 9
    # the layer is read from the name: two tensors of it, routed and shared, have the same
    assert by_layer(types, "ffn_down_exps") == by_layer(types, "ffn_down_shexp") == MIXES[quant][1][9]
    attention_output = "Q5_K" if quant in ("q3_k_m", "q4_k_s", "q4_k_m") else MIXES[quant][3]
    assert types["blk.5.attn_output.weight"] == attention_output
    assert types["blk.5.ffn_up_exps.weight"] == MIXES[quant][3] and types["blk.5.ffn_gate_inp.weight"] == "F32"


def test_another_number_of_experts_changes_only_how_layers_are_counted():
    types = types_of(a_model(9, experts=16), "q4_k_m")
    assert by_layer(types, "attn_k") == "4" * 9 and by_layer(types, "attn_v") == MORE_4[9]
    assert by_layer(types, "ffn_down_exps") == by_layer(types, "ffn_down_shexp") == MORE_4[9]


@pytest.mark.parametrize(
    ("architecture", "layers", "kv_heads", "expected"),
    [("llama", 80, 2, "5"), ("qwen2", 80, 8, "5"), ("llama", 80, 8, "4"), ("llama", 79, 2, "4"), ("qwen3", 80, 2, "4")],
)
def test_the_small_values_of_70b_models_have_more_bits(architecture, layers, kv_heads, expected):
    types = types_of(a_model(layers, architecture=architecture, kv_heads=kv_heads), "q4_k_m")
    values = by_layer(types, "attn_v")
    assert set(values) == {"6", expected} and values[:10] == "6" * (layers // 8) + ("" if layers == 80 else expected)
    assert set(by_layer(types, "ffn_down")) == {"6", "4"}


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("q3_k_m", {"attn_q": "Q4_0", "attn_v": "Q5_1 Q5_1 Q5_0", "attn_output": "Q5_0", "ffn_down": "Q4_K Q4_K Q4_K"}),
        ("q4_k_m", {"attn_q": "Q5_0", "attn_v": "Q5_0 Q5_0 Q8_0", "attn_output": "Q5_0", "ffn_down": "Q4_K Q4_K Q6_K"}),
        ("q5_k_m", {"attn_q": "Q5_1", "attn_v": "Q5_1 Q5_1 Q8_0", "attn_output": "Q5_1", "ffn_down": "Q5_K Q5_K Q6_K"}),
        ("q6_k", {"attn_q": "Q8_0", "attn_v": "Q8_0 Q8_0 Q8_0", "attn_output": "Q8_0", "ffn_down": "Q6_K Q6_K Q6_K"}),
        ("q4_0", {"attn_q": "Q4_0", "attn_v": "Q4_0 Q4_0 Q4_0", "attn_output": "Q4_0", "ffn_down": "Q4_0 Q4_0 Q4_0"}),
    ],
)
def test_rows_that_256_does_not_divide_have_blocks_of_32(quant, expected):
    """The rows of SmolLM2-135M: 576 numbers, and 1536 in ffn_down."""
    plan = plan_types(a_model(3, tied=True, hidden=576, ffn=1536), quant)
    for role, kinds in expected.items():
        each = kinds.split() if " " in kinds else [kinds] * 3
        assert [plan.types[f"blk.{layer}.{role}.weight"].name for layer in range(3)] == each, role
    assert plan.types["token_embd.weight"] == Kind.Q8_0
    assert (plan.fallbacks == ()) == (quant == "q4_0") or plan.fallbacks == (
        "token_embd.weight: Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 576 numbers",
    )
    if quant == "q4_k_m":  # of three layers attn_q, attn_k, attn_output, ffn_gate and ffn_up, and two attn_v
        assert plan.fallbacks == (
            "17 tensors (blk.0.attn_k.weight, ...): Q5_0 instead of Q4_K, whose blocks of 256 do not divide rows of "
            "576 numbers",
            "blk.2.attn_v.weight: Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 576 numbers",
        )


@pytest.mark.parametrize("quant", MIXES)
def test_rows_that_nothing_divides_are_f16(quant):
    plan = plan_types(a_model(2, hidden=80, ffn=40), quant)
    matrices = {name for name, kind in plan.types.items() if kind != Kind.F32}
    assert {plan.types[name] for name in matrices} == {Kind.F16} and len(matrices) == 16
    counts = [int(line.split()[0]) if line[0].isdigit() else 1 for line in plan.fallbacks]
    assert sum(counts) == 16


@pytest.mark.parametrize(("quant", "kind"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")])
def test_files_of_floats_keep_in_f32_what_the_converter_keeps(quant, kind):
    types = types_of(a_model(2, experts=8), quant)
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.attn_q_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert {types[n] for n in types if "_exps" in n or "attn_v" in n or n.startswith("token")} == {kind}


def test_a_matrix_of_one_row_is_a_vector_to_the_quantizer():
    assert not may_quantize("blk.0.x.weight", (1, 256)) and may_quantize("blk.0.x.weight", (2, 256))
    assert may_quantize("blk.0.x.weight", (2, 1, 256)) and not may_quantize("blk.0.x.weight", (256,))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_not_quantized_keeps_the_type_it_came_in(dtype):
    one = LazyTensor("blk.0.gate.weight", np.dtype(dtype), (1, 256), lambda: np.zeros((1, 256), dtype))
    model = a_model(1, dtype=dtype)
    model.tensors.append(one)
    names = {np.float32: "F32", np.float16: "F16", ml_dtypes.bfloat16: "BF16"}
    assert types_of(model, "q4_k_m")["blk.0.gate.weight"] == names[dtype]


def test_an_unknown_quantization_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"q2_k: unknown quantization \(accepted: f32, f16, .*q4_0\)"):
        plan_types(a_model(1), "q2_k")


def test_numbers_by_layer_count_as_that_of_the_first():
    fields = {"llama.block_count": 80, "llama.attention.head_count": [8] * 80}
    assert ModelSize.of("llama", {**fields, "llama.attention.head_count_kv": np.full(80, 2)}).has_eightfold_values
    assert not ModelSize.of("llama", fields).has_eightfold_values


# --- which bytes


def numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights of all sizes, with rows of zeros, of one outlier and of a constant among them."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)) * 2)
    found[0] = 0
    found[1] = 0.25
    found[2, 3] = -1000
    return found.astype(np.float32)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q5_1])
def test_the_bytes_are_those_of_the_gguf_package(kind):
    rows = numbers(64, 288)
    found, expected = pack(kind, rows), gguf.quantize(rows, kind)
    assert found.dtype == np.uint8 and found.shape == (64, len(expected[0].tobytes()))
    assert found.tobytes() == expected.tobytes()


def test_16_bit_types_round_to_nearest_ties_to_even():
    unit = np.float32(2**-7)
    halves = np.array([[1 + unit / 2, 1 + unit * 1.5, 1 + unit * 0.51, -1 - unit / 2, 3e38, 1e-40]], np.float32)
    found = pack(Kind.BF16, halves).view(ml_dtypes.bfloat16).astype(np.float64)[0]
    assert found[:4].tolist() == [1, 1 + 2 * unit, 1 + unit, -1] and np.isfinite(found).all() and found[5] > 0
    unit = np.float32(2**-10)
    halves = np.array([[1 + unit / 2, 1 + unit * 1.5, 65504, 6e-8]], np.float32)
    assert pack(Kind.F16, halves).view(np.float16)[0].tolist() == [1, 1 + 2 * unit, 65504, 2**-24]


# bits a number takes, and the error of normal numbers that ggml's rounding stays under: root of the mean square
ERRORS = {Kind.Q3_K: (3.4375, 0.2), Kind.Q4_K: (4.5, 0.09), Kind.Q5_K: (5.5, 0.045), Kind.Q6_K: (6.5625, 0.024)}


@pytest.mark.parametrize("kind", ERRORS)
def test_k_quants_take_their_bits_and_lose_no_more_than_those(kind):
    bits, largest = ERRORS[kind]
    rows = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    packed = pack(kind, rows)
    assert packed.nbytes == rows.size * bits / 8
    error = np.sqrt(np.mean((gguf.dequantize(packed, kind) - rows) ** 2))
    # half the step of so many levels over +-3 is the least that can be had
    assert largest / 2 < error < largest, error


@pytest.mark.parametrize("kind", ERRORS)
def test_rows_packed_apart_are_the_bytes_of_one_call_to_ggml(kind):
    rows = numbers(41, 768)
    library = ctypes.CDLL(str(_library()))
    whole = np.zeros((41, len(pack(kind, rows[:1])[0])), np.uint8)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = library.ggml_quantize_chunk(
        ctypes.c_int(int(kind)), ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(whole.ctypes.data),
        ctypes.c_int64(0), ctypes.c_int64(41), ctypes.c_int64(768), ctypes.c_void_p(None),
    )  # fmt: skip
    assert written == whole.nbytes
    apart = [pack(kind, rows[i:j]) for i, j in ((0, 1), (1, 20), (20, 41))]
    assert np.array_equal(np.concatenate(apart), whole)
    assert np.array_equal(pack(kind, np.asfortranarray(rows)), whole)


def test_no_rows_are_no_bytes():
    assert pack(Kind.Q4_K, np.zeros((0, 256), np.float32)).shape == (0, 144)


@pytest.mark.parametrize(
    ("kind", "largest"),
    # the largest number each can hold: F16's own, or so many steps of a scale that is F16
    [(Kind.F16, 65504), (Kind.Q8_0, 127 * 65504.0), (Kind.Q4_0, 8 * 65504.0), (Kind.Q5_0, 16 * 65504.0)],
)
def test_numbers_beyond_a_type_are_counted(kind, largest):
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = largest
    assert count_overflow(kind, pack(kind, rows)) == 0
    rows[1, 40] *= 1.01
    assert count_overflow(kind, pack(kind, rows)) == 1


@pytest.mark.parametrize("kind", [*ERRORS, Kind.Q5_1, Kind.BF16])
def test_numbers_beyond_blocks_of_more_scales_are_seen(kind):
    rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    assert count_overflow(kind, pack(kind, rows)) == 0
    rows[1] *= np.float32(3.4028e38 / np.abs(rows[1]).max()) if kind == Kind.BF16 else 1e10
    assert count_overflow(kind, pack(kind, rows)) >= 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [Kind.Q5_1, Kind.Q4_K, Kind.Q5_K])
def test_of_two_scales_either_may_be_too_large(kind, sign):
    """Of numbers from 0 up the scale is; of numbers from 0 down the least is as well."""
    rows = np.zeros((1, 256), np.float32)
    rows[0, ::3] = sign * 1e10
    assert count_overflow(kind, pack(kind, rows)) >= 1


def test_without_libggml_q8_0_has_the_same_bytes_and_the_others_say_what_to_install():
    code = """
import sys
sys.modules["libggml"] = None
import gguf, numpy as np
from gguf import GGMLQuantizationType as Kind
from macft.errors import MissingPackageError
from macft.gguf.writing.quantize import check_packable, pack
rows = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
assert pack(Kind.Q8_0, rows).tobytes() == gguf.quantize(rows, Kind.Q8_0).tobytes()
check_packable([Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
for act in (lambda: check_packable([Kind.Q6_K, Kind.Q4_K, Kind.F32]), lambda: pack(Kind.Q4_0, rows)):
    try:
        act()
    except MissingPackageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tail = " the package libggml-python is needed: pip install 'macft[export]' (f32, f16, bf16 and q8_0 do without)"
    assert done.stdout.splitlines() == [f"to write {kinds}{tail}" for kinds in ("Q4_K, Q6_K", "Q4_0")]


def test_every_file_type_is_llama_cpps_number():
    for quant, found in QUANTS.items():
        name = {"f32": "ALL_F32"}.get(quant, f"MOSTLY_{quant.upper()}")
        assert int(gguf.LlamaFileType[name]) == found.file_type
        assert found.base.name == quant.upper().removesuffix("_M").removesuffix("_S")


def test_a_type_fits_rows_that_its_blocks_divide():
    assert [fitting_type(Kind.Q4_K, n).name for n in (256, 288, 40)] == ["Q4_K", "Q5_0", "F16"]
    assert [fitting_type(Kind.Q8_0, n).name for n in (32, 40)] == ["Q8_0", "F16"]
