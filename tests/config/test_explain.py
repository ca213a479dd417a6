"""`macft config explain` says of every key its value and where it came from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from macft.commands.config import config
from macft.config.explain import show, values
from macft.config.load import load
from macft.config.settings import Settings
from macft.errors import UsageError

TEXT = """# a run
model: m
dataset: d.jsonl

output_dir: o
max_length: 99
trust_remote_code: true
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def explain(*arguments: object) -> str:
    result = CliRunner().invoke(config, ["explain", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_every_key_has_its_value_and_its_origin(path):
    found = values(load(path, ["lora_rank=4", "--bf16"]))
    assert list(found) == list(Settings.model_fields)
    assert found["model_name_or_path"] == ("m", "line 2", "model", None)
    assert found["dataset"] == ("d.jsonl", "line 3", None, None)
    assert found["output_dir"] == ("o", "line 5", None, None)
    assert found["cutoff_len"] == (99, "line 6", "max_length", None)
    assert found["lora_rank"] == (4, "command line", None, None)
    assert found["bf16"] == (True, "command line", None, None)
    assert found["seed"] == (42, "default", None, None)


def test_defaults_that_follow_from_other_keys_are_resolved(path):
    found = values(load(path, ["lora_rank=4", "seed=7", "stage=pt"]))
    assert found["lora_alpha"] == (8.0, "default", None, "2 x lora_rank")
    assert found["packing"] == (True, "default", None, "stage")
    assert found["eval_strategy"] == ("no", "default", None, "eval_dataset and val_size")
    assert found["eval_steps"].value == 10 and found["data_seed"].value == 7
    assert values(load(path, ["lora_alpha=5"]))["lora_alpha"] == (5.0, "command line", None, None)


def test_json_holds_what_the_table_shows(path):
    found = json.loads(explain(path, "lora_rank=4", "--json"))
    assert found["config"] == str(path) and found["warnings"] == []
    assert found["values"]["cutoff_len"] == {
        "value": 99,
        "origin": "line 6",
        "written": "max_length",
        "follows_from": None,
    }
    assert list(found["values"]) == list(Settings.model_fields)
    assert found["without_effect"] == {"trust_remote_code": "code from a model repository is never run"}


def test_the_table_names_file_line_and_other_name(path):
    out = io.StringIO()
    show(load(path, ["lora_rank=4"]), path, Console(file=out, width=120))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "cutoff_len 99 run.yaml line 6, as max_length" in lines
    assert (
        "dataset d.jsonl run.yaml line 3" in lines
        and "lora_rank 4 command line" in lines
        and "seed 42 default" in lines
    )
    assert "lora_alpha 8.0 default, from 2 x lora_rank" in lines
    assert lines[-1] == "no effect: trust_remote_code (code from a model repository is never run)"


def test_what_was_written_is_colored_differently_from_defaults(path):
    out = io.StringIO()
    show(load(path, ["lora_rank=4"]), None, Console(file=out, width=120, force_terminal=True, color_system="standard"))
    assert all(text in out.getvalue() for text in ("\x1b[33mlora_rank", "\x1b[32mcutoff_len", "\x1b[2mseed"))


def test_a_translated_file_says_from_what(tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text("model: m\ndata: hub/data\niters: 5\n", encoding="utf-8")
    found = values(load(path, []))
    assert found["max_steps"] == (5, "line 3", "iters", None)
    assert found["lora_alpha"] == (160.0, "mlx-lm's default", "lora_parameters.scale x rank", None)


def test_without_arguments_it_says_how_it_is_called():
    with pytest.raises(UsageError, match="needs a configuration"):
        CliRunner().invoke(config, ["explain"], catch_exceptions=False)
    assert isinstance(config, click.Group)
