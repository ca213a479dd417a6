"""Data sets on the hubs: which files are a split, downloads, the cache, and what is said when there is none."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import CHECKOUT, TESTS

from macft.data.sources.dataset_info import HubName
from macft.data.sources.hub import choose_files, read_configs
from macft.errors import DataError


def choose(*names: str, split: str = "train", subset: str | None = None, folder: str | None = None) -> list[str]:
    return choose_files(HubName("hf", "org/data", subset, folder), names, {}, split)


# --- which files


def test_names_say_the_split() -> None:
    sharded = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("test_sft", "train_sft") for i in (0, 1)]
    assert choose(*sharded, split="train_sft") == sharded[2:]
    assert choose("train.jsonl", "valid.jsonl", "test.jsonl", split="validation") == ["valid.jsonl"]
    assert choose("data/train/a.json", "data/dev/a.json") == ["data/train/a.json"]
    assert choose("train_data.json", "test_data.json") == ["train_data.json"]
    assert choose("alpaca_gpt4.json", "README.md", ".gitattributes", "dataset_infos.json") == ["alpaca_gpt4.json"]
    assert choose("all.json", "test.json") == ["all.json"]


def test_one_kind_of_file_is_taken() -> None:
    assert choose("a.parquet", "b.parquet", "notes.txt") == ["a.parquet", "b.parquet"]


def test_subsets_and_folders_narrow_the_choice() -> None:
    names = ["en/train.json", "zh/train.json", "python/a.parquet"]
    assert choose(*names, subset="zh") == ["zh/train.json"]
    assert choose(*names, folder="python") == ["python/a.parquet"]
    for problem, arguments in (
        ("no subset fr; it holds en/train.json, zh/train.json", {"subset": "fr"}),
        ("no split test; it holds", {"split": "test"}),
        ("no data files in rust", {"folder": "rust"}),
    ):
        with pytest.raises(DataError, match=problem):
            choose(*names, **arguments)
    with pytest.raises(DataError, match="it may hold only a script"):
        choose("README.md", "load.py")


def test_the_card_says_what_is_a_subset(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/tr*.json\n"
        "  - split: test\n    path: [en/te*.json]\n- config_name: zh\n  default: true\n"
        "  data_files: 'zh/**/*.json'\n---\n# A\n"
    )
    configs = read_configs(card)
    names = ["en/train.json", "en/test.json", "zh/a/x.json", "zh/y.json"]
    assert choose_files(HubName("hf", "d", "en"), names, configs, "test") == ["en/test.json"]
    assert choose_files(HubName("hf", "d"), names, configs, "train") == ["zh/a/x.json", "zh/y.json"]
    with pytest.raises(DataError, match="no subset fr; set subset to one of en, default, zh"):
        choose_files(HubName("hf", "d", "fr"), names, configs, "train")
    with pytest.raises(DataError, match="no split dev in en; set split to one of train, test"):
        choose_files(HubName("hf", "d", "en"), names, configs, "dev")
    card.write_text("---\n: :\n---\n")
    assert read_configs(card) == {}


# --- downloads


def parquet(text: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"instruction": [text], "output": ["a"]}), sink)
    return sink.getvalue()


class Hubs(BaseHTTPRequestHandler):
    """A Hugging Face hub and a ModelScope with one data set each, by the routes that are called."""

    files: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if path == "/api/v1/datasets/org/data/repo/tree":
            listed = [{"Path": n, "Type": "blob", "Size": len(c)} for n, c in self.files.items()]
            listed += [{"Path": "data", "Type": "tree"}, {"Path": "../evil.json", "Type": "blob", "Size": 1}]
            return self.answer(200, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())
        if path == "/api/v1/datasets/org/data/repo" and query.get("FilePath") in self.files:
            return self.answer(200, self.files[query["FilePath"]])
        if path.startswith("/api/datasets/org/data") and "convert" not in path:
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(200, json.dumps({"id": "org/data", "sha": "0" * 40, "siblings": siblings}).encode())
        if path.startswith("/api/datasets/org/script"):
            # a loading script, whose parquet files the hub made itself
            names = ["default/train/0000.parquet", "default/test/0000.parquet"] if "convert" in path else ["load.py"]
            siblings = [{"rfilename": name} for name in names]
            return self.answer(200, json.dumps({"id": "org/script", "sha": "0" * 40, "siblings": siblings}).encode())
        if path.startswith("/datasets/org/script/resolve/refs/convert/parquet/default/train/0000.parquet"):
            return self.answer(200, parquet("converted"), {"X-Repo-Commit": "0" * 40, "ETag": '"converted"'})
        if path.startswith("/api/datasets/org/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith("/datasets/org/data/") and name in self.files:
            return self.answer(200, self.files[name], {"X-Repo-Commit": "0" * 40, "ETag": f'"{name}"'})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "ETag": '"1"', **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the test reads `seen`."""


