"""A GGUF file in real llama.cpp: what it computes, what separates it from its source, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.tiny_tokenizer import CHATML, DEFAULT_SYSTEM, GEMMA
from support.toy_backend import write_toy_model

from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import ModelError
from macft.gguf.exporter.export import export_gguf, export_lora
from macft.models.locate import resolve_model
from macft.verify import llama_cpp_compare as comparison
from macft.verify.llama_cpp import llama_cpp
from macft.verify.llama_cpp_compare import LIMITS, GgufCheck, verify_gguf
from macft.verify.logits import Subject, VerifyError
from macft.weights.adapters.peft import Adapter, AdapterConfig, read_adapter, write_adapter
from macft.weights.folder import ModelFolder, weights_hash

PROMPT = [5, 17, 99, 3, 250, 41, 7, 123, 77, 300]


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


def template_of(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(source, name="test", special_map=tokenizer.special_map)


def written(model: Path, path: Path, quant: str = "f32", template: str = CHATML, adapters: tuple = ()) -> Path:
    folder = ModelFolder("tiny", model)
    export_gguf(folder, adapters, {quant: path}, template=template)
    return path


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def random_adapter(folder: Path, base: Path) -> Adapter:
    """On the query and the second linear of the MLP, strong enough to change every answer."""
    rng = np.random.default_rng(0)
    state = {}
    for layer in range(2):
        for module, columns in {"self_attn.q_proj": 64, "mlp.down_proj": 128}.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            state[f"{name}.lora_A.weight"] = 0.3 * rng.normal(size=(4, columns)).astype(np.float32)
            state[f"{name}.lora_B.weight"] = 0.3 * rng.normal(size=(64, 4)).astype(np.float32)
    folder.mkdir()
    config = AdapterConfig(str(base), 4, 8.0, 0.0, ("q_proj", "down_proj"))
    write_adapter(folder, config, state, weights_hash(base))
    return read_adapter(folder)


def checked(path: Path, model: Path, source: Subject | None = None, **settings) -> GgufCheck:
    tokenizer = load_tokenizer(model)
    settings = {"quant": "f32", "template": load_template(model, tokenizer.special_map), **settings}
    return verify_gguf(path, source or Subject(model), tokenizer=tokenizer, threads=1, **settings)


def torch_logps(model: Path, tokens: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def test_next_tokens_are_those_of_transformers_whatever_comes_first(file, model, tokenizer):
    expected = torch_logps(model, PROMPT)
    with llama_cpp(file, threads=1) as server:
        for length in range(1, len(PROMPT) + 1):
            ids, logps = server.next_logps(PROMPT[:length], tokenizer.vocab_size)
            assert sorted(ids) == list(range(tokenizer.vocab_size))
            assert np.abs(logps - expected[length - 1][ids]).max() < 1e-4


def test_the_likeliest_token_may_be_a_part_of_a_character(file, tokenizer):
    """The server waits for the rest of a character and gives no probabilities: another token is forced on it."""
    with llama_cpp(file, threads=1) as server:
        ids, logps = server.next_logps(PROMPT, tokenizer.vocab_size)
        content = {"prompt": PROMPT, "n_predict": 1, "n_probs": tokenizer.vocab_size, "temperature": 0.0}
        half = {**content, "logit_bias": [[tokenizer.vocabulary["æ"], 1e7]]}  # the first byte of three
        assert "completion_probabilities" not in server.post("/completion", half)
        plain = server.post("/completion", content)["completion_probabilities"][0]["top_logprobs"]
    # which token is forced does not change the probabilities before sampling
    by_id = {entry["id"]: entry["logprob"] for entry in plain}
    assert max(abs(by_id[id_] - logp) for id_, logp in zip(ids.tolist(), logps, strict=True)) < 1e-5


def test_a_good_file_is_told_with_numbers(file, model):
    found = checked(file, model)
    assert (found.texts, found.prompts, found.warnings, found.positions) == (16, 4, (), 24)
    assert found.top1 == 1.0 and found.kl < 1e-9 and found.engine in ("mlx", "torch")
    assert found.note.startswith(
        "verified in llama.cpp: token ids of 16 texts and around 7 added tokens are the tokenizer's, prompts of 4 "
    )
    assert f"top-1 agrees with {found.engine} at 100.0%" in found.note and "(f32: up to 1e-05)" in found.note
    assert isinstance(found.answer, str)


def test_without_an_engine_the_note_says_that_numbers_were_not_compared(file, model, monkeypatch):
    for package in ("mlx", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    found = checked(file, model)
    assert (found.top1, found.kl, found.positions, found.engine) == (None, None, 0, None)
    assert "no training engine is installed, so its numbers were not compared" in found.note


def test_without_a_source_the_note_says_so(file, tokenizer):
    found = verify_gguf(file, None, quant="f32", tokenizer=tokenizer, template=None, threads=1)
    assert "no source was given, so its numbers were not compared" in found.note
    assert found.prompts == 0


def test_an_adapter_is_part_of_the_source(tmp_path, model):
    adapter = random_adapter(tmp_path / "adapter", model)
    merged = written(model, tmp_path / "merged.gguf", adapters=(adapter,))
    assert checked(merged, model, Subject(model, (adapter,))).kl < 1e-9
    with pytest.raises(VerifyError, match=r"verification in llama.cpp failed: next tokens at 24 positions"):
        checked(merged, model)


def test_a_lora_file_is_loaded_beside_its_base(tmp_path, file, model):
    adapter = random_adapter(tmp_path / "adapter", model)
    export_lora(ModelFolder("tiny", model), adapter, tmp_path / "lora.gguf")
    assert checked(file, model, Subject(model, (adapter,)), loras=[tmp_path / "lora.gguf"]).kl < 1e-9


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0"])
def test_each_rounding_is_within_its_limit_and_another_model_is_not(quant, tmp_path, model):
    found = checked(written(model, tmp_path / "a.gguf", quant), model, quant=quant)
    assert 0 < found.kl < LIMITS[quant]
    other = write_toy_model(tmp_path / "other", seed=1)
    with pytest.raises(VerifyError) as caught:
        checked(written(other, tmp_path / "b.gguf", quant), model, quant=quant)
    text = str(caught.value)
    assert f"expected up to {LIMITS[quant]:g} for {quant}: please report this" in text and "\n" not in text


def rewritten(source: Path, path: Path, change) -> Path:
    """A GGUF file with one field changed: `change(name, value)` returns the value to write."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = change(name, field.contents())
            writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_token_ids_are_an_error_that_names_the_first(tmp_path, file, model, tokenizer):
    a, b = tokenizer.vocabulary["T"], tokenizer.vocabulary["c"]

    def swapped(name, value):
        if name == "tokenizer.ggml.tokens":
            value[a], value[b] = value[b], value[a]
        return value

    with pytest.raises(VerifyError) as caught:
        checked(rewritten(file, tmp_path / "swapped.gguf", swapped), model)
    text = str(caught.value)
    assert (
        f"token 1 after '<|im_start|>' is {b} 'c' in llama.cpp, {a} 'T' in the tokenizer" in text and "\n" not in text
    )


