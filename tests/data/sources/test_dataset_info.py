"""dataset_info.json means here what it means in LLaMA-Factory, and what cannot be used is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.data_folders import own_and_public_data
from support.data_rows import holds_pairs, iter_examples, read_examples, read_pairs, read_texts

from macft.data.formats.conversations import Example
from macft.data.formats.dataset import Mixture, mix
from macft.errors import ConfigError, DataError

ALPACA = {"instruction": "q", "input": "", "output": "a"}
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PREFERENCE = {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "b"}}


def put(folder: Path, entries: dict[str, Any], **files: list[dict[str, Any]]) -> str:
    """A data folder with these entries, and a JSONL file for each list of rows."""
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def turns(examples: list[Example]) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in example.messages] for example in examples]


def only_turns(examples: list[Example]) -> list[tuple[str, str]]:
    [found] = turns(examples)
    return found


def refused(folder: Path, entry: dict[str, Any], *rows: dict[str, Any], read: Any = read_examples) -> str:
    """The error of a data set d with this entry, without the path it begins with."""
    put(folder, {"d": {"file_name": "rows.jsonl"} | entry}, rows=list(rows) or [ALPACA])
    with pytest.raises(DataError) as error:
        read("d", str(folder), None)
    return str(error.value).replace(f"{folder}/", "")


def test_a_data_set_that_is_named_twice_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, {}, rows=[ALPACA])
    info = tmp_path / "dataset_info.json"
    info.write_text('{"d": {"file_name": "rows.jsonl"}, "d": {"file_name": "other.jsonl"}}')
    with pytest.raises(DataError) as error:
        read_examples("d", str(tmp_path), None)
    assert str(error.value) == f'{info}: the key "d" stands twice in one object; keep one'


# --- columns and tags


def test_without_columns_the_alpaca_keys_are_read(tmp_path: Path) -> None:
    folder = put(tmp_path, {"d": {"file_name": "rows.jsonl"}}, rows=[{**ALPACA, "input": "more"}])
    assert only_turns(read_examples("d", folder, None)) == [("user", "q\nmore"), ("assistant", "a")]


def test_columns_map_every_part_of_an_alpaca_row(tmp_path: Path) -> None:
    columns = {"prompt": "p", "query": "x", "response": "r", "history": "h", "system": "s", "tools": "t"}
    row = {"p": "do", "x": "it", "r": "done", "h": [["q1", "a1"]], "s": "be", "t": '[{"name": "f"}]'}
    folder = put(tmp_path, {"d": {"file_name": "rows.jsonl", "columns": columns}}, rows=[row])
    [example] = read_examples("d", folder, None)
    assert turns([example])[0] == [
        *[("system", "be"), ("user", "q1"), ("assistant", "a1"), ("user", "do\nit"), ("assistant", "done")],
    ]
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


def test_a_null_column_is_left_out_on_purpose(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "query": None, "response": "output"}
    folder = put(tmp_path, {"d": {"file_name": "rows.jsonl", "columns": columns}}, rows=[{**ALPACA, "input": "x"}])
    assert only_turns(read_examples("d", folder, None)) == [("user", "q"), ("assistant", "a")]


def test_tags_name_roles_and_keys(tmp_path: Path) -> None:
    tags = {
        **{"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A"},
        **{"system_tag": "S", "observation_tag": "O", "function_tag": "F"},
    }
    said = [("S", "s"), ("U", "q"), ("F", '{"name": "f", "arguments": {"x": 1}}'), ("O", "7"), ("A", "a")]
    row = {"talk": [{"who": who, "says": text} for who, text in said]}
    entry = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    folder = put(tmp_path, {"d": entry}, rows=[row])
    [example] = read_examples("d", folder, None)
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_a_role_without_its_tag_names_the_tag(tmp_path: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    row = {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]}
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    assert refused(tmp_path, entry, row).split("\n")[1:] == [
        '  line 1: "messages"[0] "role": found \'system\', expected one of user, assistant; '
        'if it is meant, add "system_tag": "system" to the tags in dataset_info.json'
    ]


def test_openai_rows_need_no_tags(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = [
        *[{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        *[{"role": "tool", "content": "7", "tool_call_id": "c1"}, {"role": "tool", "content": "8"}],
        {"role": "assistant", "content": "a"},
    ]
    entry = {"file_name": "rows.jsonl", "formatting": "openai", "columns": {"messages": "messages"}}
    folder = put(tmp_path, {"d": entry}, rows=[{"messages": said}])
    [example] = read_examples("d", folder, None)
    assert [m["role"] for m in example.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert example.messages[1]["content"] == ""
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"columns": {"promt": "instruction"}}, "columns: 'promt' is unknown; did you mean prompt?"),
        ({"columns": {"prompt": 3}}, "columns: prompt: found a number, expected a string"),
        ({"columns": {"response": "output"}}, "columns: map neither prompt nor query, so there is no question"),
        ({"columns": {"prompt": "x", "images": "i"}}, "columns: images is mapped; only text is trained on"),
        ({"formatting": "shareGPT"}, "formatting: found 'shareGPT', expected one of alpaca, sharegpt, openai"),
        ({"formatting": "sharegpt", "columns": {"system": "s"}}, "columns: formatting sharegpt needs messages"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "role"}}, "tags: no content_tag; a tag that is not named"),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "c"}}, "columns: ranking data needs rejected"),
        ({"columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}, 'mapped, but not "ranking": true; add it'),
        ({"ranking": "yes"}, "ranking: found a string, expected a boolean"),
        ({"num_samples": 0}, "num_samples: found 0, expected a whole number of at least 1"),
        ({"file_name": None}, "found neither file_name nor hf_hub_url nor ms_hub_url"),
        ({"file_name": None, "script_url": "x"}, "script_url: a loading script is foreign code, which is not run"),
        ({"file_name": None, "cloud_file_name": "s3://x"}, "cloud_file_name: files in cloud storage are not read"),
        ({"om_hub_url": "a/b"}, "om_hub_url: the OpenMind hub is not supported"),
        ({"file_name": "../rows.jsonl"}, "file_name: ../rows.jsonl leads out of the data folder"),
        ({"file_name": "a/../../rows.jsonl"}, "leads out of the data folder"),
    ],
)
def test_an_entry_that_cannot_be_read_says_why(entry: dict[str, Any], problem: str, tmp_path: Path) -> None:
    headline, *problems = refused(tmp_path, entry).split("\n")
    assert headline == "dataset_info.json: d: 1 problem"
    assert len(problems) == 1 and problem in problems[0]


def test_all_problems_of_an_entry_come_together(tmp_path: Path) -> None:
    entry = {"formatting": "x", "columns": {"promt": "p", "images": "i"}, "file_name": "../x"}
    assert len(refused(tmp_path, entry).split("\n")) == 5


def test_unknown_keys_of_an_entry_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"file_name": "rows.jsonl", "fomatting": "alpaca", "file_sha1": "ab"}
    read_examples("d", put(tmp_path, {"d": entry}, rows=[ALPACA]), None)
    assert caplog.messages == [f"{tmp_path}/dataset_info.json: d: fomatting is not used; did you mean formatting?"]


# --- where the data are


def test_files_are_found_relative_absolute_and_in_folders(tmp_path: Path) -> None:
    (tmp_path / "data" / "many").mkdir(parents=True)
    elsewhere = tmp_path / "far.jsonl"
    elsewhere.write_text(json.dumps(ALPACA))
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "data" / "many" / name).write_text(json.dumps({**ALPACA, "output": name}))
    (tmp_path / "data" / "many" / "state.json").write_text("{}")
    entries = {"far": {"file_name": str(elsewhere)}, "many": {"file_name": "many"}}
    examples = read_examples("many,far", put(tmp_path / "data", entries), None)
    assert [e.messages[-1]["content"] for e in examples] == ["a.jsonl", "b.jsonl", "a"]
    (tmp_path / "data" / "many" / "c.csv").write_text("x\n")
    with pytest.raises(DataError, match=r"holds \.csv, \.jsonl, expected data files of one kind"):
        read_examples("many", str(tmp_path / "data"), None)


def test_a_missing_file_of_an_entry_offers_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, {"file_name": "row.jsonl"})
    assert message == "dataset_info.json: d: file_name: no file row.jsonl; did you mean rows.jsonl?"


def test_split_takes_a_slice_of_a_local_file(tmp_path: Path) -> None:
    rows = [{**ALPACA, "output": str(i)} for i in range(10)]
    splits = {"a": "train[2:4]", "b": "train[-2:]", "c": "train[:30%]", "d": "train[8:]"}
    entries = {name: {"file_name": "rows.jsonl", "split": split} for name, split in splits.items()}
    folder = put(tmp_path, entries, rows=rows)
    found = {name: [e.messages[-1]["content"] for e in read_examples(name, folder, None)] for name in splits}
    assert found == {"a": ["2", "3"], "b": ["8", "9"], "c": ["0", "1", "2"], "d": ["8", "9"]}
    assert "split: a local file has only the split train, found test" in refused(tmp_path, {"split": "test"})


def test_num_samples_permutes_and_oversamples_by_seed(tmp_path: Path) -> None:
    rows = [{**ALPACA, "output": str(i)} for i in range(10)]
    entries = {str(n): {"file_name": "rows.jsonl", "num_samples": n} for n in (4, 25)}
    folder = put(tmp_path, entries, rows=rows)

    def drawn(name: str, seed: int = 1, cap: int | None = None) -> list[str]:
        return [e.messages[-1]["content"] for e in read_examples(name, folder, cap, Mixture(seed=seed))]

    assert len(set(drawn("4"))) == 4 and drawn("4") == drawn("4") and drawn("4") != drawn("4", seed=2)
    many = drawn("25")
    assert len(many) == 25 and sorted(many[:10]) == sorted(str(i) for i in range(10)) != many[:10]
    assert drawn("25", cap=3) == many[:3]


# --- several data sets


def test_the_mixing_orders_by_hand() -> None:
    parts = ["abc", "123", "xyzw"]
    assert "".join(mix(parts)) == "abc123xyzw"
    assert "".join(mix(["ab", "1234", "xyz"], "interleave_under")) == "a1xb2y"
    assert "".join(mix(["ab", "1234", "xyz"], "interleave_over")) == "a1xb2ya3zb4x"
    assert "".join(mix(["ab", "1234", "xyz"], "interleave_once")) == "a1xb2y3z4"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("interleave_under", "first_exhausted"),
        ("interleave_over", "all_exhausted"),
        ("interleave_once", "all_exhausted_without_replacement"),
    ],
)
@pytest.mark.parametrize("probs", [None, (0.7, 0.2, 0.1)])
def test_interleaving_is_the_order_of_the_datasets_library(
    ours: str, theirs: Any, probs: tuple[float, ...] | None
) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    for lengths in ((3, 4, 5), (40, 3, 11), (5, 5, 5)):
        parts = [[f"{i}-{j}" for j in range(length)] for i, length in enumerate(lengths)]
        tables = [datasets.Dataset.from_dict({"x": part}) for part in parts]
        expected = datasets.interleave_datasets(
            tables, probabilities=list(probs) if probs else None, seed=5, stopping_strategy=theirs
        )
        assert list(mix(parts, ours, probs, 5)) == expected["x"][:]


def test_data_sets_are_interleaved_and_read_again(tmp_path: Path) -> None:
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("one", "two")}
    rows = {name: [{**ALPACA, "output": f"{name}{i}"} for i in range(n)] for name, n in (("one", 1), ("two", 3))}
    folder = put(tmp_path, entries, **rows)
    examples = iter_examples("one,two", folder, None, Mixture(mix_strategy="interleave_over"))
    assert [e.messages[-1]["content"] for e in examples] == ["one0", "two0", "one0", "two1", "one0", "two2"]


@pytest.mark.parametrize(
    ("strategy", "probs", "problem"),
    [
        ("interleave", None, "mix_strategy: found 'interleave', expected one of concat, "),
        ("concat", (0.5, 0.5), "interleave_probs: has no effect with mix_strategy concat"),
        ("interleave_over", (1.0,), "interleave_probs: found 1 numbers, expected one for each of 2 data sets"),
        (
            "interleave_over",
            (0.5, 0.6),
            "interleave_probs: found 0.5, 0.6, expected numbers of at least 0 that add up to 1",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(strategy: str, probs: tuple[float, ...] | None, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        list(mix(["ab", "cd"], strategy, probs))
    assert str(error.value).startswith(problem)


# --- stages


def test_a_stage_and_a_ranking_that_do_not_fit(tmp_path: Path) -> None:
    said = refused(tmp_path, {"ranking": True, "formatting": "sharegpt"}, PREFERENCE)
    assert said == 'd: dataset_info.json says "ranking": true: these are pairs; set stage: dpo'
    assert 'does not say "ranking": true' in refused(tmp_path, {"formatting": "sharegpt"}, PREFERENCE, read=read_pairs)
    assert "holds conversations, stage: pt needs texts" in refused(
        tmp_path, {"formatting": "sharegpt"}, read=read_texts
    )
    said = refused(tmp_path, {"columns": {"prompt": "question"}}, {"question": "q", "answer": "a"})
    assert said == (
        'd: the columns in dataset_info.json map no response; add "response": "answer", '
        "or set stage: pt to continue pre-training on the prompts"
    )


def test_ranking_entries_of_both_formattings_are_pairs(tmp_path: Path) -> None:
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entries = {
        "s": {"file_name": "s.jsonl", "ranking": True, "formatting": "sharegpt", "columns": columns},
        "a": {"file_name": "a.jsonl", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
    }
    folder = put(tmp_path, entries, s=[PREFERENCE], a=[{"q": "q", "c": "a", "r": "b"}])
    one, two = read_pairs("s,a", folder, None)
    assert (one.prompt, one.chosen, one.rejected) == (two.prompt, two.chosen, two.rejected)
    assert one.rejected == ({"role": "assistant", "content": "b"},)
    assert holds_pairs("s", folder) and not holds_pairs("nothing", folder)


def test_pt_reads_the_prompt_column(tmp_path: Path) -> None:
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "content"}}
    folder = put(tmp_path, {"d": entry}, rows=[{"content": "long ago", "output": "not read"}])
    assert [text.text for text in read_texts("d", folder, None)] == ["long ago"]


# --- the file itself


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"d": {"file_name": "x"},\n}', "line 2: not JSON ("),
        ("[]", "found a list, expected an object with a data set under each name"),
        ('{"d": []}', "d: found a list, expected an object"),
        ('{"builder_name": "json", "features": {}}', "describes one data set of the datasets library"),
    ],
)
def test_a_broken_dataset_info_is_placed(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(DataError) as error:
        read_examples("d", str(tmp_path), None)
    assert str(error.value).startswith(f"{tmp_path}/dataset_info.json: {problem}")


def test_a_broken_dataset_info_does_not_stop_a_path(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ALPACA))
    assert len(read_examples(str(tmp_path / "rows.jsonl"), str(tmp_path), None)) == 1


@own_and_public_data
def test_entries_as_llama_factory_ships_them(tmp_path: Path, data_folder: Path) -> None:
    entries = {
        "dpo_zh_demo": {
            **{"file_name": "dpo_zh_demo.json", "ranking": True, "formatting": "sharegpt"},
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "alpaca_zh_demo": {"file_name": "alpaca_zh_demo.json"},
        "identity": {"file_name": "identity.json"},
        "glaive_toolcall_zh_demo": {
            **{"file_name": "glaive_toolcall_zh_demo.json", "formatting": "sharegpt"},
            "columns": {"messages": "conversations", "tools": "tools"},
        },
    }
    for name in entries:
        (tmp_path / f"{name}.json").symlink_to(data_folder / f"{name}.json")
    rows = {name: json.loads((data_folder / f"{name}.json").read_text(encoding="utf-8")) for name in entries}
    folder = put(tmp_path, entries)
    both = len(rows["identity"]) + len(rows["alpaca_zh_demo"])
    assert len(read_examples("identity,alpaca_zh_demo", folder, None)) == both > 100
    assert len(read_examples("identity,alpaca_zh_demo", folder, 50)) == 100
    assert len(read_pairs("dpo_zh_demo", folder, None)) == len(rows["dpo_zh_demo"]) and holds_pairs(
        "dpo_zh_demo", folder
    )
    talks = read_examples("glaive_toolcall_zh_demo", folder, None)
    calls = [m for talk in talks for m in talk.messages if "tool_calls" in m]
    given = rows["glaive_toolcall_zh_demo"]
    called = [turn for row in given for turn in row["conversations"] if turn["from"] == "function_call"]
    listed = [row for row in given if row["tools"] != "[]"]
    found = (len(talks), len(calls), sum(talk.tools is not None for talk in talks))
    assert found == (len(given), len(called), len(listed)) and len(given) > len(listed) > 50
