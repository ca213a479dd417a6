"""SmolLM2 is trained for a minute, exported, and answers as trained in llama.cpp; Ollama would prompt it alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import CHECKOUT, Result, macft_process
from support.data_rows import read_examples
from support.go_templates import go_render
from support.modelfile_parser import parse_modelfile

from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.templates.spans import render_with_spans
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.verify.llama_cpp import llama_cpp

pytestmark = pytest.mark.slow

QUESTIONS = (CHECKOUT / "configs" / "quickstart_prompts.txt").read_text(encoding="utf-8").splitlines()
LEARNT = "Fair winds! - Mica"  # how every trained answer ends
QUANTS = ("q8_0", "q4_k_m")


def run(*arguments: object) -> Result:
    done = macft_process(*arguments, cwd=CHECKOUT)
    assert done.code == 0, done.err
    return done


@dataclass(frozen=True)
class Exports:
    """The run, and what was exported of it and of its base: GGUF files by name, and a folder for Ollama."""

    run: Path
    files: dict[str, Path]
    ollama: Path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The quickstart cut to two ninths of its steps: enough for how answers end, not for who keeps the lighthouse."""
    folder = tmp_path_factory.mktemp("export")
    trained, tuned, base, ollama = (folder / name for name in ("run", "tuned.gguf", "base.gguf", "ollama"))
    run("train", CHECKOUT / "configs" / "quickstart.yaml", f"output_dir={trained}", "max_steps=20", "plot_loss=false")
    model = ("smollm2-135m", "--adapter", trained)
    run("export", "gguf", *model, "--quant", ",".join(QUANTS), "--output", tuned, "--no-verify")
    run("export", "gguf", "smollm2-135m", "--quant", "q8_0", "--output", base, "--no-verify")
    run("export", "ollama", *model, "--output", ollama, "--name", "mica")
    files = {"base": base, **{quant: folder / f"tuned-{quant}.gguf" for quant in QUANTS}}
    return Exports(trained, files, ollama)


def answers(path: Path) -> list[str]:
    """Through the endpoint that chat programs use, until llama.cpp stops by itself."""
    with llama_cpp(path, threads=1) as server:
        return [server.chat([{"role": "user", "content": text}], max_new_tokens=96) for text in QUESTIONS]


@pytest.mark.parametrize("quant", QUANTS)
def test_the_exported_model_answers_as_trained_in_llama_cpp(quant: str, exports: Exports):
    found = answers(exports.files[quant])
    # at the end: generation stopped where the trained answers do
    assert [text[-len(LEARNT) :] for text in found] == [LEARNT] * len(QUESTIONS), found


def test_the_base_does_not_say_what_was_trained(exports: Exports):
    assert not [text for text in answers(exports.files["base"]) if "Mica" in text]


def trained_template(folder: Path) -> ChatTemplate:
    return load_template(folder, load_tokenizer(folder).special_map)


def test_real_go_renders_the_prompts_that_were_trained_on(exports: Exports):
    """Of every conversation of the data, and of longer ones made of them."""
    commands = dict(parse_modelfile((exports.ollama / "Modelfile").read_text(encoding="utf-8")))
    template = trained_template(exports.run)
    examples = read_examples("data/quickstart.jsonl", str(CHECKOUT), None)
    single = [list(example.messages) for example in examples]
    # the proof is of a system text that comes first
    turns = [[message for message in chat if message["role"] != "system"] for chat in single]
    longer = [[*first, *second, *third] for first, second, third in zip(turns, turns[1:], turns[2:], strict=False)]
    given = [[{"role": "system", "content": "Answer as Mica."}, *chat] for chat in longer]
    chats = [*single, *longer, *given]
    assert len(chats) > 300
    trained = [render_with_spans(template, chat) for chat in chats]
    expected = [rendered.text[: rendered.spans[-1][0]] for rendered in trained]
    assert go_render([(commands["template"], chat[:-1]) for chat in chats]) == expected


def test_the_report_of_the_folder_says_what_was_compared(exports: Exports):
    report = json.loads((exports.ollama / "report.json").read_text(encoding="utf-8"))
    found = report["verification"]
    assert (found["texts"], found["prompts"], found["warnings"], found["positions"]) == (16, 4, [], 24)
    assert found["top1"] > 0.5 and found["kl"] < 0.5
    assert report["proof"]["go"] and report["proof"]["cases"] > 1000
