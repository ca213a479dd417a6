"""The client makes the model it was asked for, or says in one line why there is none."""

from __future__ import annotations

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.ollama_server import ollama

from macft.errors import UsageError
from macft.ollama.client import ModelRequest, OllamaError, Upload, check_server, create_model, parse_host

TEMPLATE = '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}"""{{ "\\u00a0" }}{{ end }}'
REQUEST = ModelRequest(
    name="macft-test:latest",
    template=TEMPLATE,
    system='Sei "kurz".\n',
    parameters=[("stop", '<|im_end|>\n"\u00a0'), ("stop", "用户\\\a"), ("temperature", 0.7), ("num_ctx", 4096)],
)


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * 12345)  # three chunks, the last one short
    return Upload(path, "model.gguf", hashlib.sha256(path.read_bytes()).hexdigest())


def failure(upload: Upload, request: ModelRequest = REQUEST, **settings: object) -> str:
    with ollama(**settings) as server:
        with pytest.raises(OllamaError) as caught:
            create_model(request, upload, host=server.url)
        text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 1
    return text.replace(server.url, "URL")


def test_a_model_is_uploaded_created_and_read_back(upload):
    sent, said = [], []
    with ollama() as server:
        made = create_model(REQUEST, upload, host=server.url, on_upload=sent.append, on_status=said.append)
        assert server.blobs == {f"sha256:{upload.sha256}": upload.path.read_bytes()}
        shown = server.models["macft-test:latest"]
    assert (made.name, made.url, made.version, made.uploaded) == ("macft-test:latest", server.url, "0.33.0", True)
    assert shown["template"] == TEMPLATE and shown["system"] == REQUEST.system
    assert '\\u00a0"' in shown["parameters"]  # written with Go's escapes, and understood
    assert sent == [1 << 20, 1 << 20, 1 << 20, 256 * 12345 - (3 << 20)]
    assert said == ["parsing GGUF", "validating GGUF model", "success"]


def test_a_file_that_ollama_has_is_not_sent_again(upload):
    with ollama() as server:
        create_model(REQUEST, upload, host=server.url)
        server.requests.clear()
        made = create_model(replace(REQUEST, name="other"), upload, host=server.url)
        blob = f"/api/blobs/sha256:{upload.sha256}"
        assert server.requests == ["GET /api/version", f"HEAD {blob}", "POST /api/create", "POST /api/show"]
    assert not made.uploaded


def test_a_model_without_template_or_parameters_is_as_asked(upload):
    bare = ModelRequest(name="bare", requires="0.30.0")
    for shown in ("{{ .Prompt }}", ""):
        with ollama(replaced=shown) as server:
            assert create_model(bare, upload, host=server.url).name == "bare"


def test_a_template_put_in_place_of_the_ggufs_own_is_an_error_that_names_both(upload):
    text = failure(upload, ModelRequest(name="bare"), replaced="{{ .System }} canned")
    assert text.startswith("Ollama created bare differently from the request: template: asked ")
    assert '"none, as the GGUF\'s own is to be used", found "{{ .System }} canned"' in text


def test_lost_stops_are_an_error_that_names_both(upload):
    text = failure(upload, replace(REQUEST, parameters=[("stop", "<end>"), ("top_k", 20)]), problem="forgets the stops")
    assert 'parameters: asked "stop \\"<end>\\", top_k 20.0", found "top_k 20.0"' in text


def test_an_error_line_with_status_200_is_an_error(upload):
    assert failure(upload, problem="refuses with status 200") == (
        "URL: Ollama did not create macft-test:latest: failed to validate GGUF unknown architecture"
    )


def test_a_wrong_hash_is_refused_by_the_server(upload):
    text = failure(replace(upload, sha256="0" * 64))
    assert text.startswith("URL: POST /api/blobs/sha256 failed with 400: digest mismatch, expected ")
    assert text.endswith("; export again: the file is not the one that was hashed")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("drops the upload", "the connection broke at POST /api/blobs/sha256:"),
        ("no room", "POST /api/blobs/sha256 failed with 500: write /blobs: no space left on device"),
        ("half a line", 'answers POST /api/create with "{\\"status\\":\\"writ", expected a JSON object'),
        ("drops the answer", "macft-test:latest was created (last: parsing GGUF)|the connection broke at POST"),
        ("ends early", "Ollama stopped answering before macft-test:latest was created (last: parsing GGUF)"),
        ("another program", 'answers GET /api/version with "<html>It works!", expected a JSON object'),
        ("not found", "GET /api/version failed with 404: "),
    ],
)
def test_each_problem_of_the_server_is_one_line(problem, expected, tmp_path):
    # larger than the buffers of a connection: the server has gone before all of it is sent
    path = tmp_path / "large.gguf"
    path.write_bytes(b"GGUF" * (4 << 20))
    large = Upload(path, "large.gguf", hashlib.sha256(path.read_bytes()).hexdigest())
    text = failure(large, problem=problem)
    assert any(part in text for part in expected.split("|")), text


def test_a_file_cut_while_it_is_sent_is_told(upload):
    def cut(_: int) -> None:
        with upload.path.open("r+b") as file:
            file.truncate((1 << 20) + 5)

    with ollama() as server, pytest.raises(OllamaError, match="became shorter while it was uploaded"):
        create_model(REQUEST, upload, host=server.url, on_upload=cut)


def test_a_path_that_is_not_relative_is_the_servers_error_with_its_body(upload):
    assert failure(replace(upload, name="/model.gguf")) == (
        "URL: POST /api/create failed with 400: file path must be relative"
    )


def test_nobody_there_is_one_line_that_says_how_to_install_it(upload, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(OllamaError) as caught:
        create_model(REQUEST, upload)
    text = str(caught.value)
    assert text.startswith("no Ollama answers at http://127.0.0.1:") and "\n" not in text
    assert all(part in text for part in ("brew install ollama", "install.sh | sh", "ollama serve"))


def test_a_server_that_does_not_speak_http_is_one_line(upload):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(OllamaError, match=r"the connection broke at GET /api/version \(Server disconnected"):
            create_model(REQUEST, upload, host=f"127.0.0.1:{server.getsockname()[1]}")


def test_an_ollama_that_is_too_old_is_told_before_the_upload(upload):
    text = failure(upload, replace(REQUEST, requires="0.30.0"), version="0.12.11")
    assert text == "URL: Ollama 0.12.11 answers, this model needs 0.30.0; update Ollama"
    for version in ("0.30.0", "0.30.1-rc2", "1.0.0", "0.0.0"):
        with ollama(version=version) as server:
            assert check_server(server.url, "0.30.0") == version


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        (" 'box:8080' ", "http://box:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("::1", "http://[::1]:11434"),
        ("http://box", "http://box:80"),
        ("https://box/ollama/", "https://box:443/ollama"),
        ("http://box:11434/", "http://box:11434"),
    ],
)
def test_hosts_are_read_as_ollama_reads_them(text, url):
    assert parse_host(text) == url


@pytest.mark.parametrize("text", ["box:port", "box:99999", "ftp://box", "[::1"])
def test_a_host_that_cannot_be_is_named(text):
    with pytest.raises(UsageError, match="OLLAMA_HOST"):
        parse_host(text)


def test_proxies_of_the_environment_are_not_used(upload, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with ollama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert create_model(REQUEST, upload).url == server.url
