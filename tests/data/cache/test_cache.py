"""Tokenized data on disk: the same as in memory, named by what it depends on, whole or built again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_templates import build
from support.commands import CHECKOUT
from support.data_rows import encode, read_examples, read_pairs, read_texts, take
from support.tiny_tokenizer import TEMPLATES, write_tiny_model
from support.toy_backend import toy_settings, write_pairs, write_rows

from macft.data.cache import cache
from macft.data.cache.cache import SMALL, cache_key, contents
from macft.data.cache.store import read_part, write_part
from macft.data.cache.workers import CHUNK_ROWS
from macft.data.formats.dataset import Mixture, Request
from macft.data.kinds import DPO, PT, SFT, kind_named
from macft.data.notes import log_notes
from macft.data.sources.resolve import resolve_sources
from macft.data.templates.chat_template import ChatTemplate, load_template
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.table import Table
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError
from macft.training.data import encoding_of, read_data

CHATML = build(TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def eos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), eos="</s>")


@pytest.fixture(scope="module")
def tokenizer(eos_model: Path) -> Tokenizer:
    return load_tokenizer(eos_model)


@pytest.fixture
def place(cache: Path) -> Path:
    """Where tables are kept, in a cache of the test's own."""
    return cache.parent / "data"


@dataclass(frozen=True)
class Asked:
    """Which rows are asked for, and how they are tokenized."""

    dataset: str
    kind: str = "sft"
    dataset_dir: str = "."
    cutoff_len: int = 40
    max_samples: int | None = None
    mixture: Mixture = field(default_factory=Mixture)
    train_on_prompt: bool = False
    mask_history: bool = False

    @property
    def request(self) -> Request:
        found = resolve_sources(self.dataset, self.dataset_dir)
        return Request(kind_named(self.kind), found, self.max_samples, self.mixture)

    def encoding(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> Encoding:
        return Encoding(tokenizer, template, self.cutoff_len, self.train_on_prompt, self.mask_history)


def request_of(path: Path, **keys: Any) -> Asked:
    return Asked(str(path), **keys)


def tokenized(asked: Asked, tokenizer: Tokenizer, template: ChatTemplate, **keys: Any) -> Table:
    """The table, with what there is to say about it logged."""
    table, notes = cache.tokenized(asked.request, asked.encoding(tokenizer, template), **keys)
    log_notes(notes)
    return table


def tables(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*") if path.is_dir())


def assert_same(left: Table, right: Table) -> None:
    for name in ("tokens", "loss_mask", "offsets", "columns"):
        assert np.array_equal(getattr(left, name), getattr(right, name)), name
    assert left.width == right.width and left.files == right.files


# ---- what is kept


def test_what_is_read_back_is_what_was_tokenized(tmp_path, place, tokenizer):
    rows, pairs = write_rows(tmp_path / "rows.jsonl", 30), write_pairs(tmp_path / "pairs.jsonl", 20)
    texts = tmp_path / "texts.txt"
    texts.write_text("one two\nthree\n\nthe quick brown fox\n", encoding="utf-8")
    direct = {
        "sft": encode(SFT, read_examples(str(rows), ".", None), tokenizer, CHATML, cutoff_len=40),
        "pairs": encode(DPO, read_pairs(str(pairs), ".", None), tokenizer, CHATML, cutoff_len=40),
        "pt": encode(PT, read_texts(str(texts), ".", None), tokenizer, cutoff_len=40),
    }
    for kind, path in (("sft", rows), ("pairs", pairs), ("pt", texts)):
        request = request_of(path, kind=kind)
        built, found = (tokenized(request, tokenizer, CHATML) for _ in range(2))
        assert_same(built, direct[kind])
        assert_same(found, direct[kind])
        assert built.digest == found.digest and not found.tokens.flags.writeable
    assert len(tables(place)) == 3
    for folder in tables(place):
        report = json.loads((folder / "manifest.json").read_text())["report"]
        assert report["tokens"] == len(np.load(folder / "tokens.npy", allow_pickle=False))


def test_a_later_run_says_so_and_warns_again(tmp_path, place, tokenizer, caplog):
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hello {{name}} " + "one " * 50}, {"role": "assistant", "content": "two"}]
    rows.write_text(json.dumps({"messages": messages, "mood": "good"}) + "\n")
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="macft"):
            table = tokenized(request_of(rows), tokenizer, CHATML)
        logged = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        said.append([*logged, *take(SFT, table, tokenizer, CHATML, cutoff_len=40)[1].warnings])
    assert said[0] == said[1] and len(said[0]) == 3
    assert "placeholders" in said[0][0] and "mood" in said[0][1] and "lost user text" in said[0][2]
    assert f"data: 1 row tokenized before ({tables(place)[0]}," in caplog.text and "messages row" not in caplog.text


def test_the_warnings_name_the_file_where_it_is_now(tmp_path, place, tokenizer, caplog):
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    rows.write_text(rows.read_text().replace('{"messages"', '{"mood": 1, "messages"', 1))
    tokenized(request_of(rows), tokenizer, CHATML)
    moved = rows.rename(tmp_path / "moved.jsonl")
    caplog.clear()
    table = tokenized(request_of(moved), tokenizer, CHATML)
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"{moved}: unused keys: mood"
    assert table.source(2) == f"{moved}:3" and len(tables(place)) == 1


# ---- the key


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "pairs"},
        {"cutoff_len": 41},
        {"max_samples": 5},
        {"train_on_prompt": True},
        {"mask_history": True},
    ],
    ids=str,
)
def test_what_the_tokens_depend_on_names_them(tmp_path, tokenizer, keys):
    path = write_rows(tmp_path / "rows.jsonl")
    assert key(request_of(path, **keys), tokenizer) != key(request_of(path), tokenizer)


