"""Create a model in the running Ollama, read it back and compare it with the request."""

from __future__ import annotations

import ast
import json
import os
import re
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from macft.errors import MacftError, UsageError

Parameter = tuple[str, str | int | float]

_CHUNK = 1 << 20
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 3600  # Ollama hashes, and since 0.30 rewrites, a file of many GB before it answers
_NO_TEMPLATE = ("", "{{ .Prompt }}")  # what Ollama shows of a model without TEMPLATE
_INSTALL = (
    "install it (macOS: brew install ollama, or the app from https://ollama.com/download; Linux: "
    "curl -fsSL https://ollama.com/install.sh | sh) and start it with: ollama serve"
)


class OllamaError(MacftError):
    """Ollama did not answer, refused, or created a model that differs from the request."""


@dataclass(frozen=True)
class Upload:
    """A file, the name by which Ollama shall know it, and its SHA-256 in hex."""

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True)
class ModelRequest:
    """The contents of a Modelfile; `template` None leaves the prompt to the GGUF's own Jinja template.

    `requires` is the least version of Ollama, as in 0.30.0.
    """

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


def create_model(
    request: ModelRequest,
    upload: Upload,
    *,
    host: str | None = None,
    on_upload: Callable[[int], None] = lambda _: None,
    on_status: Callable[[str], None] = lambda _: None,
) -> Created:
    """Upload the file unless Ollama has it, create the model, read it back and compare.

    `host` is written as OLLAMA_HOST is, which is the default. `on_upload` gets how many more bytes are
    sent, `on_status` each new status line. Raises OllamaError when nobody answers, when Ollama refuses, and when what
    it shows differs from the request; UsageError for a malformed host.
    """
    with _connect(host) as server:
        version = _check_version(server, request.requires)
        sent = _upload(server, upload, on_upload)
        _create(server, request, upload, on_status)
        _compare(request, server.json("POST", "/api/show", {"model": request.name}))
        return Created(request.name, server.url, version, sent)


def check_server(host: str | None = None, requires: str | None = None) -> str:
    """The version of the Ollama that answers; OllamaError for none, for another program, or for one too old."""
    with _connect(host) as server:
        return _check_version(server, requires)


def parse_host(text: str) -> str:
    """The URL of OLLAMA_HOST, read as Ollama does: empty, host, host:port or URL; an address to listen on is local."""
    text = text.strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    defaults = {"http": 80, "https": 443} if separator else {"http": 11434}
    if scheme not in defaults:
        raise UsageError(f"OLLAMA_HOST {text}: the scheme is {scheme}; write http:// or https://")
    place, _, path = rest.partition("/")
    bare = place.count(":") > 1 and not place.startswith("[")  # an IPv6 address without its brackets
    try:
        split = urlsplit(f"//[{place}]" if bare else f"//{place}")
        name, port = split.hostname or "127.0.0.1", split.port
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
        url = f"{scheme}://{f'[{name}]' if ':' in name else name}:{port if port is not None else defaults[scheme]}"
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        raise UsageError(f"OLLAMA_HOST {text}: not of the form host, host:port or http://host:port") from None
    return f"{url}/{path.strip('/')}".rstrip("/")


def _check_version(server: _Server, requires: str | None) -> str:
    version = server.json("GET", "/api/version").get("version")
    if not isinstance(version, str):
        raise OllamaError(f"{server.url}: answers, but not as Ollama does (no version); correct OLLAMA_HOST")
    found, expected = _numbers(version), _numbers(requires or "")
    # a build from source calls itself 0.0.0
    if expected and any(found) and found < expected:
        raise OllamaError(f"{server.url}: Ollama {version} answers, this model needs {requires}; update Ollama")
    return version


def _upload(server: _Server, upload: Upload, on_upload: Callable[[int], None]) -> bool:
    """Whether the file was sent; Ollama keeps files by their hash."""
    path = f"/api/blobs/sha256:{upload.sha256}"
    with server.request("HEAD", path, accepted=(200, 404)) as response:
        if response.status_code == 200:
            return False
    with server.request("POST", path, file=_FileBody(upload.path, on_upload), accepted=(200, 201)):
        return True


