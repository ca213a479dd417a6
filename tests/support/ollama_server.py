"""Serve Ollama's HTTP API for models locally, with failures on request."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Ollama:
    """What the server holds. `problem` names what goes wrong; `replaced` is what it puts in place of a template."""

    url: str = ""
    version: str = "0.33.0"
    problem: str = ""
    replaced: str = "{{ .Prompt }}"
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


def _go_quoted(value: Any) -> str:
    """%#v of a text, as Go prints it: other escapes than JSON's for what cannot be seen."""
    if not isinstance(value, str):
        return f"{value:g}"
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\", "\a": "\\a", "\v": "\\v"}
    shown = [
        named.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\u{ord(c):04x}")
        for c in value
    ]
    return '"' + "".join(shown) + '"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> Ollama:
        return self.server.state

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.state.requests.append(f"HEAD {self.path}")
        self._answer(200 if self.path.rpartition("/")[2] in self.state.blobs else 404)

    def do_GET(self) -> None:
        self.state.requests.append(f"GET {self.path}")
        if self.state.problem == "another program":
            self.send_response(200)
            self.send_header("Content-Length", "15")
            self.end_headers()
            self.wfile.write(b"<html>It works!")
        elif self.state.problem == "not found":
            self._answer(404, {"message": "no such page"})
        elif self.path == "/api/version":
            self._answer(200, {"version": self.state.version})

    def do_POST(self) -> None:
        self.state.requests.append(f"POST {self.path}")
        if self.path.startswith("/api/blobs/"):
            return self._blob(self.path.rpartition("/")[2])
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/create":
            return self._create(content)
        model = self.state.models.get(content["model"])
        return self._answer(200, model) if model else self._answer(404, {"error": "model not found"})

    def _blob(self, digest: str) -> None:
        length = int(self.headers["Content-Length"])
        if self.state.problem == "drops the upload":
            self.rfile.read(length // 2)
            self._drop()
            return
        if self.state.problem == "no room":
            self._answer(500, {"error": "write /blobs: no space left on device"})
            self.close_connection = True
            return
        body = self.rfile.read(length)
        found = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if found != digest:
            self._answer(400, {"error": f'digest mismatch, expected "{digest}", got "{found}"'})
            return
        self.state.blobs[digest] = body
        self._answer(201)

    def _line(self, text: bytes) -> None:
        self.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")

    def _create(self, content: dict[str, Any]) -> None:
        if any(name.startswith("/") for name in content["files"]):
            return self._answer(400, {"error": "file path must be relative"})
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._line(b'{"status":"parsing GGUF"}\n')
        missing = [digest for digest in content["files"].values() if digest not in self.state.blobs]
        if self.state.problem == "refuses with status 200" or missing:
            self._line(b'{"error":"failed to validate GGUF\\nunknown architecture"}\n')
        elif self.state.problem == "half a line":
            self._line(b'{"status":"writ')
        elif self.state.problem == "drops the answer":
            self._drop()
            return None
        elif self.state.problem != "ends early":
            self._line(b'{"status":"validating GGUF model"}\n{"status":"validating GGUF model"}\n')
            self._keep(content)
            self._line(b'{"status":"success"}\n')
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _keep(self, content: dict[str, Any]) -> None:
        parameters = content.get("parameters", {})
        if self.state.problem == "forgets the stops":
            parameters.pop("stop", None)
        lines = [
            f"{name:<30} {_go_quoted(one)}"
            for name, value in reversed(parameters.items())
            for one in (value if isinstance(value, list) else [value])
        ]
        self.state.models[content["model"]] = {
            "template": content.get("template") or self.state.replaced,
            "system": content.get("system", ""),
            "parameters": "\n".join(lines),
            "requires": content.get("requires", ""),
            "details": {"format": "gguf"},
        }


@contextmanager
def ollama(**settings: Any) -> Iterator[Ollama]:
    """A running server; its `url` is known."""
    state = Ollama(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.state = state
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
