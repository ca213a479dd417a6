"""Model folders as they are written: what others read from them, and that they are whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.tiny_models import write_model

from macft.errors import ModelError
from macft.weights.source import INDEX, open_model
from macft.weights.tensors.lazy import LazyTensor, cast, from_array, from_rows
from macft.weights.tensors.safetensors import DTYPES
from macft.weights.writer import SUMS
from macft.weights.writer import write_model as write

CONFIG = {"model_type": "llama", "torch_dtype": "float32"}


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder to copy from, with files that go along and files that do not."""
    folder = tmp_path / "source"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in COPIED + NOT_COPIED:
        (folder / name).write_text(f"content of {name}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "content of chat_template.jinja"}')
    return folder


COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "special_tokens_map.json", "generation_config.json", "LICENSE", "additional_chat_templates/tools.jinja",
)  # fmt: skip
NOT_COPIED = ("model.safetensors", "config.json", "modeling_x.py", "README.md", "adapter_config.json", SUMS)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_every_type_reads_back_to_the_bit_through_the_safetensors_library(source, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {code: rng.integers(0, 2, (3, 5)).astype(dtype) for code, dtype in DTYPES.items()}
    arrays |= {"one": np.float32(7), "none": np.zeros((0, 3), np.float16), "vector": np.arange(3.0)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    write(tmp_path / "out", CONFIG, [from_array(*item) for item in arrays.items()], source_folder=source, layout="hf")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_tensors_keep_their_order_however_their_threads_finish(source, tmp_path):
    turn = threading.Event()
    first, second = np.zeros(4, np.float32), np.ones(4, np.float32)

    def slow() -> np.ndarray:
        assert turn.wait(20), "the second tensor is not made while the first one is"
        return first

    def quick() -> np.ndarray:
        turn.set()
        return second

    tensors = [LazyTensor("z", first.dtype, (4,), slow), LazyTensor("a", first.dtype, (4,), quick)]
    write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf")
    assert [tensor.name for tensor in open_model(tmp_path / "out").tensors] == ["z", "a"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(first.tobytes() + second.tobytes())


def test_more_than_may_be_made_ahead_is_written_in_order_too(source, tmp_path):
    shape = (4, 1 << 20)
    values = range(6)  # 16 MB each, more than 64 MB in all
    tensors = [
        LazyTensor(f"t{i}", np.dtype(np.float32), shape, lambda i=i: np.full(shape, i, np.float32)) for i in values
    ]
    write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf")
    found = open_model(tmp_path / "out").tensors
    assert [tensor.name for tensor in found] == [f"t{i}" for i in values]
    assert all((tensor.read() == i).all() for i, tensor in zip(values, found, strict=True))


def test_large_tensors_are_made_in_parts_of_their_rows(source, tmp_path):
    whole = np.arange(3 << 20, dtype=np.float32).reshape(-1, 1024)
    asked: list[int] = []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return whole[start:stop]

    write(tmp_path / "out", CONFIG, [from_rows("x", whole.dtype, whole.shape, rows)], source_folder=source, layout="hf")
    assert np.array_equal(open_model(tmp_path / "out").tensors[0].read(), whole)
    assert sum(asked) == len(whole) and max(asked) * 4096 <= 4 << 20 and len(asked) == 3


def test_shards_hold_no_more_than_they_may_and_the_index_names_each_tensor(source, tmp_path):
    sizes = [10, 20, 30, 200, 5, 60]
    tensors = [from_array(f"t{i}", np.full(size, i, np.float32)) for i, size in enumerate(sizes)]
    write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf", max_shard_bytes=260)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    # 200 floats are over the limit by themselves; 5 and 60 are exactly at it
    expected = {"t0": 0, "t1": 0, "t2": 0, "t3": 1, "t4": 2, "t5": 2}
    assert index["weight_map"] == {tensor: names[i] for tensor, i in expected.items()}
    found = {tensor.name: tensor.read() for tensor in open_model(tmp_path / "out").tensors}
    assert all(np.array_equal(found[tensor.name], tensor.read()) for tensor in tensors)


@pytest.mark.torch
@pytest.mark.parametrize("max_shard_bytes", [60_000, 5_000_000_000])
def test_transformers_loads_what_is_written_with_the_same_logits(max_shard_bytes, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    base = write_model(tmp_path / "base", "gemma3_text")
    opened = open_model(base)
    write(
        tmp_path / "out", opened.config, opened.tensors,
        source_folder=base, layout="hf", max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    tokens = torch.tensor([[5, 6, 7, 8, 9] * 6])
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (base, tmp_path / "out")
        )
    assert torch.equal(expected, found)


@pytest.mark.mlx
def test_mlx_lm_loads_a_folder_of_the_mlx_layout(tmp_path):
    from mlx_lm.utils import load_model

    base = write_model(tmp_path / "base", "llama")
    opened = open_model(base)
    write(tmp_path / "out", opened.config, opened.tensors, source_folder=base, layout="mlx", max_shard_bytes=60_000)
    model, _ = load_model(tmp_path / "out")
    weight = np.array(model.model.layers[1].mlp.up_proj.weight)
    expected = next(t for t in opened.tensors if t.name == "model.layers.1.mlp.up_proj.weight").read()
    assert np.array_equal(weight, expected) and open_model(tmp_path / "out").layout == "mlx"


def test_tokenizer_template_and_licence_come_along_and_nothing_else(source, tmp_path):
    write(tmp_path / "out", CONFIG, [from_array("x", np.ones(1))], source_folder=source, layout="hf")
    assert files_of(tmp_path / "out") == {*COPIED, "model.safetensors", "config.json", SUMS}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in COPIED)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"


def test_a_template_that_is_given_takes_the_place_of_the_models_own(source, tmp_path):
    (tmp_path / "mine.jinja").write_text("mine")
    tensors = [from_array("x", np.ones(1))]
    template = tmp_path / "mine.jinja"
    write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf", template=template)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"chat_template": "mine"}


def test_settings_that_are_not_json_are_named_and_leave_nothing(source, tmp_path):
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"^tokenizer_config.json: not JSON .*; download the model again$"):
        write(tmp_path / "out", CONFIG, [from_array("x", np.ones(1))], source_folder=source, layout="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_checksums_are_those_of_hashlib_and_cover_every_file(source, tmp_path):
    tensors = [from_array(f"t{i}", np.arange(5000, dtype=np.float32) + i) for i in range(3)]
    write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf", max_shard_bytes=25_000)
    lines = (tmp_path / "out" / SUMS).read_text().splitlines()
    found = dict(reversed(line.split("  ", 1)) for line in lines)
    assert set(found) == files_of(tmp_path / "out") - {SUMS} and len(lines) == len(found)
    for name, digest in found.items():
        assert digest == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest(), name
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=tmp_path / "out", check=True)


def test_a_cast_rounds_to_the_nearest_number_of_the_type():
    tensor = cast(from_array("x", np.array([1 + 2**-9, 1 + 3 * 2**-9], np.float32)), np.dtype(ml_dtypes.bfloat16))
    assert tensor.read().astype(float).tolist() == [1.0, 1 + 2**-7]
    assert tensor.rows is not None and tensor.rows(1, 2).astype(float).tolist() == [1 + 2**-7]


# --- whole or absent


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_tensor_with_nan_or_infinity_is_named_with_how_many(dtype, source, tmp_path):
    good = np.array([[np.finfo(np.float16).max, -1e-7, 0.0]] * 2).astype(dtype)
    nan, infinite = good.copy(), good.copy()
    nan[1, 2] = np.nan
    infinite[0, :2] = -np.inf, np.inf
    tensors = [from_array("good", good), from_array("nan", nan), from_array("inf", infinite)]
    before = files_of(tmp_path)
    with pytest.raises(ModelError) as caught:
        write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf")
    assert "nan: 1 of 6 numbers are NaN or infinite" in str(caught.value)
    assert "inf: 2 of 6" in str(caught.value) and "good" not in str(caught.value)
    assert files_of(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_destination_that_exists_is_refused_and_left_as_it_is(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ModelError, match="exists already"):
        write(tmp_path / "out", CONFIG, [from_array("x", np.ones(1))], source_folder=source, layout="hf")
    assert files_of(tmp_path / "out") == {"mine"}


def test_a_name_that_comes_twice_is_refused(source, tmp_path):
    with pytest.raises(ModelError, match="x comes 2 times"):
        write(tmp_path / "out", CONFIG, [from_array("x", np.ones(1))] * 2, source_folder=source, layout="hf")


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(source, tmp_path):
    def read() -> np.ndarray:
        raise AssertionError("read")

    huge = (1 << 30, 1 << 27)
    with pytest.raises(ModelError, match=rf"{prod(huge) * 4 / 1e9:.1f} GB are needed, the disk has"):
        tensors = [LazyTensor("x", np.dtype(np.float32), huge, read)]
        write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing_behind_and_one_line(source, tmp_path):
    """Files may not pass 4 MB in this process: the system refuses the write as a full disk does."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
from macft.errors import ModelError
from macft.weights.tensors.lazy import from_array
from macft.weights.writer import write_model
tensors = [from_array(f"t{i}", np.ones((1 << 10, 1 << 8), np.float32)) for i in range(16)]
out, source = map(Path, sys.argv[1:])
try:
    write_model(out, {"model_type": "llama"}, tensors, source_folder=source, layout="hf")
except ModelError as error:
    print(error)
"""
    before = files_of(tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'}: cannot be written: File too large; 16.8 MB are needed, nothing was left behind"
    ]
    assert done.stderr == "" and files_of(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ModelError("a damaged file"), KeyboardInterrupt()])
def test_a_tensor_that_cannot_be_read_leaves_nothing_behind(error, source, tmp_path):
    def read() -> np.ndarray:
        raise error

    tensors = [from_array("x", np.ones(9)), LazyTensor("y", np.dtype(np.float32), (2,), read)]
    with pytest.raises(type(error)):
        write(tmp_path / "out", CONFIG, tensors, source_folder=source, layout="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