def test_another_template_is_a_warning_that_names_the_first_difference(tmp_path, model, tokenizer):
    path = written(model, tmp_path / "default.gguf", template=DEFAULT_SYSTEM)
    found = checked(path, model)
    assert found.prompts == 2 and len(found.warnings) == 2  # those that bring a system message are equal
    assert found.warnings[0].startswith(
        "llama.cpp renders this prompt differently from the template (user): token 1 after "
    )
    same = checked(path, model, template=template_of(DEFAULT_SYSTEM, tokenizer))
    assert same.prompts == 4 and same.warnings == ()


def test_a_bos_that_llama_cpp_adds_is_the_templates_own_and_refused_roles_are_left_out(tmp_path, model, tokenizer):
    path = written(model, tmp_path / "gemma.gguf", template=GEMMA)

    def adding(name, value):
        return True if name == "tokenizer.ggml.add_bos_token" else value

    for changed in (path, rewritten(path, tmp_path / "bos.gguf", adding)):
        found = checked(changed, model, template=template_of(GEMMA, tokenizer))
        assert (found.prompts, found.warnings) == (2, ())
        assert found.kl < 1e-9


def test_divergence_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    # the file has one token more, which does not count, and its ids in another order
    found = (np.array([2, 3, 0, 1]), np.log(np.array([0.25, 0.5, 0.125, 0.125])))
    top1, kl = comparison._divergence(logits, [1], [found])
    # among the three: 0.25, 0.25, 0.5 against 0.5, 0.25, 0.25
    assert top1 == 0.0
    assert kl == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.25) + 0.25 * np.log(0.25 / 0.5))
    assert comparison._divergence(logits, [2], [(np.array([0, 1, 2]), logits[1])]) == (1.0, pytest.approx(0.0))


