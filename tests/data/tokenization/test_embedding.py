"""A token for which the model's embedding has no row is an error before the model is loaded, wherever it comes from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.parrot import make_model
from support.rows import write_lines
from support.toy_backend import ENGINES, toy_settings
from tokenizers import AddedToken, Tokenizer

from macft.api.models import load_model
from macft.commands.data import data as data_command
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError
from macft.inference.chat import answer_prompts, chat_loop
from macft.inference.load import ChatOptions, compare_answers
from macft.inference.prompts import user_turn
from macft.training.dry_run import dry_run
from macft.training.prepare import prepare
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads")

FIRST, SECOND = "<|extra_a|>", "<|extra_b|>"
SOUND = {"instruction": "hello", "output": "you"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The toy model, whose tokenizer has got two tokens that its embedding has not."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(model, folder)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in (FIRST, SECOND)])
    (folder / "tokenizer.json").write_text(core.to_str(), encoding="utf-8")
    return folder


def problem(small: Path, text: str = FIRST) -> str:
    rows = json.loads((small / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    id_ = rows + (text == SECOND)
    assert load_tokenizer(small).encode(text).ids == [id_]
    return (
        f"the token {text!r} has the id {id_}, but the model's embedding has {rows} rows, for ids up to {rows - 1}; "
        "take it out of the text, or name a model that its tokenizer fits"
    )


def rated(row: dict[str, str], label: bool) -> dict[str, Any]:
    return {"prompt": row["instruction"], "completion": row["output"], "label": label}


def pair(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["instruction"], "chosen": row["output"], "rejected": "one"}


BAD = [{"instruction": f"use {FIRST} now", "output": f"ok {SECOND} done"}, {"instruction": "hi", "output": FIRST}]
STAGES = {
    "sft": [SOUND, *BAD],
    "dpo": [pair(SOUND), *map(pair, BAD)],
    "kto": [rated(SOUND, True), *(rated(row, False) for row in BAD)],
    "pt": [{"text": "hello"}, *({"text": row["instruction"] + row["output"]} for row in BAD)],
}


STREAM = {"streaming": True, "max_steps": 1}


@pytest.mark.parametrize(
    ("stage", "keys"), [*((stage, {}) for stage in STAGES), ("sft", STREAM), ("pt", STREAM), ("sft", {"packing": True})]
)
def test_every_stage_names_the_token_its_id_the_rows_and_the_first_place(
    small: Path, tmp_path: Path, stage: str, keys: dict[str, Any]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *STAGES[stage])
    with pytest.raises(DataError) as error:
        prepare(toy_settings(small, path, tmp_path / "out", "torch", stage=stage, **keys))
    assert str(error.value) == f"{path}:2 and 1 more: {problem(small)}"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_and_a_dry_run_stop_before_they_write(small: Path, tmp_path: Path, engine: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *STAGES["sft"])
    settings = toy_settings(small, path, tmp_path / "out", engine)
    for run in (train, dry_run):
        with pytest.raises(DataError, match=r"extra_a.* has the id"):
            run(settings)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_evaluation_set_is_refused_too(small: Path, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", SOUND)
    bad = write_lines(tmp_path / "bad.jsonl", SOUND, {"instruction": "hi", "output": SECOND})
    with pytest.raises(DataError) as error:
        prepare(toy_settings(small, good, tmp_path / "out", "torch", eval_dataset=str(bad)))
    assert str(error.value) == f"{bad}:2: {problem(small, SECOND)}"


def test_data_check_names_every_such_row(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "d.jsonl", *STAGES["sft"])
    code = data_command.main(["check", "d.jsonl", "--model", str(small), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)["findings"]
    assert code == 1
    refused = [(one["source"], one["detail"]) for one in found if one["kind"] == "refused"]
    assert refused == [("d.jsonl:2", problem(small)), ("d.jsonl:3", problem(small))]


def test_rows_without_such_tokens_train_with_that_tokenizer(small: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", SOUND, SOUND)
    assert len(prepare(toy_settings(small, path, tmp_path / "out", "torch")).train) == 2


def test_tables_that_another_model_could_read_are_not_taken(small: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(small, large)
    config = json.loads((large / "config.json").read_text(encoding="utf-8"))
    (large / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 2}))
    path = write_lines(tmp_path / "rows.jsonl", *STAGES["sft"])
    assert len(prepare(toy_settings(large, path, tmp_path / "out", "torch")).train) == 3
    with pytest.raises(DataError, match="has the id"):
        prepare(toy_settings(small, path, tmp_path / "out", "torch"))


def test_chat_refuses_the_prompt_and_goes_on(small: Path) -> None:
    rows = json.loads((small / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    chat = make_model(small, embedding_rows=rows)
    out, notes = io.StringIO(), io.StringIO()
    chat_loop(chat, system=None, source=io.StringIO(f"say {SECOND}\nhello\n"), out=out, notes=notes)
    assert notes.getvalue() == f"{problem(small, SECOND)}\n" and out.getvalue() == "HELLO\n"
    with pytest.raises(DataError) as error:
        answer_prompts(chat, [user_turn(f"say {FIRST}")], out, notes)
    assert str(error.value) == problem(small)


def test_compare_and_python_refuse_it(small: Path) -> None:
    chat = load_model(small, backend="torch")
    for scored in (f"one {FIRST}", [*user_turn(FIRST), {"role": "assistant", "content": "one"}]):
        with pytest.raises(DataError) as error:
            chat.logps(scored)
        assert str(error.value) == problem(small)
    with pytest.raises(DataError) as error:
        compare_answers(str(small), [], [user_turn(FIRST)], ChatOptions("torch"), max_new_tokens=1)
    assert str(error.value) == problem(small)
