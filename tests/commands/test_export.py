"""`macft export gguf` and `macft export ollama` as typed: what they write, and what they say when it is impossible."""

from __future__ import annotations

import json
import re
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import macft

from macft.commands.export import QUANT_NAMES
from macft.gguf.format import read_gguf
from macft.gguf.writing.quantize import QUANTS
from macft.weights.adapters.peft import AdapterConfig, write_adapter
from macft.weights.folder import weights_hash


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model in a folder that the test may change."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_random_adapter(folder: Path, base: Path, width: int = 64) -> Path:
    """On the query of both layers; it fits the tiny model if `width` is 64."""
    rng = np.random.default_rng(0)
    state = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        state[f"{name}.lora_A.weight"] = rng.normal(size=(4, width)).astype(np.float32)
        state[f"{name}.lora_B.weight"] = rng.normal(size=(width, 4)).astype(np.float32)
    folder.mkdir()
    write_adapter(folder, AdapterConfig(str(base), 4, 8.0, 0.0, ("q_proj",)), state, weights_hash(base))
    return folder


def refusal(*arguments: object, code: int) -> str:
    """What `macft export ...` says of what it does not do, without "error: "."""
    done = macft("export", *arguments)
    assert (done.code, done.out) == (code, ""), done
    assert "Traceback" not in done.err
    return done.err.removeprefix("error: ").rstrip("\n")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_several_quantizations_are_several_files(model, tmp_path):
    done = macft("export", "gguf", model, "--output", tmp_path / "a" / "x.gguf", "--quant", "f16,Q8_0", "--no-verify")
    assert done.code == 0 and done.err == ""
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x-f16.gguf", "x-q8_0.gguf"]
    assert [re.split(" [kM]B ", line)[1] for line in done.out.splitlines()] == ["(15 F16, 5 F32)", "(5 F32, 15 Q8_0)"]


def test_the_check_is_told_before_the_file(model, tmp_path):
    done = macft("export", "gguf", model, "--output", tmp_path / "x.gguf", "--quant", "f16")
    assert done.code == 0
    assert (
        "verified in llama.cpp: token ids of 16 texts and around 7 added tokens are" in done.err
        and "answers: " in done.err
    )
    assert done.out.startswith(f"{tmp_path / 'x.gguf'}: f16, ")


def test_a_small_model_in_few_bits_is_told_what_that_costs(model, tmp_path):
    done = macft("export", "gguf", model, "--output", tmp_path / "x.gguf", "--quant", "q8_0,q6_k", "--no-verify")
    assert done.code == 0 and "so small a model" not in done.err
    told = (
        "q4_k_m: this hurts so small a model (105K parameters): the likeliest next token of SmolLM2-135M stays the "
        "same at 67 to 86% of positions with q4_k_m, at 94% with q8_0; take --quant q8_0"
    )
    done = macft("export", "gguf", model, "--output", tmp_path / "y.gguf", "--quant", "q8_0,q4_k_m", "--no-verify")
    assert done.code == 0 and f"warning: {told}\n" in done.err
    done = macft("export", "ollama", model, "--output", tmp_path / "o", "--no-verify")
    assert done.code == 0 and f"note: {told}\n" in done.out


def test_a_file_that_fails_its_check_is_not_left_under_its_name(copy, tmp_path):
    """llama.cpp cuts a token of whole words out of other words too; of two files neither stays."""
    core = json.loads((copy / "tokenizer.json").read_text())
    for token in core["added_tokens"]:
        token["single_word"] = token["content"] == "<|eot_id|>"
    edit(copy / "tokenizer.json", **core)
    output = tmp_path / "new" / "x.gguf"
    said = refusal("gguf", copy, "--output", output, "--quant", "f16,q8_0", code=1)
    assert said.startswith(
        f"loading x-f16.gguf in llama.cpp\nerror: {tmp_path / 'new' / 'x-f16.gguf'}: llama.cpp reads "
    )
    assert "around the added token '<|eot_id|>' (single_word, special)" in said
    assert said.endswith("; nothing was written (--no-verify writes it without this check)")
    assert not output.parent.exists()
    said = refusal("ollama", copy, "--output", tmp_path / "o", "--quant", "f16", code=1)
    assert "around the added token '<|eot_id|>' (single_word, special)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_one_existing_file_of_two_is_refused_and_nothing_written(model, tmp_path):
    (tmp_path / "x-q8_0.gguf").write_text("kept")
    said = refusal("gguf", model, "--output", tmp_path / "x.gguf", "--quant", "f16,q8_0", "--no-verify", code=2)
    assert said == f"{tmp_path / 'x-q8_0.gguf'}: exists already; name a file that does not, or remove this one"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x-q8_0.gguf", "kept")]


def test_help_lists_the_quantizations_there_are():
    assert set(QUANT_NAMES.split(", ")) == set(QUANTS)


@pytest.mark.parametrize(
    ("quants", "said"),
    [
        ("q9", "--quant q9: not known; expected one of f32, f16, "),
        (",", "--quant ',': expected one or more of f32, f16, "),
        ("f16,f16", "--quant 'f16,f16': expected one or more of f32, f16, "),
    ],
)
def test_a_wrong_quantization_is_refused_with_the_list(quants, said, model, tmp_path):
    assert refusal("gguf", model, "--output", tmp_path / "x.gguf", "--quant", quants, code=2).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_without_a_template_a_gguf_continues_texts_and_ollama_is_refused(copy, tmp_path):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    done = macft("export", "gguf", copy, "--output", tmp_path / "x.gguf", "--no-verify")
    assert done.code == 0
    assert done.err == (
        f"warning: {copy} has no chat template: the file will continue texts; --template names one to chat\n"
    )
    assert "tokenizer.chat_template" not in read_gguf(tmp_path / "x.gguf").fields
    said = refusal("ollama", copy, "--output", tmp_path / "o", "--no-verify", code=1)
    assert said == f"{copy} has no chat template, which Ollama needs to prompt it: name one with --template"
    assert not (tmp_path / "o").exists()


