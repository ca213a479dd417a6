"""Models on ModelScope, against a server with its routes: which files come, the cache, and what is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlparse

import pytest
from support.toy_backend import write_rows, write_toy_model

from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ModelError
from macft.inspection.dataset import inspect
from macft.models.locate import resolve_model

ROUTE = "/api/v1/models/org/toy/repo"


class Models(BaseHTTPRequestHandler):
    """ModelScope with one model."""

    files: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[str]] = []
    moved: ClassVar[tuple[str, ...]] = ()

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.seen.append(query.get("FilePath", url.path))
        if url.path == f"{ROUTE}/files":
            listed = [{"Path": name, "Type": "blob", "Size": len(content)} for name, content in self.files.items()]
            listed += [{"Path": "onnx", "Type": "tree"}, {"Path": "../evil.json", "Type": "blob", "Size": 1}]
            return self.answer(200, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode())
        if url.path == ROUTE and query.get("FilePath") in self.moved:
            return self.answer(302, b"", Location=f"/elsewhere/{query['FilePath']}")
        if url.path.startswith("/elsewhere/"):
            return self.answer(200, self.files[url.path.removeprefix("/elsewhere/")])
        if url.path == "/api/v1/models/org/broken/repo/files":
            return self.answer(500, b"<html>")
        if url.path == "/api/v1/models/org/proxy/repo/files":
            return self.answer(200, b"<html>sign in</html>")
        if url.path == ROUTE and query.get("FilePath") in self.files:
            return self.answer(200, self.files[query["FilePath"]])
        return self.answer(404, b"{}")

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Nothing: the terminal is the tests'."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the model that is served; nothing is cached yet."""
    folder = write_toy_model(tmp_path / "original")
    Models.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Models.files |= {"pytorch_model.bin": b"x" * 100, "onnx/model.json": b"{}", "README.md": b"# toy"}
    Models.seen = []
    Models.moved = ()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_DOMAIN", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def test_a_model_comes_with_its_files_and_no_others(served: Path) -> None:
    found = resolve_model("org/toy", "modelscope").path
    names = {path.name for path in found.iterdir() if not path.name.startswith(".")}
    assert names == {path.name for path in served.iterdir()}
    assert all((found / name).read_bytes() == (served / name).read_bytes() for name in names)


@pytest.mark.usefixtures("served")
def test_the_environment_asks_for_it_and_a_second_time_only_the_listing_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    first = resolve_model("org/toy").path
    Models.seen.clear()
    assert resolve_model("org/toy").path == first and Models.seen == [f"{ROUTE}/files"]


@pytest.mark.usefixtures("served")
def test_offline_takes_the_cache_or_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="org/toy: not in the cache of ModelScope models, and HF_HUB_OFFLINE is set"):
        resolve_model("org/toy", "modelscope")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    found = resolve_model("org/toy", "modelscope").path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Models.seen.clear()
    assert resolve_model("org/toy", "modelscope").path == found and not Models.seen


def test_looking_at_data_asks_the_hub_that_the_file_names(served: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: org/toy\nhub: modelscope\ndataset: {rows}\noutput_dir: {tmp_path}/out\n")
    found = inspect(str(config), (), None)
    assert found.encoding.tokenizer.vocabulary == load_tokenizer(served).vocabulary and "tokenizer.json" in Models.seen


def test_a_file_that_is_stored_elsewhere_is_followed(served: Path) -> None:
    Models.moved = ("tokenizer.json",)
    found = resolve_model("org/toy", "modelscope").path
    assert (found / "tokenizer.json").read_bytes() == (served / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("name", "domain", "reason"),
    [
        ("org/broken", None, "500 Internal Server Error"),
        ("org/proxy", None, "Expecting value"),
        ("org/toy", "http://127.0.0.1:1", "refused"),
        ("org/toy", "no host at all:port", "[Ii]nvalid"),
    ],
)
def test_what_keeps_modelscope_from_answering_is_one_line(
    name: str, domain: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if domain is not None:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", domain)
    with pytest.raises(ModelError, match=rf"{name}: cannot be downloaded from .* \(.*{reason}.*\); check") as caught:
        resolve_model(name, "modelscope")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_and_a_file_cut_short_are_one_line(served: Path) -> None:
    with pytest.raises(ModelError, match="org/none: no such model or file on http://127") as caught:
        resolve_model("org/none", "modelscope")
    assert "\n" not in str(caught.value)
    name = next(path.name for path in served.iterdir() if path.suffix == ".safetensors")
    whole = Models.files[name]

    class Short(bytes):
        """Says that it is longer than it is."""

        def __len__(self) -> int:
            return len(whole) + 1

    Models.files[name] = Short(whole)
    with pytest.raises(ModelError, match=f"org/toy: .*{name}|cannot be downloaded"):
        resolve_model("org/toy", "modelscope")
    folder = next(Path(str(served.parent)).glob("cache/modelscope/models/org/toy"))
    assert not (folder / name).exists()
