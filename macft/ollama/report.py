"""Report what was exported for Ollama, how Ollama prompts it, and what of that is proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from macft.gguf.writing.writer import Written
from macft.ollama.client import ModelRequest
from macft.ollama.native import NativeProof
from macft.ollama.template import Proof
from macft.ollama.ways import GO
from macft.text import size

REQUIRES = "0.30.0"  # the first Ollama that renders the GGUF's own Jinja template

MODELFILE = "Modelfile"
# without TEMPLATE, where Ollama would render one that is not equal for all contents
MODELFILE_JINJA = "Modelfile-0.30"
REPORT = "report.json"
REPORT_TEXT = "report.txt"


@dataclass(frozen=True)
class OllamaReport:
    """The folder that was written; `verification` is the result of the check, {} without one.

    `way` is the one by which Ollama 0.30 and newer renders prompts with the Modelfile, `native` how llama.cpp renders
    the chat template, None where it was not asked; `has_choice` tells of a second Modelfile that leaves it to that.
    """

    folder: Path
    name: str
    gguf: Written
    request: ModelRequest
    proof: Proof
    way: str
    native: NativeProof | None
    has_choice: bool
    notes: tuple[str, ...]
    verification: Mapping[str, Any]


def report_lines(report: OllamaReport) -> list[str]:
    """What a user should know about the folder, one fact per line: first how Ollama prompts the model."""
    gguf, request = report.gguf, report.request
    lines = [f"warning: {warning}" for warning in report.verification.get("warnings", ())]
    lines += _prompt_lines(report)
    lines.append(f"{gguf.path.name}: {gguf.quant}, {size(gguf.nbytes)}, sha256 {gguf.sha256}")
    lines += [f"parameter: {key} {value!r}" for key, value in request.parameters]
    lines += [f"system: {request.system!r}"] if request.system else []
    lines += [f"quantization: {fallback}" for fallback in gguf.fallbacks]
    lines += [f"note: {note}" for note in report.notes]
    if "note" in report.verification:
        lines.append(f"verification: {report.verification['note']}")
    if report.verification.get("answer"):
        lines.append(f"answer: {report.verification['answer']!r}")
    lines.append(f"to use it: cd {report.folder} && ollama create {report.name} -f {MODELFILE}")
    return lines


def as_json(report: OllamaReport) -> dict[str, Any]:
    """The report for programs."""
    gguf, request = report.gguf, report.request
    return {
        "name": report.name,
        "gguf": {**asdict(gguf), "path": gguf.path.name},
        "way": report.way,
        "proof": asdict(report.proof),
        "native": asdict(report.native) if report.native is not None else None,
        "parameters": [list(parameter) for parameter in request.parameters],
        "system": request.system,
        "requires": request.requires,
        "notes": list(report.notes),
        "verification": dict(report.verification),
    }


def _prompt_lines(report: OllamaReport) -> list[str]:
    proof = report.proof
    template = f"renders the TEMPLATE, which gives the text of the training in {proof.cases} conversations"
    limits = [f"TEMPLATE: {limit}" for limit in proof.limits]
    if report.way == GO:
        lines = [f"prompt: Ollama {template}", *limits]
        if report.has_choice:
            lines.append(
                f"choice: {MODELFILE_JINJA} has no TEMPLATE. {_native(report)}; it does not join messages of one role. "
                "But Ollama 0.14 up to 0.30 also creates a model from it, and prompts it with the bare text"
            )
        return [*lines, *_native_limits(report)]
    lines = [f"prompt: {_native(report)}", *_native_limits(report)]
    if proof.go is None:
        reason = f"no TEMPLATE: {proof.reason} An Ollama older than {REQUIRES} cannot prompt this model"
        return [*lines, f"prompt: {reason}"]
    return [*lines, f"prompt: an older Ollama, or one with OLLAMA_GO_TEMPLATE=1, {template}", *limits]


def _native(report: OllamaReport) -> str:
    renders = f"Ollama {REQUIRES} and newer renders the chat template in the GGUF"
    if report.native is None:
        return f"{renders}, which was not compared in llama.cpp"
    if report.native.cases == 0:
        return f"{renders}, which refuses every conversation that was tried"
    return f"{renders}, which in llama.cpp gives the text of the training in {report.native.cases} conversations"


def _native_limits(report: OllamaReport) -> list[str]:
    limits = report.native.limits if report.native is not None else ()
    return [f"chat template: {limit}" for limit in limits]
