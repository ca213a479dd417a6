"""A GGUF file and what its prompt is made of in; a model of the running Ollama, read back and compared, out."""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from macft.errors import MacftError, UsageError

Parameter = tuple[str, str | int | float]

_CHUNK = 1 << 20
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 3600  # Ollama hashes, and since 0.30 rewrites, a file of many GB without a word
_MAX_BODY = 64 << 20
_NO_TEMPLATE = ("", "{{ .Prompt }}")  # what Ollama shows of a model without TEMPLATE
_INSTALL = (
    "install it (macOS: brew install ollama, or the app from https://ollama.com/download; Linux: "
    "curl -fsSL https://ollama.com/install.sh | sh) and start it with: ollama serve"
)


class OllamaError(MacftError):
    """Ollama did not answer, refused, or made another model than it was asked for."""


@dataclass(frozen=True)
class Upload:
    """A file, the name Ollama is to know it by, and its SHA-256 in hex."""

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True)
class ModelRequest:
    """What a Modelfile says: `template` None leaves the prompt to the GGUF's own Jinja template."""

    name: str
    template: str | None = None
    system: str | None = None
    parameters: Sequence[Parameter] = ()
    requires: str | None = None


@dataclass(frozen=True)
class Created:
    """The model as Ollama now names it, where, and whether the file had to be uploaded."""

    name: str
    url: str
    version: str
    uploaded: bool


