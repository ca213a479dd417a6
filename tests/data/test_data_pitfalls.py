"""Where people lost days: each pitfall, by its number in the list, is impossible here or named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_folders import own_and_public_data
from support.data_rows import iter_examples, read_examples, read_pairs, read_texts, tokenize_pairs
from support.rows import write_lines
from support.tiny_tokenizer import write_tiny_model

from macft.data.templates.chat_template import load_template
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError
from macft.training.checks.alarms import overlap_alarm

GSM8K = {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


def entry(folder: Path, **value: Any) -> str:
    (folder / "dataset_info.json").write_text(json.dumps({"d": value}))
    return str(folder)


def refusal(folder: Path, name: str = "d") -> str:
    with pytest.raises(DataError) as error:
        read_examples(name, str(folder), None)
    return str(error.value).replace(f"{folder}/", "")


def test_p5_evaluation_rows_that_are_trained_on_are_said(tmp_path: Path) -> None:
    from support.data_rows import tokenize_examples

    path = write_lines(tmp_path / "d.jsonl", *({"instruction": f"q{i}", "output": "a"} for i in range(4)))
    tokenizer, template = _tiny(tmp_path / "model")
    rows, _ = tokenize_examples(read_examples(str(path), "", None), tokenizer, template, cutoff_len=99)
    assert "2 of 2" in str(overlap_alarm(rows, rows[1:3])) and overlap_alarm(rows[:2], rows[2:]) is None


def _tiny(folder: Path) -> tuple[Any, Any]:
    write_tiny_model(folder)
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_template(folder, tokenizer.special_map)


def test_p11_a_pair_whose_prompt_fills_the_cutoff_is_not_trained_without_answers(tmp_path: Path) -> None:
    long = "the quick brown fox jumps over the lazy dog. " * 40
    row = {"prompt": long, "chosen": long, "rejected": "hello"}
    path = write_lines(tmp_path / "d.jsonl", row, {"prompt": "hello", "chosen": "yes", "rejected": "no"})
    pairs, report = tokenize_pairs(read_pairs(str(path), "", None), *_tiny(tmp_path / "model"), cutoff_len=24)
    assert all(side.loss_mask.any() for one in pairs for side in (one.chosen, one.rejected))
    assert (len(pairs), report.kept, report.answer_cut) == (2, 2, 1)


def test_p17_a_data_set_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([GSM8K] * 3)
    path = tmp_path / "gsm8k-train.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    folder = entry(tmp_path, file_name=path.name, columns={"query": "question", "response": "answer"})
    examples = read_examples("d", folder, None)
    assert [m["content"] for m in examples[2].messages] == list(GSM8K.values())
    assert refusal(tmp_path, "dd") == "dd: not in dataset_info.json, and no file of that name; did you mean d?"
    assert "not in dataset_info.json, and no file of that name; it holds d" in refusal(tmp_path, "gsm")
    chat = write_lines(tmp_path / "chat.jsonl", {"query": "q", "response": "a"})
    assert len(read_examples(str(chat), "nowhere", None)) == len(read_examples("chat", folder, None)) == 1


def test_p18_a_column_that_is_left_out_though_the_rows_have_it_is_named(tmp_path: Path) -> None:
    rows = [
        {"instruction": "q", "input": "", "output": "a"},
        *({"instruction": "q", "input": "more", "output": "a", "system": "s"} for _ in range(2)),
    ]
    write_lines(tmp_path / "d.jsonl", *rows)
    entry(tmp_path, file_name="d.jsonl", columns={"prompt": "instruction", "response": "output"})
    assert refusal(tmp_path).split("\n") == [
        "d.jsonl: 2 problems in alpaca rows",
        '  line 2: "input" would be lost: the columns in dataset_info.json do not map it; add "query": "input", '
        'or "query": null to leave it out',
        '  line 2: "system" would be lost: the columns in dataset_info.json do not map it; add "system": "system", '
        'or "system": null to leave it out',
    ]


def test_p18_a_mapped_column_that_is_missing_names_the_likely_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", GSM8K)
    entry(tmp_path, file_name="d.jsonl", columns={"query": "question", "response": "respones"})
    assert refusal(tmp_path).split("\n")[1:] == [
        '  line 1: no "respones", to which dataset_info.json maps response; found the keys question, answer; '
        'map it: "columns": {"response": "answer"}'
    ]


def test_p19_the_roles_of_a_row_are_told_apart(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"instruction": "Be brief.", "input": "Who?", "output": "Mica."})
    [example] = read_examples(str(path), "", None)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("user", "Be brief.\nWho?"),
        ("assistant", "Mica."),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.json", '[\n {"instruction": "q", "output": "a"},\n]', "line 2: column 37: a comma after the last item"),
        ("d.json", '[\n {"instruction": "q", "output": "a",}\n]', "line 2: not JSON ("),
        ("d.json", '[\n {"instruction": "q"， "output": "a"}\n]', "found the full-width ，, expected ,"),
        ("d.json", '[{"instruction": "q", "output": "a"}，\n{}]', "line 1: column 37: found the full-width ，"),
        (
            "d.jsonl",
            '{"instruction"： "q"}',
            "line 1: not JSON (Expecting ':' delimiter at column 15: found the full-width",
        ),
        ("dataset_info.json", '{"d": {"file_name": "x"},}', "dataset_info.json: line 1: not JSON ("),
    ],
)
def test_p20_commas_that_json_does_not_know_are_placed(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert problem in refusal(tmp_path)


def test_p24_local_data_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_lines(tmp_path / "d.jsonl", {"instruction": "q", "output": "a"})
    assert len(read_examples("d", entry(tmp_path, file_name="d.jsonl"), None)) == 1
    assert "no such data file" in refusal(tmp_path, "d.json")


def test_p41_a_few_rows_do_not_read_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"instruction": "q", "output": "a"}) + "\n")
        file.write(json.dumps({"instruction": "q", "output": "b"}) + "\n")
        file.write("not read\n")
    assert [e.messages[1]["content"] for e in read_examples(str(path), "", 2)] == ["a", "b"]
    first = next(iter_examples(str(path), ""))
    assert first.messages[1]["content"] == "a"


@own_and_public_data
def test_p49_files_that_disagree_on_other_columns_are_read_together(tmp_path: Path, data_folder: Path) -> None:
    names = [str(data_folder / "mini_qwen" / f"{name}.parquet") for name in ("sft_7M", "sft_Gen")]
    schemas = [pq.read_schema(name) for name in names]
    assert schemas[0].field("id").type != schemas[1].field("id").type
    bare = read_examples(",".join(names), "", None)
    assert len(bare) == sum(pq.read_metadata(name).num_rows for name in names) > 100
    for i, name in enumerate(names):
        (tmp_path / f"{i}.parquet").symlink_to(name)
    mapped = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    (tmp_path / "all").mkdir()
    for i in (0, 1):
        (tmp_path / f"{i}.parquet").rename(tmp_path / "all" / f"{i}.parquet")
    together = read_examples("d", entry(tmp_path, file_name="all", **mapped), None)
    assert [e.messages for e in together] == [e.messages for e in bare]


def test_p49_a_column_that_cannot_be_read_does_not_matter_if_nothing_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = pa.table({"instruction": ["q"], "output": ["a"], "comment": ["x" * 4000]})
    pq.write_table(table, path, compression="snappy", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    with pytest.raises(OSError):
        pq.read_table(path)
    assert len(read_examples(str(path), "", None)) == 1


def test_p50_no_row_is_lost_or_added(data_folder: Path) -> None:
    for name, read in (("sft_7M", read_examples), ("dpo_train", read_pairs), ("pt_zh", read_texts)):
        path = data_folder / "mini_qwen" / f"{name}.parquet"
        assert len(read(str(path), "", None)) == pq.read_metadata(path).num_rows > 50


def test_p59_every_turn_of_a_conversation_is_kept_in_order(data_folder: Path) -> None:
    path = data_folder / "mini_qwen" / "sft_7M.parquet"
    rows = pq.read_table(path, columns=["conversations"]).to_pylist()
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [[(roles[t["from"]], t["value"]) for t in row["conversations"]] for row in rows]
    examples = read_examples(str(path), "", None)
    assert [[(m["role"], m["content"]) for m in e.messages] for e in examples] == turns
    assert max(map(len, turns)) > 2
