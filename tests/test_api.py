"""`import macft` as a library: what it offers, what importing it costs, and that it does what the commands do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import CHECKOUT, write_chat_data, write_config
from support.commands import macft as command
from support.toy_backend import write_toy_model

import macft
from macft.api import conversions

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Paris is the capital."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    write_toy_model(folder / "model")
    write_chat_data(folder / "chat.jsonl")
    write_config(
        folder / "run.yaml",
        model_name_or_path=str(folder / "model"),
        dataset=str(folder / "chat.jsonl"),
        output_dir=str(folder / "run"),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=3,
    )
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run folder that the library trained."""
    return macft.train(macft.load_config(folder / "run.yaml", {"backend": "torch", "lora_rank": 4}))


def test_importing_macft_imports_nothing_heavy():
    heavy = [
        "numpy",
        "pydantic",
        "yaml",
        "rich",
        "click",
        "torch",
        "mlx",
        "transformers",
        "tokenizers",
        "macft.config",
        "macft.api",
    ]
    code = f"import sys, macft\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", macft.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(macft, name).__doc__
    assert name in dir(macft)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'macft' has no attribute 'fine_tune'"):
        _ = macft.fine_tune


def test_overrides_are_keys_with_values_or_the_words_of_a_command_line(folder):
    by_mapping = macft.load_config(
        folder / "run.yaml",
        {"learning_rate": 1e-05, "lora_target": ["q_proj", "v_proj"], "run_name": "1", "fp16": False},
    )
    words = ["learning_rate=1e-5", "--lora_target", "q_proj,v_proj", "run_name=1", "fp16=false"]
    assert by_mapping == macft.load_config(folder / "run.yaml", words)
    assert by_mapping.learning_rate == 1e-5 and by_mapping.run_name == "1"


def test_a_run_is_the_one_that_the_command_trains(folder, run):
    arguments = (f"output_dir={folder / 'by-command'}", "lora_rank=4", "--backend", "torch")
    done = command("train", folder / "run.yaml", *arguments)
    assert done.code == 0, done.err
    weights = [load_file(path / "adapter_model.safetensors") for path in (run, folder / "by-command")]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_model_answers_as_the_chat_command_does(backend, folder, run):
    model = macft.load_model(folder / "model", adapter=run, backend=backend)
    arguments = ("--adapter", run, "--backend", backend, "--prompt", "hello", "--max-new-tokens", "6")
    done = command("chat", folder / "model", *arguments, "--temperature", "0")
    assert model.generate("hello", max_new_tokens=6) + "\n" == done.out
    as_messages = [{"role": "system", "content": "one two"}, *MESSAGES[:1]]
    assert model.generate(as_messages, max_new_tokens=6) != model.generate("hello", max_new_tokens=6)
    hot = macft.Sampling(temperature=1.5, seed=1)
    assert model.generate("hello", max_new_tokens=6, sampling=hot) != model.generate("hello", max_new_tokens=6)


def test_logps_are_those_of_the_answer_alike_on_both_engines(folder, run):
    scored = [
        macft.load_model(folder / "model", adapter=run, backend=backend).logps(MESSAGES) for backend in ("mlx", "torch")
    ]
    assert "".join(token.text for token in scored[0]).startswith("Paris is the capital.<|im_end|>")
    assert [token.id for token in scored[0]] == [token.id for token in scored[1]]
    logps = np.array([[token.logp for token in tokens] for tokens in scored])
    assert np.all(logps < 0) and np.allclose(logps[0], logps[1], atol=1e-4)


def test_logps_of_a_text_are_those_of_transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM

    text = "the quick brown fox"
    model = macft.load_model(folder / "model", backend="torch", raw=True)
    scored = model.logps(text)
    ids = torch.tensor([model.chat.tokenizer.encode(text).ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "model").eval()(ids).logits
    expected = torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    assert np.allclose([token.logp for token in scored], expected.numpy(), atol=1e-4)
    assert "".join(token.text for token in scored) in text
    with pytest.raises(macft.MacftError, match="raw=True"):
        model.logps(MESSAGES)


def test_a_text_longer_than_the_model_is_refused(folder):
    model = macft.load_model(folder / "model", backend="torch")
    with pytest.raises(macft.MacftError, match=r"the text has \d+ tokens, the model holds \d+; shorten it"):
        model.logps("hello " * (model.chat.context_length or 0))


def test_convert_tells_an_adapter_from_a_model(folder, run, tmp_path):
    assert macft.convert(run, tmp_path / "adapter", to="mlx") == tmp_path / "adapter"
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()
    assert macft.convert(folder / "model", tmp_path / "model", to="mlx") == tmp_path / "model"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with pytest.raises(macft.MacftError, match="an adapter is not quantized"):
        macft.convert(run, tmp_path / "x", to="mlx", bits=4)
    with pytest.raises(macft.MacftError, match="to peft or mlx, not to hf"):
        macft.convert(run, tmp_path / "x", to="hf")


def test_exports_write_what_the_commands_write(folder, run, tmp_path):
    macft.export_gguf(folder / "model", tmp_path / "api.gguf", adapters=[run], quants="f16", verify=False)
    arguments = ("--adapter", run, "--quant", "f16", "--no-verify")
    command("export", "gguf", folder / "model", "--output", tmp_path / "command.gguf", *arguments)
    assert (tmp_path / "api.gguf").read_bytes() == (tmp_path / "command.gguf").read_bytes()
    report = macft.export_ollama(folder / "model", tmp_path / "o", adapters=[run], quant="q8_0", name="m", verify=False)
    assert (report.name, report.gguf.quant) == ("m", "q8_0") and (tmp_path / "o" / "Modelfile").is_file()
    merged = macft.export_merged(folder / "model", tmp_path / "merged", adapters=[run])
    assert merged.modules == 14 and macft.load_model(tmp_path / "merged", backend="torch").generate("hello")


def test_the_commands_call_the_library(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(conversions, "convert_model", lambda *arguments, **options: called.append((arguments, options)))
    (tmp_path / "out").mkdir()
    command("convert", "model", "model", tmp_path / "out", "--to", "mlx", "--bits", "4")
    options = {"to": "mlx", "bits": 4, "group_size": None, "verify": False}
    assert called == [(("model", tmp_path / "out"), options)]