@dataclass(frozen=True)
class Host:
    """Where Ollama is; `prefix` stands in front of every path."""

    scheme: str
    name: str
    port: int
    prefix: str

    @property
    def url(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{self.scheme}://{name}:{self.port}{self.prefix}"


def create_model(
    request: ModelRequest,
    upload: Upload,
    *,
    host: str | None = None,
    on_upload: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> Created:
    """Upload the file unless Ollama has it, create the model, read it back and compare.

    `host` is written as OLLAMA_HOST is, which is the default. `on_upload` gets bytes sent and bytes in all,
    `on_status` each new status line. Raises OllamaError when nobody answers, when Ollama refuses, and when what
    it shows differs from what was asked; UsageError for a host that cannot be.
    """
    server = parse_host(host if host is not None else os.environ.get("OLLAMA_HOST", ""))
    version = check_server(server.url, request.requires)
    sent = _upload(server, upload, on_upload or _ignore_bytes)
    _create(server, request, upload, on_status or _ignore_status)
    _compare(request, _json(server, "POST", "/api/show", {"model": request.name}))
    return Created(request.name, server.url, version, sent)


def check_server(host: str | None = None, requires: str | None = None) -> str:
    """The version of the Ollama that answers; OllamaError for none, for another program, or for one too old."""
    server = parse_host(host if host is not None else os.environ.get("OLLAMA_HOST", ""))
    version = _json(server, "GET", "/api/version").get("version")
    if not isinstance(version, str):
        raise OllamaError(f"{server.url}: answers, but not as Ollama does (no version); correct OLLAMA_HOST")
    found, expected = _numbers(version), _numbers(requires or "")
    # a build from source calls itself 0.0.0
    if expected and any(found) and found < expected:
        raise OllamaError(f"{server.url}: Ollama {version} answers, this model needs {requires}; update Ollama")
    return version


def parse_host(text: str) -> Host:
    """OLLAMA_HOST as Ollama reads it: empty, host, host:port or URL; an address to listen on becomes the loopback."""
    text = text.strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    defaults = {"http": 80, "https": 443} if separator else {"http": 11434}
    if scheme not in defaults:
        raise UsageError(f"OLLAMA_HOST {text}: {scheme} is no way to reach Ollama; write http:// or https://")
    place, _, path = rest.partition("/")
    bare = place.count(":") > 1 and not place.startswith("[")  # an IPv6 address without its brackets
    try:
        split = urlsplit(f"//[{place}]" if bare else f"//{place}")
        name, port = split.hostname or "127.0.0.1", split.port
    except ValueError:
        raise UsageError(f"OLLAMA_HOST {text}: not of the form host, host:port or http://host:port") from None
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
    prefix = "/" + path.strip("/") if path.strip("/") else ""
    return Host(scheme, name, port if port is not None else defaults[scheme], prefix)


def _upload(server: Host, upload: Upload, on_upload: Callable[[int, int], None]) -> bool:
    """Whether the file was sent; Ollama keeps files by their hash."""
    path = f"/api/blobs/sha256:{upload.sha256}"
    with _exchange(server, "HEAD", path) as exchange:
        response = exchange.answer()
        if response.status == 200:
            return False
        if response.status != 404:
            raise _refusal(server, "HEAD", path, response)
    size = upload.path.stat().st_size
    with upload.path.open("rb") as file, _exchange(server, "POST", path, length=size) as exchange:
        sent = 0
        while sent < size and (chunk := file.read(_CHUNK)):
            if not exchange.send(chunk):
                break
            sent += len(chunk)
            on_upload(sent, size)
        if sent != size and not exchange.is_broken:
            raise OllamaError(f"{upload.path}: became shorter while it was uploaded; export it again")
        response = exchange.answer(f"after {sent} of {size} bytes of {upload.path.name}; run the command again")
        if response.status not in (200, 201):
            raise _refusal(server, "POST", path, response)
    return True


def _create(server: Host, request: ModelRequest, upload: Upload, on_status: Callable[[str], None]) -> None:
    content: dict[str, Any] = {
        "model": request.name,
        "files": {upload.name: f"sha256:{upload.sha256}"},
        "parameters": _grouped(request.parameters),
        "template": request.template,
        "system": request.system,
        "requires": request.requires,
        "stream": True,
    }
    content = {key: value for key, value in content.items() if value not in (None, {})}
    last = ""
    with _exchange(server, "POST", "/api/create", content=content) as exchange:
        response = exchange.answer()
        if response.status != 200:
            raise _refusal(server, "POST", "/api/create", response)
        for line in exchange.lines(response):
            if "error" in line:
                raise OllamaError(f"{server.url}: Ollama did not create {request.name}: {_one_line(line['error'])}")
            status = str(line.get("status", ""))
            if status != last:
                on_status(status)
            last = status
            if status == "success":
                return
    raise OllamaError(
        f"{server.url}: Ollama stopped answering before {request.name} was created (last: {last or 'nothing'}); "
        "see its log, and run the command again"
    )


def _grouped(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Parameters as the API takes them: all values of `stop` in a list, the others by name."""
    grouped: dict[str, Any] = {}
    for name, value in parameters:
        if name == "stop":
            grouped.setdefault(name, []).append(value)
        else:
            grouped[name] = value
    return grouped


def _compare(request: ModelRequest, shown: dict[str, Any]) -> None:
    """OllamaError that names what was asked and what is there, of everything that differs."""
    template = str(shown.get("template") or "")
    differing = []
    if template != request.template if request.template is not None else template not in _NO_TEMPLATE:
        expected = request.template if request.template is not None else "none, as the GGUF's own is to be used"
        differing.append(("template", expected, template))
    if str(shown.get("system") or "") != (request.system or ""):
        differing.append(("system", request.system or "none", str(shown.get("system") or "none")))
    wanted_lines, found_lines = _pairs(request.parameters), _shown_pairs(str(shown.get("parameters") or ""))
    if wanted_lines != found_lines:
        differing.append(("parameters", _listed(wanted_lines), _listed(found_lines)))
    found_version = shown.get("requires")  # servers before 0.14 do not know it
    if found_version is not None and found_version != (request.requires or ""):
        differing.append(("requires", request.requires or "none", str(found_version)))
    if differing:
        problems = "; ".join(
            f"{what}: asked {_short(asked)}, found {_short(found)}" for what, asked, found in differing
        )
        raise OllamaError(
            f"Ollama made {request.name} otherwise than asked: {problems}; do not use it (ollama rm {request.name}), "
            "and report this"
        )


def _pairs(parameters: Sequence[Parameter]) -> list[tuple[str, str | float]]:
    return sorted((name, value if isinstance(value, str) else float(value)) for name, value in parameters)


def _shown_pairs(text: str) -> list[tuple[str, str | float]]:
    """The lines `name   value` that Ollama shows; a text stands in quotes, with Go's escapes, which are Python's."""
    # a line break inside a value is escaped, so splitlines, which knows more of them, is not needed
    found: list[tuple[str, str | float]] = []
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        name, _, written = line.partition(" ")
        try:
            value = ast.literal_eval(written.strip())
        except (SyntaxError, ValueError):
            value = written.strip()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        found.append((name, float(value) if is_number else str(value)))
    return sorted(found)


def _listed(pairs: Sequence[tuple[str, str | float]]) -> str:
    return ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in pairs) or "none"


class _Exchange:
    """One request and its answer; every problem of the connection becomes one line."""

    def __init__(self, server: Host, method: str, path: str, content: dict[str, Any] | None, length: int | None):
        self.server = server
        self.is_broken = False
        self._what = f"{method} {path}"
        body = json.dumps(content).encode("utf-8") if content is not None else b""
        kind = "application/json" if content is not None else "application/octet-stream"
        # http.client knows no proxies, so that none gets between
        maker = http.client.HTTPSConnection if server.scheme == "https" else http.client.HTTPConnection
        self.connection = maker(server.name, server.port, timeout=_CONNECT_SECONDS)
        try:
            self.connection.connect()
            self.connection.sock.settimeout(_ANSWER_SECONDS)
        except OSError as error:
            reason = error.strerror or str(error) or "no answer"
            raise OllamaError(f"no Ollama answers at {server.url} ({reason}): {_INSTALL}") from None
        self.connection.putrequest(method, server.prefix + path, skip_accept_encoding=True)
        self.connection.putheader("Content-Type", kind)
        self.connection.putheader("Content-Length", str(length if length is not None else len(body)))
        try:
            self.connection.endheaders(body or None)
        except OSError:
            self.is_broken = True

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, chunk: bytes) -> bool:
        """False when the server has closed: it may have said why, so that the answer is still to be read."""
        try:
            self.connection.send(chunk)
        except OSError:
            self.is_broken = True
        return not self.is_broken

    def answer(self, where: str = "") -> http.client.HTTPResponse:
        try:
            return self.connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._dropped(error, where) from None

    def lines(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The JSON objects of the answer, one a line."""
        while True:
            try:
                line = response.readline(_MAX_BODY)
            except (OSError, http.client.HTTPException) as error:
                raise self._dropped(error, "") from None
            if not line:
                return
            if line.strip():
                yield _object(self.server, self._what, line)

    def _dropped(self, error: Exception, where: str) -> OllamaError:
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        after = f" {where}" if where else "; see its log, and run the command again"
        return OllamaError(f"{self.server.url}: the connection broke at {self._what} ({_one_line(reason)}){after}")


def _exchange(
    server: Host, method: str, path: str, *, content: dict[str, Any] | None = None, length: int | None = None
) -> _Exchange:
    return _Exchange(server, method, path, content, length)


def _json(server: Host, method: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    with _exchange(server, method, path, content=content) as exchange:
        response = exchange.answer()
        if response.status != 200:
            raise _refusal(server, method, path, response)
        with closing(response):
            try:
                body = response.read(_MAX_BODY)
            except (OSError, http.client.HTTPException) as error:
                raise OllamaError(f"{server.url}: the connection broke at {method} {path} ({error})") from None
    return _object(server, f"{method} {path}", body)


def _object(server: Host, what: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        shown = _short(text[:200].decode("utf-8", "replace"))
        raise OllamaError(
            f"{server.url}: answers {what} with {shown}, expected a JSON object: it broke off, or is not Ollama; "
            "see its log, or correct OLLAMA_HOST"
        )
    return value


def _refusal(server: Host, method: str, path: str, response: http.client.HTTPResponse) -> OllamaError:
    """The error for an answer that is not 200, with the reason that its body gives."""
    try:
        body = response.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = ""
    try:
        value = json.loads(body)
        reason = str(value["error"]) if isinstance(value, dict) and "error" in value else body
    except ValueError:
        reason = "" if body.lstrip().startswith("<") else body  # a page of another program
    hint = "; is this Ollama? Correct OLLAMA_HOST" if response.status in (404, 405, 501) else ""
    hint = "; export again: the file is not what was hashed" if "digest mismatch" in reason else hint
    said = _one_line(reason) or response.reason
    return OllamaError(f"{server.url}: {method} {path.split(':')[0]} failed with {response.status}: {said}{hint}")


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 500 else f"{text[:500]}..."


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 120 else f"{text[:120]}...", ensure_ascii=False)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(number) for number in found.groups()) if found else ()


def _ignore_bytes(_sent: int, _size: int) -> None:
    pass


def _ignore_status(_status: str) -> None:
    pass
