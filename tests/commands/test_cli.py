"""The command line as a user meets it: commands, help, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from support.commands import CHECKOUT, QUESTIONS, macft, macft_process, write_chat_data, write_config
from support.toy_backend import write_toy_model

from macft.cli import cli
from macft.commands.data import data
from macft.config.load import load_config

SAMPLING = {"--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty", "--seed"}
MODEL = {"--backend", "--template", "--quantization-bit", "--max-new-tokens"}
# Command -> its options. A new one needs a line here, a test that it changes something, and a word in the docs.
COMMANDS = {
    "train": {"--backend", "--dry-run"},
    "chat": {"--adapter", "--prompt", "--prompt-file", "--system", "--raw"} | MODEL | SAMPLING,
    "compare": {"--adapter", "--prompts", "--json"} | MODEL,
    "config explain": {"--json"},
    "data preview": {"--row", "--model", "--json"},
    "data stats": {"--model", "--json", "--plot"},
    "data check": {"--model", "--json"},
    "convert adapter": {"--to", "--base", "--verify"},
    "convert model": {"--to", "--bits", "--group-size", "--verify"},
    "export merged": {"--adapter", "--output", "--to", "--bits", "--requantize", "--verify"},
    "export gguf": {"--adapter", "--output", "--quant", "--adapter-only", "--template", "--verify"},
    "export ollama": {"--adapter", "--output", "--name", "--quant", "--system", "--create", "--template", "--verify"},
    "doctor": {"--json"},
}
STEP_LINE = re.compile(r"step +\d+/\d+  loss \d+\.\d{4}  grad +[\d.]+  lr [\d.e+-]+ ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_toy_model(folder / "model")
    write_chat_data(folder / "chat.jsonl")
    (folder / "prompts.txt").write_text("hello\n你好\n", encoding="utf-8")
    write_config(
        folder / "run.yaml",
        model_name_or_path="model",
        dataset="chat.jsonl",
        output_dir="run",
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=2,
    )
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter trained by the real command in a process of its own."""
    done = macft_process("train", "run.yaml", "output_dir=adapter", "--backend", "mlx", cwd=folder)
    assert done.code == 0, done.err
    return folder / "adapter"


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        found |= commands(command, f"{name} ") if isinstance(command, click.Group) else {prefix + name: command}
    return found


