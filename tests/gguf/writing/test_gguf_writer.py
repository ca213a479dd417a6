"""GGUF files as they are written: what gguf-py and llama.cpp read from them, and that they are whole or absent."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support.tiny_gguf import TinyGguf, byte_level, hf_weights, llama_cpp
from support.tiny_gguf import write_gguf as write_with_gguf_py

from macft.errors import ModelError, UsageError
from macft.gguf.format import GgufModel, header_bytes
from macft.gguf.writing.mixes import file_order
from macft.gguf.writing.quantize import QUANTS, plan_types
from macft.gguf.writing.writer import Written, write_gguf
from macft.weights.tensors.lazy import LazyTensor, from_array, from_rows

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def from_file(path: Path, dtype: Any = np.float32) -> GgufModel:
    """The fields and tensors of a file of floats, its matrices rounded to `dtype`."""
    reader = read(path)
    fields: dict[str, Any] = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value, kind = field.contents(), field.types[-1]
        fields[name] = value
        if len(field.types) == 2 and kind != gguf.GGUFValueType.STRING:
            fields[name] = np.array(value, {gguf.GGUFValueType.FLOAT32: np.float32}.get(kind, np.int32))
    tensors = []
    for tensor in reader.tensors:
        array = tensor.data.view(np.float32).reshape([int(n) for n in reversed(tensor.shape)])
        tensors.append(from_array(tensor.name, array.astype(dtype) if array.ndim > 1 else array))
    return GgufModel(fields["general.architecture"], fields, tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A llama as gguf-py writes it in F32: rows of 256 numbers, and of 320 in ffn_down."""
    model = byte_level(TinyGguf(layers=3, hidden=256, ffn=320, heads=4, kv_heads=2, head_dim=64))
    path = tmp_path_factory.mktemp("tiny") / "f32.gguf"
    return write_with_gguf_py(path, model, hf_weights(model))


def simple(*tensors: LazyTensor, **fields: Any) -> GgufModel:
    return GgufModel("llama", {"general.architecture": "llama", **fields}, list(tensors))