def test_a_probability_of_zero_is_far_not_infinite():
    logits = np.array([[0.0, -60.0]])
    top1, kl = comparison._divergence(logits, [1], [(np.array([0, 1]), np.array([0.0, -3.4e38]))])
    assert top1 == 1.0 and 0 < kl < 1e-20  # e^-60 times a difference of 50


def test_fewer_positions_for_a_large_vocabulary():
    assert comparison._places(160, 49152)[0] == 4 and comparison._places(160, 49152)[-1] == 160
    assert [len(comparison._places(160, size)) for size in (500, 49152, 152000, 1 << 20)] == [24, 24, 8, 8]
    assert comparison._places(2, 500) == [2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file|failed to load model"),
        (b"not a model" * 100, "failed to load model|failed to read magic"),
        (b"", "data is not within the file bounds, model is corrupted or incomplete"),
    ],
)
def test_a_file_that_does_not_load_is_one_line_with_the_reason(content, reason, tmp_path, file, model, capfd):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content or file.read_bytes()[:-4000])
    with pytest.raises(ModelError) as caught:
        checked(path, model)
    text = str(caught.value)
    assert text.startswith(f"{path}: llama.cpp does not load it: ") and "\n" not in text
    assert any(part in text for part in reason.split("|")), text
    assert capfd.readouterr() == ("", "")


def test_nothing_is_said_and_nothing_left_running(file, capfd):
    with llama_cpp(file, threads=1) as server:
        server.chat([{"role": "user", "content": "hello"}], max_new_tokens=4)
        process = server._process
        assert process.poll() is None
    assert process.poll() is not None
    assert capfd.readouterr() == ("", "")


def test_a_crash_of_llama_cpp_is_one_line(file):
    with llama_cpp(file, threads=1) as server:
        os.kill(server._process.pid, signal.SIGKILL)
        with pytest.raises(ModelError) as caught:
            server.tokenize("hello")
    assert str(caught.value) == (
        f"{file}: llama.cpp gave no answer at /tokenize: it was ended by SIGKILL: out of memory?"
    )


def test_a_refusal_of_the_server_is_one_line(file):
    with llama_cpp(file, context=256, threads=1) as server, pytest.raises(ModelError) as caught:
        server.next_logps([5] * 300, 10)
    assert "llama.cpp refuses /completion: " in str(caught.value) and "context size" in str(caught.value)


def test_proxies_of_the_environment_are_not_used(file, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with llama_cpp(file, threads=1) as server:
        assert server.tokenize("hello")


@pytest.mark.slow
def test_the_built_in_model_is_verified_at_q8_0(tmp_path):
    model = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(model.path)
    template = load_template(model.path, tokenizer.special_map)
    path = tmp_path / "q8_0.gguf"
    export_gguf(model, (), {"q8_0": path}, template=template.source)
    found = verify_gguf(path, Subject(model.path), quant="q8_0", tokenizer=tokenizer, template=template, threads=1)
    assert (found.texts, found.prompts, found.warnings) == (16, 4, ())
    assert found.kl < 0.01 and found.top1 > 0.7
    assert found.answer.startswith("Hello!"), json.dumps(found.answer)