def _create(server: _Server, request: ModelRequest, upload: Upload, on_status: Callable[[str], None]) -> None:
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
    with server.request("POST", "/api/create", content=content) as response:
        for text in filter(None, response.iter_lines()):
            line = _object(server.url, "POST /api/create", text)
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
    """OllamaError that names everything that differs, as it was asked for and as it is."""
    template, system = str(shown.get("template") or ""), str(shown.get("system") or "")
    differing = []
    if request.template is None and template not in _NO_TEMPLATE:
        differing.append(("template", "none, as the GGUF's own is to be used", template))
    elif request.template is not None and template != request.template:
        differing.append(("template", request.template, template))
    if system != (request.system or ""):
        differing.append(("system", request.system or "none", system or "none"))
    asked, found = _pairs(request.parameters), _shown_pairs(str(shown.get("parameters") or ""))
    if asked != found:
        differing.append(("parameters", _listed(asked), _listed(found)))
    requires = shown.get("requires")  # servers before 0.14 do not know it
    if requires is not None and requires != (request.requires or ""):
        differing.append(("requires", request.requires or "none", str(requires)))
    if differing:
        problems = "; ".join(f"{what}: asked {_short(one)}, found {_short(other)}" for what, one, other in differing)
        raise OllamaError(
            f"Ollama created {request.name} differently from the request: {problems}; do not use it "
            f"(ollama rm {request.name}), and report this"
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


@dataclass(frozen=True)
class _Server:
    """One Ollama; whatever goes wrong with a request becomes an OllamaError of one line."""

    url: str
    client: httpx2.Client

    @contextmanager
    def request(
        self,
        method: str,
        path: str,
        *,
        content: dict[str, Any] | None = None,
        file: _FileBody | None = None,
        accepted: Collection[int] = (200,),
    ) -> Iterator[httpx2.Response]:
        """The response, its body not yet read; OllamaError for a status that is not `accepted`."""
        headers = {"Content-Length": str(file.size)} if file is not None else None
        try:
            with self.client.stream(method, self.url + path, json=content, content=file, headers=headers) as response:
                if response.status_code not in accepted:
                    raise _refusal(f"{self.url}: {method} {path.split(':')[0]}", response)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or "no answer"
            raise OllamaError(f"no Ollama answers at {self.url} ({_one_line(reason)}): {_INSTALL}") from None
        except httpx2.HTTPError as error:
            reason = "no answer in time" if isinstance(error, httpx2.TimeoutException) else _one_line(error)
            where = f" after {file.sent} of {file.size} bytes of {file.path.name}" if file is not None else ""
            raise OllamaError(
                f"{self.url}: the connection broke at {method} {path} ({reason}){where}; see its log, and run the "
                "command again"
            ) from None

    def json(self, method: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of a response."""
        with self.request(method, path, content=content) as response:
            response.read()
            return _object(self.url, f"{method} {path}", response.text)


class _FileBody:
    """The bytes of a file as the body of a request, counted as they are sent."""

    def __init__(self, path: Path, on_upload: Callable[[int], None]) -> None:
        self.path, self.size, self.sent = path, path.stat().st_size, 0
        self._on_upload = on_upload

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while chunk := file.read(min(_CHUNK, self.size - self.sent)):
                yield chunk
                self.sent += len(chunk)
                self._on_upload(len(chunk))
        if self.sent < self.size:
            raise OllamaError(f"{self.path}: became shorter while it was uploaded; export it again")


@contextmanager
def _connect(host: str | None) -> Iterator[_Server]:
    """The server at `host`, by default OLLAMA_HOST."""
    url = parse_host(host if host is not None else os.environ.get("OLLAMA_HOST", ""))
    timeout = httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS)
    # without trust_env no proxy gets in between, and an idle connection is not used again
    limits = httpx2.Limits(max_keepalive_connections=0)
    certificates = ssl.create_default_context()
    with httpx2.Client(verify=certificates, timeout=timeout, limits=limits, trust_env=False) as client:
        yield _Server(url, client)


def _object(url: str, what: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OllamaError(
            f"{url}: answers {what} with {_short(text)}, expected a JSON object: it broke off, or is not Ollama; "
            "see its log, or correct OLLAMA_HOST"
        )
    return value


def _refusal(what: str, response: httpx2.Response) -> OllamaError:
    """The error for an unexpected status, with the reason that the body gives."""
    response.read()
    try:
        reason = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        reason = "" if response.text.lstrip().startswith("<") else response.text  # a page of another program
    hint = "; is this Ollama? Correct OLLAMA_HOST" if response.status_code in (404, 405, 501) else ""
    hint = "; export again: the file is not the one that was hashed" if "digest mismatch" in reason else hint
    return OllamaError(
        f"{what} failed with {response.status_code}: {_one_line(reason) or response.reason_phrase}{hint}"
    )


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 500 else f"{text[:500]}..."


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 120 else f"{text[:120]}...", ensure_ascii=False)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(number) for number in found.groups()) if found else ()