def matrix(name: str, rows: int, columns: int, dtype: Any = BFLOAT16, seed: int = 0) -> LazyTensor:
    return from_array(name, np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written


def test_the_header_is_that_of_gguf_py_to_the_byte(tmp_path):
    scalars = {np.uint8: 200, np.int8: -5, np.uint16: 60000, np.int16: -6, np.uint32: 1 << 31, np.int32: -7}
    scalars |= {np.uint64: 1 << 63, np.int64: -(1 << 60), np.float32: 0.1, np.float64: 0.1}
    fields: dict[str, Any] = {"general.architecture": "llama", "text": "naïve 你好 \0 \n", "count": 7, "share": 0.1}
    fields |= {f"one.{dtype.__name__}": dtype(value) for dtype, value in scalars.items()}
    fields |= {
        "yes": True,
        "no": False,
        "np.no": np.bool_(False),
        "words": ["", "a", "é"],
        "line": np.arange(5, dtype=np.int32),
    }
    fields |= {"scores": np.linspace(-1, 0, 4, dtype=np.float32), "flags": np.array([True, False])}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in list(fields.items())[1:]:
        kind = {"count": "uint32", "share": "float32"}.get(key) or getattr(getattr(value, "dtype", None), "name", "")
        if isinstance(value, list | np.ndarray):
            sub = {"words": "STRING", "line": "INT32", "scores": "FLOAT32", "flags": "BOOL"}[key]
            values = value if isinstance(value, list) else value.tolist()
            writer.add_key_value(key, values, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[sub])
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            plain = value.item() if isinstance(value, np.generic) else value
            writer.add_key_value(
                key, plain, gguf.GGUFValueType[kind.upper() if "bool" not in kind and kind else "BOOL"]
            )
    tensors = {"a": ((3, 64), Kind.Q8_0), "b": ((5,), Kind.F32), "c": ((2, 3, 256), Kind.Q6_K)}
    for name, (shape, kind) in tensors.items():
        nbytes = prod(shape) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor(
            name, np.zeros(nbytes, np.uint8), raw_shape=gguf.quant_shape_to_byte_shape(shape, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = header_bytes(fields, [(name, shape, kind) for name, (shape, kind) in tensors.items()])
    expected = (tmp_path / "x.gguf").read_bytes()
    assert len(found) % 32 == 0 and found == expected[: len(found)]
    # 204 and 20 bytes, padded, then 2 * 3 * 210
    assert len(expected) - len(found) == 224 + 32 + 1280


def test_text_that_is_not_unicode_is_refused_by_its_field():
    with pytest.raises(ModelError, match=r"general.name: the text is not valid Unicode"):
        header_bytes({"general.name": "\ud83d"}, [])


@pytest.mark.parametrize("quant", QUANTS)
def test_gguf_py_reads_every_field_and_number(quant, tiny, tmp_path):
    model = from_file(tiny)
    (written,) = write_gguf(model, {quant: tmp_path / "out.gguf"})
    reader, source = read(tmp_path / "out.gguf"), read(tiny)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    expected = {name: field.contents() for name, field in source.fields.items() if not name.startswith("GGUF.")}
    assert fields == expected | {"general.quantization_version": 2, "general.file_type": QUANTS[quant].file_type}
    assert list(fields)[-2:] == ["general.quantization_version", "general.file_type"]
    assert [field.types for name, field in reader.fields.items() if name in expected] == [
        field.types for name, field in source.fields.items() if name in expected
    ]
    plan = plan_types(model, quant)
    originals = {tensor.name: tensor.read() for tensor in model.tensors}
    assert [tensor.name for tensor in reader.tensors] == sorted(originals, key=file_order)
    for tensor in reader.tensors:
        original = originals[tensor.name]
        kind = plan.types[tensor.name]
        assert tensor.tensor_type == kind and tensor.data_offset % 32 == 0
        assert tuple(reversed([int(n) for n in tensor.shape])) == original.shape
        found = gguf.dequantize(tensor.data, kind).reshape(original.shape)
        step = {"Q3_K": 0.25, "Q4_K": 0.12, "Q4_0": 0.15, "Q5_K": 0.06, "Q5_0": 0.08, "Q5_1": 0.06, "Q6_K": 0.03}
        step |= {"F32": 0, "BF16": 2**-8, "F16": 2**-11, "Q8_0": 0.01}
        scale = np.abs(original) if "F" in kind.name else np.sqrt(np.mean(original**2)) * 4
        assert (np.abs(found - original) <= step[kind.name] * scale + 1e-7).all(), tensor.name
    assert written == Written(
        tmp_path / "out.gguf", quant, (tmp_path / "out.gguf").stat().st_size,
        hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest(), plan.fallbacks,
        Counter(kind.name for kind in plan.types.values()),
    )  # fmt: skip
    assert (written.fallbacks != ()) == (quant.endswith(("_m", "_s", "_k")))


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q4_k_m", "q3_k_m", "q4_0"])
def test_llama_cpp_computes_with_the_numbers_that_were_written(quant, tiny, tmp_path):
    """The same model with the dequantized numbers in F32 answers alike.

    Not equally: llama.cpp rounds what meets a quantized weight to 8 bits. That moves these log-probabilities, whose
    standard deviation is 3.2, by 0.15 (root of the mean square); wrong numbers would move them by 4.
    """
    write_gguf(from_file(tiny), {quant: tmp_path / "out.gguf"})
    unpacked = from_file(tiny)
    unpacked.tensors[:] = [
        from_array(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist()))
        for tensor in read(tmp_path / "out.gguf").tensors
    ]
    write_gguf(unpacked, {"f32": tmp_path / "f32.gguf"})
    found, expected = [], []
    for path, answers in ((tmp_path / "out.gguf", found), (tmp_path / "f32.gguf", expected)):
        with llama_cpp(path) as server:
            answers += [server.top_logprobs(tokens, 600) for tokens in ([7, 8, 9], [50, 60, 70, 80, 90])]
    pairs = [(one[id], other[id]) for one, other in zip(found, expected, strict=True) for id in other]
    difference = np.sqrt(np.mean([(one - other) ** 2 for one, other in pairs]))
    tolerance = {"f32": 1e-5, "f16": 0.01, "bf16": 0.1}.get(quant, 0.3)
    vocabulary = len(unpacked.fields["tokenizer.ggml.tokens"])
    assert len(pairs) == 2 * vocabulary and np.std(pairs) > 3 and difference < tolerance, difference


def test_what_was_the_last_field_already_is_written_once(tmp_path):
    fields = {"general.file_type": 99, "general.quantization_version": 1, "general.name": "x"}
    write_gguf(simple(matrix("token_embd.weight", 2, 32), **fields), {"q8_0": tmp_path / "x.gguf"})
    found = [name for name in read(tmp_path / "x.gguf").fields if not name.startswith("GGUF.")]
    assert found == ["general.architecture", "general.name", "general.quantization_version", "general.file_type"]
    assert read(tmp_path / "x.gguf").fields["general.file_type"].contents() == 7


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_several_files_at_once_are_those_written_one_by_one_and_read_once(dtype, tiny, tmp_path):
    model = from_file(tiny, dtype)
    asked: Counter[tuple[str, int]] = Counter()

    def counting(tensor: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> np.ndarray:
            asked.update((tensor.name, row) for row in range(start, stop))
            return tensor.read()[start:stop]

        return from_rows(tensor.name, tensor.dtype, tensor.shape, rows)

    plural = GgufModel(model.architecture, model.fields, [counting(tensor) for tensor in model.tensors])
    together = write_gguf(plural, {quant: tmp_path / f"{quant}.gguf" for quant in QUANTS})
    assert set(asked.values()) == {1} and len(asked) == sum(tensor.shape[0] for tensor in model.tensors)
    for written in together:
        (alone,) = write_gguf(model, {written.quant: tmp_path / "alone.gguf"})
        assert (tmp_path / "alone.gguf").read_bytes() == written.path.read_bytes()
        assert (alone.sha256, alone.kinds, alone.fallbacks) == (written.sha256, written.kinds, written.fallbacks)
        (tmp_path / "alone.gguf").unlink()
    assert names(tmp_path) == sorted(f"{quant}.gguf" for quant in QUANTS)


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize(
    ("shape", "parts"),
    # the last is padded at its end, and only there
    [((3000, 2048), 6), ((3, 1500, 2048), 3), ((5, 2, 2, 2048), 1), ((3000, 2047), 6)],
)
def test_large_tensors_are_packed_in_parts_with_the_same_bytes(shape, parts, in_parts, tmp_path):
    whole = np.random.default_rng(0).standard_normal(shape, np.float32)
    asked: list[int] = []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append((stop - start) * whole[0].nbytes)
        return whole[start:stop]

    name = "blk.0.ffn_up_exps.weight"
    tensor = from_rows(name, whole.dtype, shape, rows)
    if not in_parts:
        tensor = LazyTensor(name, whole.dtype, shape, tensor.read)
    write_gguf(simple(tensor), {"q8_0": tmp_path / "q8_0.gguf", "f16": tmp_path / "f16.gguf"})
    if in_parts:
        # 4 MB each, or a row of the first axis if that is more
        assert sum(asked) == whole.nbytes and max(asked) <= max(4 << 20, whole[0].nbytes) and len(asked) == parts
    assert in_parts or asked == [whole.nbytes]
    for quant in ("q8_0", "f16"):
        (found,) = read(tmp_path / f"{quant}.gguf").tensors
        assert found.tensor_type == (Kind.F16 if quant == "f16" or shape[-1] % 32 else Kind.Q8_0)
        assert found.data.tobytes() == gguf.quantize(whole, found.tensor_type).tobytes()
        end = found.data_offset + found.n_bytes
        assert (tmp_path / f"{quant}.gguf").stat().st_size == end + -end % 32


def test_tensors_keep_their_order_however_their_threads_finish(tmp_path):
    turn = threading.Event()
    first, second = (np.full((2, 32), value, np.float32) for value in (1, 2))

    def slow() -> np.ndarray:
        assert turn.wait(20), "the second tensor is not made while the first one is"
        return first

    def quick() -> np.ndarray:
        turn.set()
        return second

    tensors = [LazyTensor(f"{name}.weight", first.dtype, (2, 32), read) for name, read in (("b", quick), ("a", slow))]
    write_gguf(simple(*tensors), {"f32": tmp_path / "x.gguf"})
    assert (tmp_path / "x.gguf").read_bytes().endswith(first.tobytes() + second.tobytes())


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path):
    """A tensor of 512 MB, made row by row: what is in flight is 64 MB of it, and what becomes of that."""
    code = """
import resource, sys
from pathlib import Path
import ml_dtypes, numpy as np
from macft.gguf.format import GgufModel
from macft.gguf.writing.writer import write_gguf
from macft.weights.tensors.lazy import from_rows
dtype, shape = np.dtype(ml_dtypes.bfloat16), (1 << 16, 1 << 12)
rows = lambda start, stop: np.ones((stop - start, shape[1]), dtype)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)
tensor = from_rows("token_embd.weight", dtype, shape, rows)
before = peak()
write_gguf(GgufModel("llama", {"general.architecture": "llama"}, [tensor]), {"q8_0": Path(sys.argv[1])})
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 192, done.stdout
    assert done.stderr == "" and (tmp_path / "x.gguf").stat().st_size > 512 / 2 * 34 / 32 * 1e6


# --- whole or absent


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
def test_every_tensor_with_nan_or_infinity_is_named_with_how_many(dtype, tmp_path):
    nan, infinite = (np.zeros((2, 256), dtype) for _ in range(2))
    nan[1, 2], infinite[0, :2] = np.nan, (-np.inf, np.inf)
    tensors = [matrix("good", 2, 256, dtype), from_array("x.weight", nan), from_array("y.weight", infinite)]
    outputs = {quant: tmp_path / f"{quant}.gguf" for quant in ("q4_k_m", "f16")}
    with pytest.raises(ModelError, match="not written: merging went wrong") as caught:
        write_gguf(simple(*tensors), outputs, if_not_finite="merging went wrong")
    assert "x.weight: 1 of 512 numbers are NaN or infinite" in str(caught.value)
    assert "y.weight: 2 of 512" in str(caught.value) and "good" not in str(caught.value)
    assert names(tmp_path) == []


def test_numbers_that_16_bits_do_not_hold_are_an_error_and_not_infinity(tmp_path):
    array = np.zeros((2, 64), BFLOAT16)
    array[0, 0] = 1e5
    tensor = from_array("x.weight", array)
    with pytest.raises(ModelError, match=r"choose bf16 or f32 instead\n  x.weight: holds numbers .* large for F16$"):
        write_gguf(simple(tensor), {"f16": tmp_path / "f16.gguf", "bf16": tmp_path / "bf16.gguf"})
    assert names(tmp_path) == []
    write_gguf(simple(tensor), {"q8_0": tmp_path / "q8_0.gguf", "bf16": tmp_path / "bf16.gguf"})


def test_paths_that_exist_are_refused_and_left_as_they_are(tmp_path):
    (tmp_path / "x.gguf").write_text("precious")
    (tmp_path / "y.gguf").symlink_to(tmp_path / "nowhere")
    for path in ("x.gguf", "y.gguf"):
        with pytest.raises(UsageError, match=f"{path}: exists already"):
            write_gguf(simple(matrix("x", 2, 32)), {"f16": tmp_path / "z.gguf", "q8_0": tmp_path / path})
    assert (tmp_path / "x.gguf").read_text() == "precious" and names(tmp_path) == ["x.gguf", "y.gguf"]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"q9": "x", "f16": "y"}, r"q9: unknown quantization \(accepted: f32,"),
        ({"q8_0": "x", "f16": "x"}, "x is given for 2 quantizations"),
        ({}, "none is given"),
    ],
)
def test_outputs_that_cannot_be_are_refused(outputs, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        write_gguf(simple(matrix("x", 2, 32)), {quant: tmp_path / name for quant, name in outputs.items()})
    assert names(tmp_path) == []


def test_all_tensors_that_cannot_be_written_are_named_at_once(tmp_path):
    tensors = [from_array("a", np.zeros((2, 2))), *[matrix("b", 2, 32)] * 2, from_array("c", np.float32(1)[()])]
    tensors += [from_array("d", np.zeros((0, 2), np.float32)), matrix("e" * 64, 2, 32)]
    with pytest.raises(ModelError) as caught:
        write_gguf(simple(*tensors), {"f16": tmp_path / "x.gguf"})
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    expected = ["b comes 2 times", "a has type float64", "c has shape []", "d has shape [0, 2]"]
    assert lines == [*expected, f"{'e' * 64}: longer than 63 bytes"]
    with pytest.raises(ModelError, match="there are none"):
        write_gguf(simple(), {"f16": tmp_path / "x.gguf"})


def test_a_disk_that_is_too_small_for_all_files_is_seen_before_anything_is_read(tmp_path):
    def unread() -> np.ndarray:
        raise AssertionError("read")

    free = shutil.disk_usage(tmp_path).free
    rows = int(free * 0.3 / 2048)  # F16 takes 0.6 of what is free, Q8_0 0.32, F32 1.2
    model = simple(LazyTensor("x.weight", BFLOAT16, (rows, 2048), unread))
    with pytest.raises(ModelError, match=r"a.gguf, .*b.gguf: [\d.]+ GB are needed, the disk has [\d.]+ GB"):
        write_gguf(model, {"f16": tmp_path / "a.gguf", "f32": tmp_path / "b.gguf"})
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing_behind_and_one_line(tmp_path):
    """Files may not pass 4 MB in this process: the system refuses the write as a full disk does."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
from macft.errors import ModelError
from macft.gguf.format import GgufModel
from macft.gguf.writing.writer import write_gguf
from macft.weights.tensors.lazy import from_array
tensors = [from_array(f"blk.{i}.weight", np.ones((1 << 10, 1 << 8), np.float32)) for i in range(16)]
try:
    outputs = {quant: Path(sys.argv[1]) / f"{quant}.gguf" for quant in ("q4_0", "f16")}
    write_gguf(GgufModel("llama", {"general.architecture": "llama"}, tensors), outputs)
except ModelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    files = ", ".join(str(tmp_path / f"{quant}.gguf") for quant in ("q4_0", "f16"))
    # 16 tensors of 2^18 numbers, of 4.5 and of 16 bits
    assert done.stdout.splitlines() == [
        f"{files}: cannot be written: File too large; 10.7 MB are needed, nothing was left behind"
    ]
    assert done.stderr == "" and names(tmp_path) == []


@pytest.mark.parametrize("error", [ModelError("a damaged file"), KeyboardInterrupt()])
def test_a_tensor_that_cannot_be_read_leaves_nothing_behind(error, tmp_path):
    def broken() -> np.ndarray:
        raise error

    tensors = [matrix("x.weight", 9, 32), LazyTensor("y", np.dtype(np.float32), (2, 32), broken)]
    with pytest.raises(type(error)):
        write_gguf(simple(*tensors), {"f16": tmp_path / "a.gguf", "q8_0": tmp_path / "b.gguf"})
    assert names(tmp_path) == []


@pytest.mark.parametrize("blocked", ["a.gguf", "b.gguf"])
def test_when_one_file_cannot_get_its_name_no_other_has(blocked, tmp_path):
    def read_and_block() -> np.ndarray:
        (tmp_path / blocked).mkdir(exist_ok=True)
        return np.ones((2, 32), np.float32)

    tensor = LazyTensor("x.weight", np.dtype(np.float32), (2, 32), read_and_block)
    with pytest.raises(ModelError, match="cannot be written: Is a directory"):
        write_gguf(simple(tensor), {"f16": tmp_path / "a.gguf", "q8_0": tmp_path / "b.gguf"})
    assert names(tmp_path) == [blocked] and (tmp_path / blocked).is_dir()