def key(asked: Asked, tokenizer: Tokenizer, template: ChatTemplate | None = CHATML) -> str:
    assert not asked.request.found.problems
    return cache_key(asked.request, asked.encoding(tokenizer, template))


def test_the_bytes_of_the_data_name_the_tokens_and_its_path_does_not(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl")
    before = key(request_of(path), tokenizer)
    (tmp_path / "elsewhere").mkdir()
    copied = Path(shutil.copy(path, tmp_path / "elsewhere" / "other.jsonl"))
    assert key(request_of(copied), tokenizer) == before
    path.write_text(path.read_text().replace("the", "thy", 1))
    assert key(request_of(path), tokenizer) != before
    # the same bytes may be read in another way
    as_text = Path(shutil.copy(copied, tmp_path / "rows.txt"))
    assert key(request_of(as_text), tokenizer) != before


def test_the_order_of_the_data_names_the_tokens(tmp_path, tokenizer):
    one, two = write_rows(tmp_path / "one.jsonl"), write_rows(tmp_path / "two.jsonl", seed=1)
    both = replace(request_of(one), dataset=f"{one},{two}")
    turned = replace(request_of(one), dataset=f"{two},{one}")
    mixed = replace(both, mixture=Mixture(mix_strategy="interleave_over"))
    drawn = replace(both, mixture=Mixture(mix_strategy="interleave_over", interleave_probs=(0.5, 0.5)))
    other = replace(both, mixture=replace(drawn.mixture, interleave_probs=(0.25, 0.75)))
    again = replace(both, mixture=replace(drawn.mixture, seed=1))
    assert len({key(request, tokenizer) for request in (both, turned, mixed, drawn, other, again)}) == 6
    # without probabilities nothing is drawn
    assert key(replace(mixed, mixture=replace(mixed.mixture, seed=1)), tokenizer) == key(mixed, tokenizer)
    assert key(replace(both, mixture=Mixture(seed=1)), tokenizer) == key(both, tokenizer)


def test_the_entry_in_dataset_info_names_the_tokens(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n' * 4)

    def of(entry: dict[str, Any], seed: int = 42) -> str:
        (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.jsonl"} | entry}))
        request = request_of(Path("mine"), dataset_dir=str(tmp_path), mixture=Mixture(seed=seed))
        return key(request, tokenizer)

    columns = {"prompt": "instruction", "response": "output"}
    entries = [{}, {"columns": columns}, {"columns": columns | {"query": "input"}}, {"num_samples": 2}]
    assert len({of(entry) for entry in entries}) == len(entries)
    assert of({}, seed=1) == of({}) and of({"num_samples": 2}, seed=1) != of({"num_samples": 2})


def test_the_template_and_the_tokenizer_name_the_tokens(tmp_path, eos_model, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl")
    before = key(request_of(path), tokenizer)
    assert key(request_of(path), tokenizer, build(CHATML.source + " ")) != before
    named = ChatTemplate(CHATML.source, name="another name", special_map=tokenizer.special_map)
    assert key(request_of(path), tokenizer, named) == before
    spoken = [
        load_template(eos_model, tokenizer.special_map, default_system=system, enable_thinking=thinking)
        for system, thinking in ((None, True), ("be brief", True))
    ]
    assert len({key(request_of(path), tokenizer, template) for template in spoken}) == 2
    other = Path(shutil.copytree(eos_model, tmp_path / "model"))
    assert key(request_of(path), load_tokenizer(other)) == before
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    assert key(request_of(path), load_tokenizer(other)) != before


def test_texts_are_kept_whatever_the_template_and_the_cutoff(tmp_path, tokenizer):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    request = request_of(path, kind="pt")
    same = key(request, tokenizer, None)
    assert key(replace(request, cutoff_len=9, train_on_prompt=True), tokenizer) == same == key(request, tokenizer)


def test_a_template_that_shows_the_date_is_kept_for_a_day(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl")
    dated = build("{{ strftime_now('%d %b %Y') }}" + CHATML.source)
    keys = []
    # two places whose dates always differ
    for zone in ("AAA-13", "BBB+12"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        keys.append((key(request_of(path), tokenizer, dated), key(request_of(path), tokenizer)))
    monkeypatch.undo()
    time.tzset()
    assert keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1]


# ---- files that are remembered


@pytest.mark.usefixtures("place")
def test_a_file_is_read_again_only_when_it_has_changed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 4)
    old = time.time() - 60
    os.utime(path, (old, old))
    first = contents(path)
    assert first.rows == 4
    # the same size and date: what is remembered is believed
    path.write_bytes(path.read_bytes().replace(b"user", b"USER"))
    os.utime(path, (old, old))
    assert contents(path) == first
    os.utime(path, (old + 1, old + 1))
    assert contents(path).digest != first.digest


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, place):
    path = write_rows(tmp_path / "rows.jsonl", 4)
    first = contents(path)
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"user", b"USER"))
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert contents(path).digest != first.digest
    (place / "files.json").parent.mkdir(parents=True, exist_ok=True)
    (place / "files.json").write_text("[not JSON")
    assert contents(path).rows == 4


# ---- damage


@pytest.mark.parametrize("name", ["tokens.npy", "loss_mask.npy", "offsets.npy", "columns.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "empty"])
def test_a_damaged_table_is_built_again(tmp_path, place, tokenizer, name, damage):
    request = request_of(write_rows(tmp_path / "rows.jsonl", 30))
    whole = tokenized(request, tokenizer, CHATML)
    expected = {column: getattr(whole, column).copy() for column in ("tokens", "loss_mask", "offsets", "columns")}
    [folder] = tables(place)
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage != "gone":
        middle = len(content) // 2 if name == "manifest.json" else (1024 + len(content)) // 2
        content[middle] ^= 1 if name != "manifest.json" else 0xFF
        (folder / name).write_bytes({"cut": content[:middle], "changed": content, "empty": b""}[damage])
    again = tokenized(request, tokenizer, CHATML)
    for column, values in expected.items():
        assert np.array_equal(getattr(again, column), values)
    (folder / name).read_bytes()


# what the columns were called before
_OLD_NAMES = {"skip_reason": "obstacle", "boundary_tokens": "straddling"}


def with_old_names(columns: np.ndarray) -> np.ndarray:
    return columns.view([(_OLD_NAMES.get(name, name), columns.dtype[name]) for name in columns.dtype.names])


def test_a_table_whose_columns_have_other_names_is_built_again(tmp_path, place, tokenizer):
    request = request_of(write_rows(tmp_path / "rows.jsonl", 30))
    whole = tokenized(request, tokenizer, CHATML)
    expected, [folder] = whole.columns.copy(), tables(place)
    path, manifest = folder / "columns.npy", json.loads((folder / "manifest.json").read_text())
    content = bytearray(path.read_bytes())
    old = np.lib.format.dtype_to_descr(with_old_names(expected).dtype)
    header = repr({"descr": old, "fortran_order": False, "shape": (30,)}).encode()
    content[10:1023] = header.ljust(1013)
    path.write_bytes(content)
    assert np.load(path, allow_pickle=False).dtype.names[2] == "obstacle"
    # as it was written then: sound, with notes that hold their file's number as text
    (folder / "manifest.json").write_text(json.dumps(manifest | {"notes": ["\0000\000: unused keys: id"]}))
    assert np.array_equal(tokenized(request, tokenizer, CHATML).columns, expected)
    assert np.load(path, allow_pickle=False).dtype.names[2] == "skip_reason"


def test_a_part_whose_columns_have_other_names_is_built_again(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", 30)
    table = encode(SFT, read_examples(str(path), ".", None), tokenizer, CHATML, cutoff_len=40)
    write_part(tmp_path / "new.npz", table)
    write_part(tmp_path / "old.npz", replace(table, columns=with_old_names(table.columns)))
    assert read_part(tmp_path / "new.npz") is not None and read_part(tmp_path / "old.npz") is None


def test_overwrite_builds_again(tmp_path, place, tokenizer):
    request = request_of(write_rows(tmp_path / "rows.jsonl", 30))
    tokenized(request, tokenizer, CHATML)
    [folder] = tables(place)
    before = (folder / "manifest.json").stat().st_mtime_ns
    tokenized(request, tokenizer, CHATML)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    tokenized(request, tokenizer, CHATML, overwrite=True)
    assert (folder / "manifest.json").stat().st_mtime_ns > before


def test_a_cache_without_room_is_said_and_the_rows_come(tmp_path, monkeypatch, tokenizer, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "file"))
    path = write_rows(tmp_path / "rows.jsonl", 30)
    table = tokenized(request_of(path), tokenizer, CHATML)
    assert_same(table, encode(SFT, read_examples(str(path), ".", None), tokenizer, CHATML, cutoff_len=40))
    assert table.digest and "data: not cached for later runs" in caplog.text


def test_invalid_data_leave_nothing(tmp_path, place, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", (SMALL + 1) * CHUNK_ROWS + 1)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=f"line {(SMALL + 1) * CHUNK_ROWS + 2}"):
        tokenized(request_of(path), tokenizer, CHATML, workers=1)
    assert tables(place) == []


def test_what_is_cached_serves_every_split_of_it(tmp_path, place, eos_model):
    data = write_rows(tmp_path / "rows.jsonl", 30)
    settings = toy_settings(eos_model, data, tmp_path, "mlx")
    encoding = encoding_of(settings, load_tokenizer(eos_model), CHATML)
    whole = [row.tokens.tolist() for row in read_data(settings, encoding).train]
    for seed in (1, 2):
        split = read_data(toy_settings(eos_model, data, tmp_path, "mlx", val_size=7, seed=seed), encoding)
        parts = [row.tokens.tolist() for row in (*split.train, *split.valid)]
        assert (len(split.train), len(split.valid)) == (23, 7) and sorted(parts) == sorted(whole)
        assert split.report.kept == 23 and split.report.tokens == split.train.lengths.sum()  # type: ignore[union-attr]
    assert len(tables(place)) == 1


# ---- many rows


def test_processes_make_what_one_process_makes(tmp_path, place, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", SMALL * CHUNK_ROWS + 300)
    done = []

    class Count:
        def __init__(self, total: int | None) -> None:
            self.total = total

        def __enter__(self) -> Any:
            return done.append

        def __exit__(self, *_: object) -> None:
            assert self.total == SMALL * CHUNK_ROWS + 300

    built = tokenized(request_of(path), tokenizer, CHATML, workers=2, progress=Count)
    assert_same(built, encode(SFT, read_examples(str(path), ".", None), tokenizer, CHATML, cutoff_len=40))
    assert sum(done) == len(built) and len(tables(place)) == 1


def test_refused_rows_of_all_chunks_are_told_together(tmp_path, place, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", SMALL * CHUNK_ROWS + 300)
    lines = path.read_text().splitlines()
    for at in (3, CHUNK_ROWS + 3):
        lines[at] = lines[at].replace('"messages": [', '"messages": [{"role": "system", "content": "s"}, ')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:4 and 1 more: the chat template .* System role not supported"):
        tokenized(request_of(path), tokenizer, build(TEMPLATES["gemma"]), workers=1)
    assert tables(place) == []


BUILD = """
import sys
from pathlib import Path
from macft.data.cache.cache import tokenized
from macft.data.formats.dataset import Request
from macft.data.kinds import SFT
from macft.data.sources.resolve import resolve_sources
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.tokenizer import load_tokenizer

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer.special_map, "chatml")
    tokenized(Request(SFT, resolve_sources(sys.argv[1], ".")), Encoding(tokenizer, template, 40), workers=1)
"""


def test_a_killed_run_is_gone_on_with(tmp_path, place, eos_model, tokenizer, caplog):
    count = 12 * CHUNK_ROWS
    path = write_rows(tmp_path / "rows.jsonl", 500)
    path.write_text(path.read_text() * (count // 500))
    (tmp_path / "build.py").write_text(BUILD)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "build.py", path, eos_model],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(list(place.glob("*.parts/00000[23].npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    # ends when its worker has ended too: both write to the pipe
    process.communicate(timeout=30)
    parts = sorted(place.glob("*.parts/[0-9]*.npz"))
    assert 4 <= len(parts) < 12
    dates = {part: part.stat().st_mtime_ns for part in parts}
    template = load_template(eos_model, tokenizer.special_map, "chatml")
    with caplog.at_level(logging.INFO, logger="macft"):
        table = tokenized(request_of(path), tokenizer, template, workers=1)
    kept = next(record for record in caplog.records if "parts kept from a run" in record.message)
    assert kept.args is not None and kept.args[1] == 12 and len(dates) <= kept.args[0] < 12  # type: ignore[index]
    assert len(table) == count and [folder.name for folder in tables(place)] == [parts[0].parent.name[:-6]]
    assert_same(table, tokenized(request_of(path), tokenizer, template, overwrite=True, workers=1))


def test_a_process_that_tokenizes_loads_no_engine():
    code = (
        "import sys, macft.data.cache.workers; "
        "print(*sorted({'torch', 'mlx', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"
