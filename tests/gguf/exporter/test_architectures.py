"""Every architecture exported: the fields and tensors of llama.cpp's own converter, the numbers of transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_converter import Job, convert
from support.tiny_export import (
    CASES,
    end_tokens,
    exported,
    plain_token,
    read_fields,
    token_ids,
    torch_greedy,
    torch_logps,
    typed,
    write_model,
)
from support.tiny_gguf import LlamaCpp, llama_cpp

from macft.gguf.architectures import ARCHITECTURES
from macft.gguf.exporter.export import export_gguf
from macft.weights.folder import ModelFolder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each case a model, with converted.gguf of llama.cpp's converter in it; one run of it makes all files."""
    root = tmp_path_factory.mktemp("exported")
    jobs = []
    for index, (name, case) in enumerate(CASES.items()):
        folder = write_model(root / str(index) / "model", case)
        jobs.append(Job(str(folder), str(folder / "converted.gguf"), pre="" if case.spm else "gpt-2"))
        del name
    convert(jobs)
    return {name: root / str(index) / "model" for index, name in enumerate(CASES)}


def test_every_model_type_of_the_table_has_a_case() -> None:
    wrapped = {"qwen3_5", "qwen3_5_moe"}  # see test_a_text_model_within_another_is_exported_alike
    assert {case.model_type for case in CASES.values()} | wrapped == set(ARCHITECTURES)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_fields_are_those_of_llama_cpps_converter(folders: dict[str, Path], name: str) -> None:
    model = exported(folders[name])
    reader = gguf.GGUFReader(folders[name] / "converted.gguf")
    assert reader.fields["general.architecture"].contents() == model.architecture
    assert next(iter(model.fields.items())) == ("general.architecture", model.architecture)
    found = {key.removeprefix(f"{model.architecture}."): typed(value) for key, value in model.fields.items()}
    expected = read_fields(reader, model.architecture)
    del found["general.architecture"]
    for key in CASES[name].differs:
        assert found.pop(key, None) != expected.pop(key, None), key
    assert found == expected


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_llama_cpps_converter(folders: dict[str, Path], name: str) -> None:
    found = {tensor.name: tensor for tensor in exported(folders[name]).tensors}
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(folders[name] / "converted.gguf").tensors}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        array = found[key].read()
        assert found[key].shape == array.shape == shape, key
        assert found[key].dtype == array.dtype == np.float32
        # -exp(A_log) is one unit in the last place off in the converter, whose exponential is float32's
        tolerance = 1.2e-7 if key.endswith(".ssm_a") else 0.0
        np.testing.assert_allclose(array, tensor.data.reshape(shape), rtol=tolerance, atol=0, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does(folders: dict[str, Path], name: str) -> None:
    """Log-probabilities of the whole vocabulary after prompts of several lengths, and 32 greedy tokens."""
    case, folder = CASES[name], folders[name]
    path = folder / "exported.gguf"
    export_gguf(ModelFolder(name, folder), [], {"f32": path}, template=None)
    reader = gguf.GGUFReader(path)
    tokens, ends, plain = token_ids(folder, max(case.lengths)), end_tokens(reader), plain_token(reader)
    expected = torch_logps(folder, tokens)
    start = min(20, max(case.lengths)) if min(case.lengths) == 1 else max(case.lengths)
    with llama_cpp(path) as oracle:
        found = {length: next_logps(oracle, tokens[:length], plain, expected.shape[1]) for length in case.lengths}
        greedy = greedy_tokens(oracle, tokens[:start], ends)
    # measured 2e-5, 1.4e-4 with linear attention; the GELU of gemma is looked up in a table of half floats: 2.1e-3
    tolerance = 3e-3 if case.model_type.startswith("gemma") else 1e-3
    for length, logps in found.items():
        np.testing.assert_allclose(logps, expected[length - 1], rtol=0, atol=tolerance, err_msg=f"{length} tokens")
    assert greedy == torch_greedy(folder, tokens[:start], len(greedy), ends)
    assert len(greedy) == 32


def next_logps(oracle: LlamaCpp, tokens: list[int], plain: int, size: int) -> np.ndarray:
    """[vocabulary] after `tokens`. The token drawn is `plain`, which does not change the numbers of the others."""
    content = {"prompt": tokens, "n_predict": 1, "n_probs": size, "logit_bias": [[plain, 1e4]], "cache_prompt": False}
    top = oracle.post("/completion", content)["completion_probabilities"][0]["top_logprobs"]
    assert len(top) == size
    logps = np.zeros(size)
    logps[[entry["id"] for entry in top]] = [entry["logprob"] for entry in top]
    return logps


def greedy_tokens(oracle: LlamaCpp, tokens: list[int], without: list[int]) -> list[int]:
    banned = [[token, False] for token in without]
    content = {"prompt": tokens, "n_predict": 32, "temperature": 0.0, "logit_bias": banned, "return_tokens": True}
    return list(oracle.post("/completion", {**content, "cache_prompt": False})["tokens"])
