"""Data files: what is read, and one clear error for everything that cannot be."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_rows import read_examples, to_examples

from macft.data.formats.conversations import Example
from macft.data.formats.dataset import split_examples
from macft.data.sources.rows import Row, read_rows
from macft.errors import ConfigError, DataError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problem(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_rows(path)
    return str(error.value)


def row_problems(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    """The listed problems of a JSONL file of these rows."""
    path = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as error:
        list(to_examples(path))
    headline, *problems = str(error.value).split("\n")
    assert str(path) in headline and str(len(problems)) in headline
    return [line.strip() for line in problems]


# --- sources


def test_jsonl_rows_know_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '\ufeff{"a": "你"}\r\n\r\n  \n{"b": "x\u2028y"}\n')
    assert read_rows(path) == [Row(1, {"a": "你"}), Row(4, {"b": "x\u2028y"})]


def test_json_rows_know_the_line_they_start_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '\ufeff[\n  {"a": 1},\n  {\n   "b": [2]\n  }, {"c": 3}\n]\n')
    assert read_rows(path) == [Row(2, {"a": 1}), Row(3, {"b": [2]}), Row(5, {"c": 3})]


def test_json_rows_equal_those_of_the_json_module(tmp_path: Path) -> None:
    rows = [{"i": i, "text": '],[ "\\ \n' * i, "nested": [{"x": None}]} for i in range(20)]
    for indent in (None, 2):
        path = written(tmp_path / "a.json", json.dumps(rows, indent=indent))
        assert [row.value for row in read_rows(path)] == rows


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n[1]\n"text"\n{"b": 2}\n{"a": 1,}\n')
    headline, *problems = problem(path).split("\n")
    assert headline == f"{path}: 4 problems"
    assert problems[0] == "  line 2: not JSON (Expecting value at column 7)"
    assert problems[1] == "  line 3: found a list, expected an object"
    assert problems[2] == "  line 4: found a string, expected an object"
    assert problems[3].startswith("  line 6: not JSON (")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1},\n {"b": 2},\n]', "line 2: column 10: a comma after the last item"),
        ('[{"a": 1}\n {"b": 2}]', "line 2: column 2: found '{', expected ',' or ']'"),
        ('[{"a": 1},\n {"b" 2}]', "line 2: not JSON (Expecting ':' delimiter at column 7)"),
        ('[{"a": 1}, 5,\n null]', "line 1: found a number, expected an object"),
        ('[{"a": 1}, 5,\n null]', "line 2: found null, expected an object"),
        ('[{"a": 1}', "line 1: column 10: the file ends here, expected ',' or ']'"),
        ('[{"a": 1}]\n]', "line 2: column 1: found ']' after the list"),
        ('{\n"a": 1}', "expected a list of objects; one object a line belongs in a .jsonl file"),
        ("[]", "the file holds no rows"),
        (" \n", "the file holds no rows"),
        ("", "the file holds no rows"),
    ],
)
def test_a_bad_json_file_is_placed(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in problem(written(tmp_path / "a.json", content))


def test_a_list_in_a_jsonl_file_is_explained(tmp_path: Path) -> None:
    assert "a list belongs in a .json file" in problem(written(tmp_path / "a.jsonl", '[\n{"a": 1}\n]'))


def test_absurd_json_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 100_000
    assert "line 1: not JSON" in problem(written(tmp_path / "a.jsonl", deep))
    assert "line 1: not JSON" in problem(written(tmp_path / "a.json", "[" + deep))
    assert "line 1: not JSON" in problem(written(tmp_path / "a.jsonl", '{"a": ' + "9" * 10_000 + "}"))


def test_other_encodings_are_placed_by_byte(tmp_path: Path) -> None:
    gbk = problem(written(tmp_path / "a.jsonl", b'{"a": "' + "你".encode("gbk") + b'"}'))
    assert gbk.split("\n") == [
        f"{tmp_path / 'a.jsonl'}: 1 problem",
        "  line 1: not UTF-8 (byte 0xc4 at byte 8 of the line); it looks like GBK: save the file as UTF-8",
    ]
    rows = b'\xef\xbb\xbf[{"a": 1},\n {"a": "' + "é".encode("latin-1") + b'"}]'
    assert problem(written(tmp_path / "b.json", rows)) == (
        f"{tmp_path / 'b.json'}: line 2: not UTF-8 (byte 0xe9 at byte 9 of the line); save the file as UTF-8"
    )
    for name in ("c.jsonl", "c.json", "c.csv", "c.txt"):
        utf16 = problem(written(tmp_path / name, '{"a": 1}'.encode("utf-16")))
        assert utf16 == f"{tmp_path / name}: UTF-16, not UTF-8; save the file as UTF-8"


def test_a_file_without_an_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("{}")
    with pytest.raises(DataError, match=r"rows: has no ending that says what it is, expected .jsonl, .json, "):
        read_rows(tmp_path / "rows")


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "{}")
    assert problem(tmp_path / "trian.jsonl").endswith(f"did you mean {tmp_path / 'train.jsonl'}?")
    assert problem(tmp_path / "folder" / "x.json").endswith("no such file")
    assert problem(tmp_path / "a.xlsx").endswith(
        "ends in '.xlsx', expected .jsonl, .json, .parquet, .arrow, .csv or .txt, or one with .gz"
    )


# --- formats


def test_messages_rows_become_their_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [GOOD, {"messages": [{"role": "user", "content": ""}]}]
    written(path, "\n\n" + "\n\n".join(map(json.dumps, rows)))
    examples = list(to_examples(path))
    assert examples[0] == Example(tuple(GOOD["messages"]), f"{path}:3")
    assert examples[1].messages == ({"role": "user", "content": ""},)


def test_alpaca_rows_become_turns(tmp_path: Path) -> None:
    row = {
        "instruction": "translate",
        "input": "cat",
        "output": "猫",
        "system": "s",
        "history": [["q1", "a1"], ["q2", ""]],
    }
    bare = {"instruction": "hi", "input": "", "output": "", "system": None, "history": None}
    only_input = {"instruction": "", "input": "x", "output": "y"}
    path = written(tmp_path / "a.json", json.dumps([row, bare, only_input]))
    got = [[(m["role"], m["content"]) for m in e.messages] for e in to_examples(path)]
    assert got == [
        [
            *[("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "")],
            *[("user", "translate\ncat"), ("assistant", "猫")],
        ],
        [("user", "hi"), ("assistant", "")],
        [("user", "x"), ("assistant", "y")],
    ]


def test_problems_of_messages_rows_are_all_named(tmp_path: Path) -> None:
    problems = row_problems(
        tmp_path,
        GOOD,
        {"text": "x"},
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi", {"role": "human", "content": "q"}, {"role": "user"}]},
        {"messages": [{"role": "assistant", "content": None}, {"role": 3, "content": ["x"]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}], "tools": [{}]},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
    )
    assert problems == [
        'line 2: no "messages"; found the keys text',
        'line 3: "messages": the list is empty, expected at least one user and one assistant message',
        'line 4: "messages": found a string, expected a list',
        'line 5: "messages"[0]: found a string, expected an object with role and content',
        'line 5: "messages"[1] "role": found \'human\', expected one of system, user, assistant, tool, function',
        'line 5: "messages"[2]: no "content"; found the keys role',
        'line 6: "messages"[0] "content": found null, expected a string',
        'line 6: "messages"[1] "role": found a number, expected one of system, user, assistant, tool, function',
        'line 6: "messages"[1] "content": found a list, expected a string',
        'line 7: "tools"[0]: found the keys none, expected an object with a name',
        'line 7: "messages"[0] "tool_calls"[0]: found a number, expected an object with name and arguments',
        'line 8: "messages"[0] "content": half a character (\\ud83d) at position 0',
    ]


def test_problems_of_alpaca_rows_are_all_named(tmp_path: Path) -> None:
    problems = row_problems(
        tmp_path,
        {"instruction": "a"},
        {"instruction": 1, "output": True, "input": {}},
        {"instruction": "a", "output": "b", "history": "x"},
        {"instruction": "a", "output": "b", "history": [["q"], ["q", None], 4]},
    )
    assert problems == [
        'line 1: no "output"; an alpaca row needs instruction and output, found instruction',
        'line 2: "instruction": found a number, expected a string',
        'line 2: "output": found a boolean, expected a string',
        'line 2: "input": found an object, expected a string',
        'line 3: "history": found a string, expected a list of [question, answer] pairs',
        'line 4: "history"[0]: found a list of 1, expected a list of question and answer',
        'line 4: "history"[1][1]: found null, expected a string',
        'line 4: "history"[2]: found a number, expected a list of question and answer',
    ]


def test_an_unknown_format_names_what_is_accepted(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '\n{"dialog": [], "id": 1}')
    with pytest.raises(DataError) as error:
        list(to_examples(path))
    assert str(error.value) == (
        f"{path}: line 2: found the keys dialog, id; expected messages, conversations (ShareGPT), "
        "instruction/input/output (alpaca), prompt and completion, query and response, or keys that "
        "dataset_info.json maps"
    )


def test_format_and_oddities_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alpaca = {"instruction": "I am {{name}}", "output": "by {{author}}", "id": 1}
    path = written(tmp_path / "a.jsonl", (json.dumps(alpaca) + "\n") * 3)
    with caplog.at_level(logging.INFO, logger="macft"):
        list(to_examples(path))
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{path}: 3 alpaca rows"
    assert said[1].startswith(
        f"{path}: 3 of 3 rows hold the placeholders {{{{name}}}} or {{{{author}}}} (first: line 1)"
    )
    assert said[2:] == [f"{path}: unused keys: id"]


def test_unused_keys_inside_messages_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [{"role": "assistant", "content": "a", "mood": 0}], "tools": None}
    path = written(tmp_path / "a.jsonl", json.dumps(row))
    list(to_examples(path))
    assert caplog.messages == [f"{path}: unused keys: messages[].mood"]


# --- dataset


def test_names_and_paths_are_found_and_capped_each(tmp_path: Path) -> None:
    line = json.dumps(GOOD) + "\n"
    one = written(tmp_path / "one.jsonl", line * 5)
    (tmp_path / "d").mkdir()
    two = written(tmp_path / "d" / "two.json", json.dumps([GOOD] * 3))
    sources = [example.source for example in read_examples(f"{one}, two,", str(tmp_path / "d"), 2)]
    assert sources == [f"{one}:1", f"{one}:2", f"{two}:1", f"{two}:1"]
    assert len(read_examples(f"two.json,{one}", str(tmp_path / "d"), None)) == 8


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    written(tmp_path / "bad.jsonl", "x\n")
    written(tmp_path / "good.jsonl", json.dumps(GOOD))
    with pytest.raises(DataError) as error:
        read_examples("bad,god,good", str(tmp_path), None)
    message = str(error.value)
    assert "bad.jsonl: 1 problem\n  line 1: not JSON" in message
    assert f"god: no such data file; looked for god, {tmp_path / 'god'}" in message
    assert f"did you mean {tmp_path / 'good.jsonl'}?" in message
    with pytest.raises(ConfigError, match="dataset: found ' , '"):
        read_examples(" , ", str(tmp_path), None)


def test_a_folder_of_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^name: no such data file; .*; dataset_dir .*/nowhere does not exist there$"):
        read_examples("name", str(tmp_path / "nowhere"), None)


def test_the_split_is_seeded_whole_and_ordered() -> None:
    examples = [Example((), f"x:{i}") for i in range(30)]
    train, valid = split_examples(examples, 0.1, seed=42)
    assert len(valid) == 3 and sorted([*train, *valid], key=examples.index) == examples
    assert train == sorted(train, key=examples.index) and valid == sorted(valid, key=examples.index)
    assert split_examples(examples, 0.1, seed=42) == (train, valid)
    assert split_examples(examples, 0.1, seed=43)[1] != valid
    assert len(split_examples([examples[0]] * 100, 0.07, seed=1)[1]) == 7
    assert len(split_examples(examples, 7, seed=1)[1]) == 7
    assert len(split_examples(examples, 1, seed=1)[1]) == 1
    assert split_examples(examples, 0, seed=1) == (examples, [])


@pytest.mark.parametrize("val_size", [30, 31, 0.99, -0.1, 1.5, float("nan"), float("inf")])
def test_a_split_that_cannot_be_is_refused(val_size: float) -> None:
    with pytest.raises(ConfigError, match="val_size"):
        split_examples([Example((), f"x:{i}") for i in range(30)], val_size, seed=1)


def test_alpaca_files_are_read_one_after_the_other(data_folder: Path) -> None:
    examples = read_examples("alpaca_zh_demo,identity.json", str(data_folder), None)
    files = (data_folder / "alpaca_zh_demo.json", data_folder / "identity.json")
    first, second = (len(json.loads(path.read_text(encoding="utf-8"))) for path in files)
    assert len(examples) == first + second
    assert examples[first].source == f"{files[1]}:2"
    assert [m["role"] for m in examples[first].messages] == ["user", "assistant"]


# --- keys that an object holds twice

DOUBLE = '{"instruction": "q", "output": "a1", "output": "a2"}'
NESTED = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}'
SOUND = '{"instruction": "q", "output": "a"}'


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_a_key_that_a_row_holds_twice_is_an_error_with_its_line(tmp_path: Path, name: str) -> None:
    content = "\n".join((DOUBLE, SOUND, NESTED, SOUND)).encode()
    path = written(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert problem(path).split("\n")[1:] == [
        '  line 1: the key "output" stands twice in one object; keep one',
        '  line 3: the key "content" stands twice in one object; keep one',
    ]


def test_a_key_that_a_row_of_a_list_holds_twice_is_an_error_and_the_rows_after_it_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", f"[\n{DOUBLE},\n{SOUND},\n{NESTED}, 5]\n")
    assert problem(path).split("\n")[1:] == [
        '  line 2: the key "output" stands twice in one object; keep one',
        '  line 4: the key "content" stands twice in one object; keep one',
        "  line 4: found a number, expected an object",
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"tools": '[{"name": "f", "name": "g"}]'},
        {"message": {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"name": 1, "name": 2}'}]}},
    ],
)
def test_a_key_that_json_inside_a_text_holds_twice_is_an_error(tmp_path: Path, row: dict[str, Any]) -> None:
    answer = row.pop("message", GOOD["messages"][1])
    [found] = row_problems(tmp_path, {"messages": [GOOD["messages"][0], answer], **row})
    assert 'the key "name" stands twice in one object; keep one' in found


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    table = pa.Table.from_arrays(
        [pa.array(["q"]), pa.array(["a1"]), pa.array(["a2"])], ["instruction", *2 * ["output"]]
    )
    if suffix == "csv":
        path.write_text("instruction,output,output\nq,a1,a2\n")
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write(table)
    assert problem(path) == f'{path}: two columns are named "output"; rename or remove one'
    with pytest.raises(DataError, match="two columns are named"):
        list(to_examples(path))
