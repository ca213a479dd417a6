"""`macft data check` names every row that training would refuse, leave out or learn something unwanted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from support.rows import write_lines
from support.tiny_tokenizer import write_tiny_model

from macft.commands.data import data
from macft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, so that places are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    """The exit code: as `macft` takes it from click."""
    return data.main(["check", *map(str, arguments)], standalone_mode=False) or 0


def found(model: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(*arguments, "--model", model, "--json")
    value = json.loads(capsys.readouterr().out)
    assert value["sound"] == (code == 0) == (value["problems"] + value["left_out"] == 0)
    return code, value


def places(value: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(one["source"], one["detail"]) for one in value["findings"] if one["kind"] == kind]


def alpaca(instruction: str, output: str) -> dict[str, Any]:
    return {"instruction": instruction, "output": output}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_sound_data_have_no_findings(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(folder / "d.jsonl", alpaca("hello", "you"), alpaca("the capital of France?", "Paris"))
    assert run("d.jsonl", "--model", model) == 0
    assert capsys.readouterr().out == "2 rows: nothing found\n"
    assert found(model, capsys, "d.jsonl") == (
        0,
        {"rows": 2, "evaluation_rows": 0, "sound": True, "problems": 0, "left_out": 0, "findings": []},
    )


def test_every_invalid_row_is_named_and_those_behind_it_are_looked_at(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps(alpaca("a", "b")),
        '{"instruction": "a", "output": 1}',
        "{oops}",
        json.dumps(alpaca("a", "b")),
        '{"instruction": "a"}',
        json.dumps(alpaca("{{name}}?", "b")),
    ]
    (folder / "d.jsonl").write_text("\n".join(lines))
    code, value = found(model, capsys, "d.jsonl")
    assert code == 1 and (value["rows"], value["problems"]) == (6, 3)
    assert sorted(places(value, "unreadable")) == [
        ("d.jsonl:2", '"output": found a number, expected a string'),
        ("d.jsonl:3", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("d.jsonl:5", 'no "output"; an alpaca row needs instruction and output, found instruction'),
    ]
    assert places(value, "duplicate") == [("d.jsonl:4", "as d.jsonl:1")]
    assert places(value, "placeholder") == [("d.jsonl:6", "{{name}}")]


def test_more_problems_than_an_error_shows_are_all_there(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder / "d.jsonl", alpaca("a", "b"), *({"instruction": "a"} for _ in range(30)))
    _, value = found(model, capsys, "d.jsonl")
    assert [place for place, _ in places(value, "unreadable")] == [f"d.jsonl:{i}" for i in range(2, 32)]
    run("d.jsonl", "--model", model)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "problem: cannot be read (30 rows)" and out[11] == "  ... and 20 more"
    assert out[-1] == "31 rows: 30 invalid"


def test_wrong_turns_of_sharegpt_rows_are_problems(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": "hello"} for role in roles]}

    write_lines(folder / "d.jsonl", turns("human", "gpt"), turns("human", "human", "gpt"), turns("human"))
    code, value = found(model, capsys, "d.jsonl")
    assert code == 1
    assert places(value, "unreadable") == [
        (
            "d.jsonl:2",
            '"conversations"[1] "from": found human, expected gpt or function_call: questions and answers take turns',
        ),
        (
            "d.jsonl:3",
            '"conversations": an odd number of turns (1), the last must be gpt or function_call',
        ),
    ]


def test_unusual_roles_of_messages_are_notes(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user, answer, system = ("user", "hello"), ("assistant", "you"), ("system", "today")
    write_lines(
        folder / "d.jsonl",
        chat(system, user, answer),
        chat(user, system, answer),
        chat(answer, user, answer),
        chat(user, ("user", "more"), answer),
        chat(user, ("assistant", "one"), user),
        chat(user, ("tool", "12:00"), answer),
    )
    code, value = found(model, capsys, "d.jsonl")
    assert code == 0
    assert places(value, "order") == [
        ("d.jsonl:2", "message 2 is a system message, which belongs first"),
        ("d.jsonl:3", "message 1, the first, is an answer"),
        ("d.jsonl:4", "messages 1 and 2 are both from the user"),
        ("d.jsonl:5", "message 3, the last, is from the user and has no answer, so it is not trained on"),
        ("d.jsonl:6", "message 2 is a tool's result that follows no call"),
    ]


def test_rows_that_training_leaves_out_say_why(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "the quick brown fox " * 20
    write_lines(folder / "d.jsonl", chat(("user", "a"), ("assistant", "b")), chat(("user", "a")))
    code, value = found(model, capsys, "d.jsonl")
    assert code == 1 and value["left_out"] == 1
    assert places(value, "left out") == [("d.jsonl:2", "it has no answer")]
    write_lines(folder / "s.jsonl", chat(("system", long), ("user", "a"), ("assistant", "b")), alpaca_chat())
    code, value = found(model, capsys, "s.jsonl", "cutoff_len=20")
    assert code == 1
    reason = "cutoff_len 20 leaves no answer, or the template renders none"
    assert places(value, "left out") == [("s.jsonl:1", reason)]


def alpaca_chat() -> dict[str, Any]:
    return chat(("user", "one"), ("assistant", "two"))


def test_rows_that_the_template_refuses_are_problems_one_by_one(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bad = chat(("system", "be kind"), ("user", "a"), ("assistant", "b"))
    write_lines(folder / "d.jsonl", alpaca_chat(), bad, chat(("user", "x"), ("assistant", "y")), bad)
    code, value = found(model, capsys, "d.jsonl", "template=strict.jinja")
    assert code == 1
    refused = places(value, "refused")
    assert [place for place, _ in refused] == ["d.jsonl:2", "d.jsonl:4"]
    assert all("no system here" in detail for _, detail in refused)


def test_answers_that_lose_their_thoughts_are_problems(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def thinking(*answers: str) -> dict[str, Any]:
        return chat(
            *(turn for text in answers for turn in (("user", "q"), ("assistant", f"<think>\nhm\n</think>\n\n{text}")))
        )

    write_lines(folder / "d.jsonl", thinking("a"), thinking("a", "b"))
    code, value = found(model, capsys, "d.jsonl", "template=qwen3")
    [(place, detail)] = places(value, "refused")
    assert code == 1 and place == "d.jsonl:2" and "leaves out the thought of message 2 (assistant)" in detail
    assert found(model, capsys, "d.jsonl", "template=qwen3", "mask_history=true")[0] == 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("", "writes no end after an answer: </s> is added after the last one of a conversation"),
        ("<|stop|>", "writes only '<|stop|>', no token of this tokenizer, after an answer"),
        ("</s>", None),
    ],
)
def test_a_template_whose_answers_do_not_end_is_said(
    end: str, said: str | None, tmp_path_factory: pytest.TempPathFactory, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    model = write_tiny_model(tmp_path_factory.mktemp("m"), source, eos="</s>")
    write_lines(folder / "d.jsonl", alpaca("hello", "you"))
    assert run("d.jsonl", "--model", model) == 0
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == (said is not None) and (said or "") in "".join(warnings)


def test_repetitions_and_empty_answers_are_notes(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(
        folder / "d.jsonl",
        alpaca("hello", "you"),
        alpaca("hello", "you"),
        alpaca("hello", "today"),
        alpaca("how", " \n"),
        alpaca("a <s> b", "c"),
    )
    code, value = found(model, capsys, "d.jsonl")
    assert code == 0
    assert places(value, "duplicate") == [("d.jsonl:2", "as d.jsonl:1")]
    assert places(value, "same prompt") == [("d.jsonl:3", "as d.jsonl:1")]
    assert places(value, "empty") == [("d.jsonl:4", "the assistant message 2 is empty")]
    assert places(value, "special token") == [("d.jsonl:5", "<s>")]


def test_what_cutoff_len_takes_and_straddling_tokens_are_notes(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "the quick brown fox " * 10
    write_lines(folder / "d.jsonl", alpaca(long, "you"), alpaca("how", long), alpaca("how", "\n\nyou"))
    _, value = found(model, capsys, "d.jsonl", "cutoff_len=24")
    assert places(value, "shortened")[0] == ("d.jsonl:1", "cutoff_len 24")
    assert places(value, "answer cut") == [("d.jsonl:2", "cutoff_len 24")]
    assert places(value, "boundary_tokens") == [("d.jsonl:3", "1 token")]


def test_pairs_without_a_preference_and_against_each_other_are_notes(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    write_lines(
        folder / "d.jsonl",
        pair("hello", "a", "b"),
        pair("hello", "b", "a"),
        pair("how", "same", "same"),
        pair("hello", "a", "b"),
        pair("the", "x", ""),
    )
    code, value = found(model, capsys, "d.jsonl")
    assert code == 1 and value["problems"] == 1
    assert places(value, "unreadable") == [("d.jsonl:5", '"rejected": the answer is empty')]
    assert places(value, "contradiction") == [("d.jsonl:2", "as d.jsonl:1 the other way round")]
    assert places(value, "identical") == [("d.jsonl:3", "")]
    assert places(value, "duplicate") == [("d.jsonl:4", "as d.jsonl:1")]
    long = "the quick brown fox " * 20
    write_lines(folder / "long.jsonl", pair("hello", "a", "b"), pair(long, "a", "b") | {"prompt": [*system(long)]})
    code, value = found(model, capsys, "long.jsonl", "cutoff_len=24")
    assert code == 1
    assert places(value, "left out") == [("long.jsonl:2", "cutoff_len 24 leaves no answer on one side")]


def system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}, {"role": "user", "content": "a"}]


def test_texts_are_checked_too(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(folder / "d.jsonl", *({"text": text} for text in ("hello you", "", "hello you", "a <s>")))
    code, value = found(model, capsys, "d.jsonl")
    assert code == 1
    assert places(value, "left out") == [("d.jsonl:2", "the text is empty")]
    assert places(value, "duplicate") == [("d.jsonl:3", "as d.jsonl:1")]
    assert places(value, "special token") == [("d.jsonl:4", "<s>")]


def test_evaluation_rows_that_are_trained_on_are_named(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder / "d.jsonl", *(alpaca(f"{i}", "a") for i in range(6)))
    write_lines(folder / "e.jsonl", alpaca("3", "a"), alpaca("4", "other"), alpaca("9", "a"), {"instruction": "x"})
    code, value = found(model, capsys, "d.jsonl", "eval_dataset=e.jsonl")
    assert code == 1 and (value["rows"], value["evaluation_rows"]) == (6, 3)
    assert places(value, "evaluation") == [("e.jsonl:1", "as d.jsonl:4")]
    assert places(value, "evaluation prompt") == [("e.jsonl:2", "as d.jsonl:5")]
    assert [place for place, _ in places(value, "unreadable")] == ["e.jsonl:4"]


def test_rows_that_val_size_holds_out_and_trains_on_are_named(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from macft.data.formats.dataset import split_examples

    write_lines(folder / "d.jsonl", *(alpaca(f"{i % 10}", "a") for i in range(20)))
    _, value = found(model, capsys, "d.jsonl", "val_size=4")
    _, held_out = split_examples(range(20), 4, 42)
    leaked = [i for i in held_out if (i + 10) % 20 not in held_out]
    assert leaked and value["evaluation_rows"] == 4
    assert [place for place, _ in places(value, "evaluation")] == [f"d.jsonl:{i + 1}" for i in leaked]


def test_names_of_dataset_info_and_configs_are_taken(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(
        folder / "rows.jsonl", {"q": "hello", "a": "you"}, {"q": "hello", "a": None}, {"q": "how", "a": "today"}
    )
    info = {"mine": {"file_name": "rows.jsonl", "columns": {"query": "q", "response": "a"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    code, value = found(model, capsys, "mine", "dataset_dir=.")
    assert code == 1 and places(value, "unreadable") == [("rows.jsonl:2", '"a": found null, expected a string')]
    config = {"model_name_or_path": str(model), "dataset": "mine", "dataset_dir": ".", "output_dir": "out"}
    (folder / "run.yaml").write_text(json.dumps(config))
    assert found(model, capsys, "run.yaml") == (code, value)
    assert found(model, capsys, "run.yaml", "max_samples=1")[0] == 0


def test_damaged_files_are_problems_and_the_other_files_are_looked_at(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    write_lines(folder / "d.jsonl", alpaca("{{author}}", "a"))
    code, value = found(model, capsys, "empty.jsonl,cut.parquet,d.jsonl")
    assert code == 1 and value["problems"] == 2
    assert [place for place, _ in places(value, "unreadable")] == ["empty.jsonl", "cut.parquet"]
    assert places(value, "placeholder") == [("d.jsonl:1", "{{author}}")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["d.json"], "d.json: no such data file"),
        (["d.jsonl", "stage=dpo"], "a preference stage needs prompt, chosen and rejected"),
        (["mine", "dataset_dir=.", "stage=sft"], 'says "ranking": true: these are pairs; set stage: dpo'),
    ],
)
def test_data_that_are_not_there_or_of_another_kind_are_one_error(
    model: Path, folder: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder / "d.jsonl", alpaca("hello", "you"))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "d.jsonl", "ranking": True}}))
    try:
        code = run(*arguments, "--model", model)
    except (DataError, click.ClickException) as error:
        assert problem in str(error)
    else:
        assert code == 1 and problem in capsys.readouterr().out