@pytest.fixture
def address() -> Iterator[str]:
    Hubs.files = {
        "README.md": b"# no configs",
        "data/train-00000-of-00001.parquet": parquet("of train"),
        "data/test-00000-of-00001.parquet": parquet("of test"),
    }
    Hubs.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hubs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


_READ = """
import sys
from macft.errors import MacftError
from support.data_rows import read_examples
try:
    for example in read_examples(sys.argv[1], sys.argv[2], hub=sys.argv[3]):
        print(example.messages[0]["content"])
except MacftError as error:
    sys.exit(str(error))
"""


def read(folder: Path, name: str, url: str, hub: str = "hf", *, place: str = "", **settings: str) -> tuple[str, str]:
    """In a process of its own: huggingface_hub reads its settings once. (first texts, error)."""
    environment = {
        **os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{TESTS}",
        "HF_HOME": str(folder / "hf"), "MACFT_CACHE": str(folder / "cache"),
        "HF_ENDPOINT": url, "MODELSCOPE_DOMAIN": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
        **settings,
    }  # fmt: skip
    command = [sys.executable, "-c", _READ, name, place or str(folder), hub]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_a_split_is_downloaded_once_then_read_without_network(hub: str, tmp_path: Path, address: str) -> None:
    entries = {
        "both": {"hf_hub_url": "org/data", "ms_hub_url": "org/data"},
        "test": {f"{'hf' if hub == 'hf' else 'ms'}_hub_url": "org/data", "split": "test[:1]"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    assert read(tmp_path, "both", address, hub) == ("of train", "")
    files = [path for path in Hubs.seen if "train" in path and ("/resolve/" in path or "FilePath" in path)]
    routes = {"hf": "/datasets/org/data/resolve/", "modelscope": "/api/v1/datasets/org/data/repo?Source=SDK"}
    assert files and all(path.startswith(routes[hub]) for path in files)
    assert not any("test-" in path for path in Hubs.seen), "only the split that is expected comes"
    assert read(tmp_path, "test", address) == ("of test", ""), "where one hub is named, that hub is meant"
    Hubs.seen.clear()
    assert read(tmp_path, "both", "http://127.0.0.1:1", hub, HF_HUB_OFFLINE="1") == ("of train", "")
    assert Hubs.seen == [] and not list(tmp_path.rglob("evil.json"))
    if hub == "hf":
        assert read(tmp_path, "both", "http://127.0.0.1:1")[0] == "of train", "a hub out of reach is no reason to stop"


def test_a_hub_name_needs_no_entry(tmp_path: Path, address: str) -> None:
    assert read(tmp_path, "org/data", address) == ("of train", "")
    assert read(tmp_path, "org/data", address, place="ONLINE") == ("of train", "")
    Hubs.files["dataset_info.json"] = json.dumps({"d": {"hf_hub_url": "org/data", "split": "test"}}).encode()
    assert read(tmp_path, "d", address, place="REMOTE:org/data") == ("of test", "")


def test_data_of_a_script_are_read_as_the_hub_converted_them(tmp_path: Path, address: str) -> None:
    assert read(tmp_path, "org/script", address) == ("converted", "")


def test_hub_failures_are_one_line_each_with_the_next_move(tmp_path: Path, address: str) -> None:
    nowhere = "http://127.0.0.1:1"
    for name, url, hub, settings, parts in (
        ("org/none", address, "hf", {}, ["org/none: no such data set on", "hf auth login"]),
        ("org/gated", address, "hf", {}, [f"org/gated: gated; accept its terms at {address}/datasets/org/gated"]),
        ("org/data", address, "hf", {"HF_HUB_OFFLINE": "1"}, ["not in the hub cache, and HF_HUB_OFFLINE is set"]),
        ("org/data", nowhere, "hf", {}, [f"cannot be downloaded from {nowhere} (", "HF_ENDPOINT"]),
        ("org/none", address, "modelscope", {}, [f"org/none: no such data set or file on {address}"]),
        ("org/data", address, "modelscope", {"HF_HUB_OFFLINE": "1"}, ["not in the cache of ModelScope data"]),
        ("org/data", nowhere, "modelscope", {}, [f"cannot be downloaded from {nowhere} (", "check the network"]),
        ("org/data.json", address, "hf", {}, ["org/data.json: no such data file; looked for"]),
    ):
        shown, error = read(tmp_path, name, url, hub, **settings)
        assert shown == "" and "\n" not in error, error
        assert all(part in error for part in parts), error
    assert not list((tmp_path / "cache").rglob("*.parquet"))