def test_nan_is_refused_and_not_blamed_on_an_adapter_that_is_not_there(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 3] = np.nan
    save_file(weights, copy / "model.safetensors")
    path = tmp_path / "x.gguf"
    assert refusal("gguf", copy, "--output", path, "--no-verify", code=1).splitlines() == [
        f"{path}: not written: {copy} is broken; download it again",
        "  blk.0.ffn_down.weight: 1 of 8192 numbers are NaN or infinite",
    ]
    said = refusal("ollama", copy, "--output", tmp_path / "o", "--no-verify", code=1)
    assert said.startswith(f"{tmp_path / 'o' / 'copy-q4_k_m.gguf'}: not written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_unknown_architecture_is_named_before_anything_else(copy, tmp_path):
    edit(copy / "config.json", model_type="falcon_x")
    core = json.loads((copy / "tokenizer.json").read_text())
    core["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (copy / "tokenizer.json").write_text(json.dumps(core))
    for command in ("gguf", "ollama"):
        said = refusal(command, copy, "--output", tmp_path / "x.gguf", "--no-verify", code=1)
        assert said.startswith("config.json: model_type 'falcon_x' cannot become a GGUF file (known: llama, mistral, ")
        assert "macft export merged" in said and "\n" not in said


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_both_numbers(copy, tmp_path):
    core = json.loads((copy / "tokenizer.json").read_text())
    rows = load_file(copy / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    core["added_tokens"].append({**core["added_tokens"][-1], "id": rows, "content": "<|more|>"})
    (copy / "tokenizer.json").write_text(json.dumps(core))
    said = refusal("gguf", copy, "--output", tmp_path / "x.gguf", "--no-verify", code=1)
    assert f"the tokenizer has {rows + 1} tokens, but model.embed_tokens.weight only {rows} rows" in said
    assert "take the tokenizer files that the model was trained with" in said and "\n" not in said


def test_a_litgpt_checkpoint_is_told_how_it_gets_there(tmp_path):
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit" / "lit_model.pth").write_bytes(b"")
    said = refusal("gguf", tmp_path / "lit", "--output", tmp_path / "x.gguf", code=1)
    assert said.startswith(f"{tmp_path / 'lit'}: a litgpt checkpoint, ") and "macft convert model" in said


# --- an adapter alone


def test_an_adapter_alone(model, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", model)
    path = tmp_path / "lora.gguf"
    done = macft("export", "gguf", model, "--adapter", adapter, "--adapter-only", "--output", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"use it: llama-server -m BASE.gguf --lora {path}\n")
    assert len(read_gguf(path).tensors) == 4


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--quant", "q8_0"], "--quant"),
        (["--template", "chatml", "--verify"], "--template, --verify"),
    ],
)
def test_what_has_no_effect_on_an_adapter_alone_is_refused(option, named, model, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", model)
    arguments = ("gguf", model, "--adapter", adapter, "--adapter-only", "--output", tmp_path / "x.gguf", *option)
    assert f"{named} would have no effect" in refusal(*arguments, code=2)
    assert not (tmp_path / "x.gguf").exists()


def test_an_adapter_of_another_width_is_refused(model, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", model, width=96)
    for option in ([], ["--adapter-only"]):
        arguments = ("gguf", model, "--adapter", adapter, "--output", tmp_path / "x.gguf", *option)
        lines = refusal(*arguments, code=1).splitlines()
        assert lines[0] == "the adapter does not fit this model; nothing was merged:" and len(lines) == 3
        assert "model.layers.0.self_attn.q_proj: [64, 64] in the model" in lines[1]
        assert not (tmp_path / "x.gguf").exists()


# --- folders that cannot be


def test_a_folder_for_ollama_that_cannot_be_is_one_line_that_names_it(model, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    for output, expected in {
        tmp_path / "file" / "o": "cannot be written: ",
        tmp_path / "link": "exists already; ",
    }.items():
        said = refusal("ollama", model, "--output", output, "--no-verify", code=2)
        assert said.startswith(f"{output}: {expected}") and ".tmp" not in said and "\n" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_failed_export_leaves_no_empty_folders(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = np.inf
    save_file(weights, copy / "model.safetensors")
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "a" / "b" / "x.gguf", tmp_path / "there" / "x.gguf"):
        refusal("gguf", copy, "--output", output, "--no-verify", code=1)
        refusal("ollama", copy, "--output", output.with_suffix(""), "--no-verify", code=1)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["copy", "there"]


def test_create_says_that_nobody_answers_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    said = refusal("ollama", model, "--output", tmp_path / "o", "--create", "--no-verify", code=1)
    assert said.startswith("no Ollama answers at http://127.0.0.1:9 (") and "ollama serve" in said
    assert list(tmp_path.iterdir()) == []


def test_create_tells_another_program_from_ollama_without_its_page(model, tmp_path, monkeypatch):
    class Pages(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
        said = refusal("ollama", model, "--output", tmp_path / "o", "--create", "--no-verify", code=1)
        server.shutdown()
    expected = "GET /api/version failed with 404: File not found; is this Ollama? Correct OLLAMA_HOST"
    assert said == f"http://127.0.0.1:{server.server_port}: {expected}"
    assert list(tmp_path.iterdir()) == []
