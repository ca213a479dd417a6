"""Messages name what the user typed: a .gguf file, not the folder in the cache that was made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import macft
from support.tiny_gguf import TinyGguf, byte_level, hf_weights, write_gguf

MODEL = byte_level(TinyGguf(layers=1))
REFUSING = "{{ raise_exception('no system text, please') }}"
ROWS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def gguf(folder: Path, template: str | None) -> Path:
    return write_gguf(
        folder / "base.gguf", replace(MODEL, fields={"tokenizer.chat_template": template}), hf_weights(MODEL)
    )


def test_chat_with_a_gguf_file_without_a_template_names_the_file_and_raw(tmp_path: Path) -> None:
    path = gguf(tmp_path, None)
    said = macft("chat", path, "--prompt", "hi")
    assert said.code == 1
    assert said.err.splitlines()[-1] == (
        f"error: {path}: no chat template; give a Jinja file or a name as --template, or continue text as it is with "
        "macft chat --raw"
    )


COMMANDS = {
    "chat": ("chat", "MODEL", "--prompt", "hi"),
    "train": ("train", "run.yaml"),
    "data check": ("data", "check", "run.yaml"),
    "data preview": ("data", "preview", "run.yaml"),
    "export ollama": ("export", "ollama", "MODEL", "--output", "out"),
}


@pytest.mark.parametrize("template", [None, REFUSING], ids=["without", "refusing"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_message_about_a_gguf_file_names_the_cache(
    command: str, template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = gguf(tmp_path, template)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    run = {"model_name_or_path": str(path), "dataset": "rows.jsonl", "output_dir": "out", "finetuning_type": "lora"}
    Path("run.yaml").write_text(json.dumps(run), encoding="utf-8")
    arguments = [str(path) if word == "MODEL" else word for word in COMMANDS[command]]
    said = macft(*arguments)
    text = "\n".join([said.out, *(line for line in said.err.splitlines() if not line.startswith("importing "))])
    assert said.code and (str(path) if template is None else "no system text, please") in text
    assert "/models/base-" not in text


def test_the_chat_goes_on_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a chat says of one question does not go through the error of the command."""
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    path = gguf(tmp_path, REFUSING)
    said = macft("chat", path)
    assert f"the chat template ({path}/chat_template.jinja) refuses this conversation" in said.err
    assert "/models/base-" not in "\n".join(line for line in said.err.splitlines() if "importing" not in line)
