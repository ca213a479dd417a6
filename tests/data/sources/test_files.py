"""Every kind of data file gives the same rows, no more columns than requested, and one clear error if damaged."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_rows import holds_pairs, read_examples, read_texts
from support.paths import TESTS

from macft.data.sources.rows import Row, count_rows, read_rows, scan
from macft.errors import DataError

ROWS = [{"instruction": f"q{i}", "output": f'a{i}，\n"{i}"'} for i in range(700)]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(",".join(map(quoted, line)) + "\r\n" for line in lines).encode("utf-8-sig")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=300)
    return sink.getvalue().to_pybytes()


def as_arrow(new: Callable[..., Any]) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(rows: list[dict[str, Any]]) -> bytes:
        table = pa.Table.from_pylist(rows)
        sink = pa.BufferOutputStream()
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
        return sink.getvalue().to_pybytes()

    return write


KINDS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "jsonl": ("x.jsonl", as_jsonl),
    "json": ("x.json", as_json),
    "lines in json": ("x.json", as_jsonl),
    "csv": ("x.csv", as_csv),
    "parquet": ("x.parquet", as_parquet),
    "arrow file": ("x.arrow", as_arrow(pa.ipc.new_file)),
    "arrow stream": ("x.arrow", as_arrow(pa.ipc.new_stream)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def put(folder: Path, kind: str, rows: list[dict[str, Any]], *, packed: bool = False) -> Path:
    name, write = KINDS[kind]
    path = folder / (f"{name}.gz" if packed else name)
    content = write(rows)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def problem(path: Path, read: Any = read_rows) -> str:
    with pytest.raises(DataError) as error:
        read(path)
    return str(error.value)


@every_kind
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "gzip"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, packed: bool, tmp_path: Path) -> None:
    path = put(tmp_path, kind, ROWS, packed=packed)
    assert [row.value for row in read_rows(path)] == ROWS and count_rows(path) == len(ROWS)
    examples = read_examples(str(path), "", None)
    assert [e.messages[1]["content"] for e in examples] == [row["output"] for row in ROWS]
    assert not holds_pairs(str(path), "")


def test_places_are_lines_in_csv_and_rows_in_tables(tmp_path: Path) -> None:
    assert [row.number for row in read_rows(put(tmp_path, "csv", ROWS[:3]))] == [2, 4, 6]
    assert [row.number for row in read_rows(put(tmp_path, "parquet", ROWS[:3]))] == [1, 2, 3]
    message = problem(
        put(tmp_path, "parquet", [{"instruction": "q", "output": None}]),
        lambda p: read_examples(p.name, str(tmp_path), None),
    )
    assert message.endswith('in alpaca rows\n  row 1: "output": found null, expected a string')


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow file", "arrow stream"])
def test_only_the_requested_columns_are_read(kind: str, tmp_path: Path) -> None:
    rows = [{"a": "1", "b": "2", "c": "3"}]
    assert next(scan(put(tmp_path, kind, rows), ["c", "a", "z"])) == Row(
        2 if kind == "csv" else 1, {"a": "1", "c": "3"}
    )


def test_texts_are_the_lines_of_a_txt_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffone\r\n\n  \ntwo \u2028 lines\nthree".encode())
    assert read_rows(tmp_path / "x.txt") == [
        *(Row(n, {"text": text}) for n, text in ((1, "one"), (4, "two \u2028 lines"), (5, "three"))),
    ]
    assert [t.text for t in read_texts("x", str(tmp_path), None)] == ["one", "two \u2028 lines", "three"]


def test_keys_that_a_table_adds_to_every_object_are_dropped(tmp_path: Path) -> None:
    calls = [[{"function": {"name": "f", "arguments": {"x": 1}}}], [{"function": {"name": "g", "arguments": {"y": 2}}}]]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": call}]}
        for call in calls
    ]
    for kind in ("parquet", "arrow stream"):
        examples = read_examples(str(put(tmp_path, kind, rows)), "", None)
        arguments = [e.messages[1]["tool_calls"][0]["function"]["arguments"] for e in examples]
        assert arguments == [{"x": 1}, {"y": 2}]


def test_a_pattern_takes_its_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (1, 0):
        (tmp_path / f"part-{i}.jsonl").write_bytes(as_jsonl(ROWS[2 * i : 2 * i + 2]))
    monkeypatch.chdir(tmp_path)
    for name, folder in (("part-*.jsonl", ""), ("part-?.jsonl", str(tmp_path)), (str(tmp_path / "part-*.jsonl"), "")):
        assert [e.messages[0]["content"] for e in read_examples(name, folder, 3)] == ["q0", "q1", "q2"]
    with pytest.raises(DataError, match=r"other-\*\.jsonl: no file matches"):
        read_examples("other-*.jsonl", "", None)


# --- damage


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
def test_a_table_cut_short_is_never_read_in_part(kind: str, share: float, tmp_path: Path) -> None:
    path = put(tmp_path, kind, ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    message = problem(path)
    assert message.startswith(f"{path}: ") and "cut short" in message and "\n" not in message


def test_an_arrow_stream_cut_between_its_batches_is_never_read_in_part(tmp_path: Path) -> None:
    # pyarrow alone takes the end of the file for the end of the stream
    path = put(tmp_path, "arrow stream", ROWS)
    path.write_bytes(path.read_bytes()[:-8])
    with pa.ipc.open_stream(path) as reader:
        assert len(reader.read_all()) == len(ROWS)
    assert problem(path).endswith("the Arrow stream has no end mark; copy or write the file again")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_damaged_gzip_data_are_named(kind: str, tmp_path: Path) -> None:
    path = put(tmp_path, kind, ROWS, packed=True)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert problem(path).startswith(f"{path}: cut short: the gzip data end before their end mark")
    path.write_bytes(content[:30] + bytes([content[30] ^ 255]) + content[31:])
    assert problem(path).startswith(f"{path}: not gzip data (")
    path.write_bytes(as_jsonl(ROWS))
    assert problem(path).startswith(f"{path}: not gzip data (Not a gzipped file")


@every_kind
def test_an_empty_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / KINDS[kind][0]
    path.write_bytes(b"")
    assert "no rows" in problem(path) or "empty" in problem(path)
    assert "no rows" in problem(put(tmp_path, kind, [])) if kind in ("json", "jsonl") else True


def test_tables_without_rows_and_missing_tables_are_named(tmp_path: Path) -> None:
    table = pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "x.parquet")
    assert problem(tmp_path / "x.parquet").endswith("the file holds no rows, expected at least one")
    for name in ("y.parquet", "x.parqet.parquet", "y.csv"):
        assert "no such file" in problem(tmp_path / name)


def test_problems_of_csv_files_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'instruction,output\nq,a\n"two\nlines",a,b\nonly\nq,\xff\n')
    assert problem(path).split("\n")[1:] == [
        "  line 3: found 3 fields, expected 2 as in the header",
        "  line 5: found 1 fields, expected 2 as in the header",
        "  line 6: not UTF-8 (byte 0xff at byte 3 of the line); save the file as UTF-8",
    ]
    path.write_text('instruction,output\nq,"a"b\n')
    assert "line 2: not CSV (" in problem(path)


# --- bounded memory

_COUNT = """
import resource, sys
from support.data_rows import iter_examples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in iter_examples(sys.argv[1], "", None)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_memory_does_not_grow_with_the_rows(kind: str, tmp_path: Path) -> None:
    row = {"instruction": "question " * 100, "output": "answer " * 100}
    path = put(tmp_path, kind, [row] * 40_000)
    assert path.stat().st_size > 60e6
    done = subprocess.run([sys.executable, "-c", _COUNT, path], cwd=TESTS, capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    # in KiB; what it takes is one row, and the modules that are imported on the way
    assert count == 40_000 and grown < 16_000