def test_commands_and_options_are_these():
    found = {
        name: {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
        for name, command in commands(cli).items()
    }
    assert found == COMMANDS


@pytest.mark.parametrize("name", ["", "data", *COMMANDS])
def test_help_is_written_in_sentences(name):
    shown = macft(*name.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    command = commands(cli).get(name) or {"": cli, "data": data}[name]
    first = str(command.help).strip()
    assert first[0].isupper() and first.endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.help:
            assert parameter.help.endswith((".", ".'")), f"{parameter.opts[0]}: {parameter.help}"


def test_help_takes_less_than_three_tenths_of_a_second():
    script = Path(sys.executable).parent / "macft"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([script, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3, times


def test_version_is_told():
    assert re.fullmatch(r"macft, version \d+\.\d+\.\d+\n", macft("--version").out)


@pytest.mark.parametrize(
    "arguments", [(), ("tarin",), ("chat",), ("data",), ("compare", "model"), ("chat", "model", "--top-p", "2")]
)
def test_wrong_usage_exits_with_2_and_says_nothing_on_stdout(arguments):
    result = macft(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: " in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_train_prints_a_line_a_logging_step_and_ends_0(backend, folder):
    result = macft("train", "run.yaml", f"output_dir=lines-{backend}", "--backend", backend)
    assert (result.code, result.out) == (0, f"lines-{backend}\n")
    lines = [line for line in result.err.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all(STEP_LINE.match(line) for line in lines)
    assert "plan: 6 steps, 3 per epoch, 2 examples a step (2 x 1)\n" in result.err
    assert (folder / f"lines-{backend}" / "adapter_model.safetensors").is_file()


def test_train_in_a_process_keeps_progress_off_stdout(adapter, folder):
    done = macft_process("train", "run.yaml", "output_dir=again", cwd=folder)
    assert (done.code, done.out) == (0, "again\n")
    assert len([line for line in done.err.splitlines() if STEP_LINE.match(line)]) == 3
    assert "\x1b" not in done.err and "\r" not in done.err, "no terminal, so nothing for one"
    assert "Warning" not in done.err
    for name in ("adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_the_engine_option_and_key_mean_the_same(folder):
    macft("train", "run.yaml", "output_dir=by-option", "--backend", "torch", "max_steps=1")
    macft("train", "run.yaml", "output_dir=by-key", "backend=torch", "max_steps=1")
    runs = [load_config(folder / name / "config.yaml", []) for name in ("by-option", "by-key")]
    assert [run.backend for run in runs] == ["torch", "torch"]


def test_a_dry_run_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(folder.rglob("*"))
    result = macft("train", "run.yaml", "output_dir=dry", "--dry-run", "--backend", "mlx")
    assert result.code == 0, result.err
    assert re.fullmatch(r"dry run: all of it works; a step on the longest rows takes \d+\.\d s\n", result.out)
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_preview_shows_a_row_of_a_file_and_of_a_config():
    by_file = macft("data", "preview", "chat.jsonl", "--model", "model", "--row", "3")
    by_config = macft("data", "preview", "run.yaml", "--row", "3")
    assert by_file.code == by_config.code == 0
    assert by_file.out == by_config.out
    assert by_file.out.startswith(
        "<|im_start|>user⏎\n你好<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦Paris is the capital.<|im_e"
    )
    assert "chat.jsonl:4: " in by_file.out


def test_preview_as_json_is_one_object():
    row = json.loads(macft("data", "preview", "run.yaml", "--row", "1", "--json").out)
    assert row["source"] == "chat.jsonl:2" and len(row["tokens"]) == len(row["loss_mask"]) == row["num_tokens"]
    assert sum(row["loss_mask"]) == row["num_trained"] == 8


def test_preview_takes_overrides():
    shown = json.loads(macft("data", "preview", "run.yaml", "train_on_prompt=true", "--json").out)
    assert shown["num_trained"] == shown["num_tokens"] - 1


def test_preview_of_a_row_that_is_not_there():
    result = macft("data", "preview", "run.yaml", "--row", "5")
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith(f"error: row 5: there are {len(QUESTIONS)} rows, expected 0 to 4\n")


def test_preview_takes_the_template_of_the_adapter_that_goes_on(adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((adapter / name).read_bytes())
    template = (adapter / "chat_template.jinja").read_text().replace("<|im_end|>", "<|eot_id|>")
    (other / "chat_template.jinja").write_text(template)
    shown = macft("data", "preview", "run.yaml", f"adapter_name_or_path={other}", "--json")
    trained = json.loads(shown.out)
    plain = json.loads(macft("data", "preview", "run.yaml", "--json").out)
    assert trained["pieces"][1]["text"] == plain["pieces"][1]["text"].replace("<|im_end|>", "<|eot_id|>")


def ask(*arguments: object) -> str:
    result = macft("chat", "model", "--max-new-tokens", "8", "--temperature", "0", *arguments)
    assert result.code == 0, result.err
    return result.out


def test_chat_prints_only_the_answer(folder, adapter):
    done = macft_process(
        *("chat", "model", "--adapter", "adapter", "--prompt", "hello", "--max-new-tokens", "8", "--temperature", "0"),
        cwd=folder,
    )
    assert done.code == 0, done.err
    assert done.out == ask("--adapter", adapter, "--prompt", "hello")
    assert done.out.endswith("\n") and "hello" not in done.out and "<|im_" not in done.out
    assert done.out != ask("--prompt", "hello"), "the adapter changes the answer"


def test_chat_answers_each_line_of_a_file(adapter):
    both = ask("--adapter", adapter, "--prompt-file", "prompts.txt")
    assert both == ask("--adapter", adapter, "--prompt", "hello") + "\n" + ask("--adapter", adapter, "--prompt", "你好")


def test_chat_options_change_the_answer(adapter):
    plain = ask("--adapter", adapter, "--prompt", "hello")
    assert ask("--adapter", adapter, "--prompt", "hello", "--system", "one two three") != plain
    assert ask("--adapter", adapter, "--prompt", "hello", "--raw") != plain
    assert ask("--adapter", adapter, "--prompt", "hello", "--max-new-tokens", "2") != plain
    hot = [ask("--prompt", "hello", "--temperature", "1.5", "--seed", seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_chat_engines_give_the_same_answer(adapter):
    answers = [ask("--adapter", adapter, "--prompt", "hello", "--backend", backend) for backend in ("mlx", "torch")]
    assert answers[0] == answers[1]


def test_compare_shows_base_and_adapter(adapter):
    shown = macft(
        "compare", "model", "--adapter", "adapter", "--prompts", "prompts.txt", "--max-new-tokens", "8", "--json"
    )
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)
    assert [row["prompt"] for row in rows] == ["hello", "你好"]
    assert [list(row["answers"]) for row in rows] == [["model", "+ adapter"]] * 2
    assert rows[0]["answers"]["+ adapter"] + "\n" == ask("--adapter", adapter, "--prompt", "hello")
    assert rows[0]["answers"]["model"] + "\n" == ask("--prompt", "hello")


def test_doctor_as_json_can_be_read():
    result = macft("doctor", "--json")
    assert result.code == 0, result.err
    findings = json.loads(result.out)
    assert findings and result.err == ""
    assert "mlx-lm" in result.out and "torch" in result.out


def test_a_closed_pipe_ends_without_a_traceback(folder):
    command = f"{sys.executable} -m macft data preview run.yaml --json | true"
    # buffered, as a user has it: the problem then shows when Python flushes at its exit
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_gets_a_question_mark(encoding, folder):
    arguments = ("data", "preview", "run.yaml", "--row", "3")
    done = macft_process(*arguments, cwd=folder, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.code == 0, done.err
    assert "<|im_start|>user?" in done.out
