"""Write files for llama.cpp and Ollama, and compare them with the model they come from."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from macft.api.conversions import read_adapters
from macft.data.templates.chat_template import ChatTemplate, has_template, load_template, template_folder
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import MissingPackageError, ModelError, UsageError
from macft.files import StrPath
from macft.gguf.exporter.export import GgufReport, export_lora
from macft.gguf.exporter.export import export_gguf as write_gguf_files
from macft.gguf.swallowed_space import without_swallowed_space
from macft.gguf.template_variables import pin_variables
from macft.gguf.writing.quantize import QUANTS
from macft.models.locate import resolve_model
from macft.ollama.client import Created, Upload, create_model
from macft.ollama.export import default_name
from macft.ollama.export import export_ollama as write_folder
from macft.ollama.report import OllamaReport
from macft.progress import counting_bytes
from macft.verify.llama_cpp import is_installed
from macft.verify.llama_cpp_compare import GgufCheck, verify_gguf
from macft.verify.logits import Subject, VerifyError
from macft.weights.adapters.fitting import tokenizer_folder
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder
from macft.weights.layouts.litgpt import is_litgpt

logger = logging.getLogger("macft")

_SUFFIX = ".gguf"


@dataclass(frozen=True)
class _Prompted:
    """A model, adapters on it, and the prompt that goes with them; None: it has none."""

    model: ModelFolder
    adapters: tuple[Adapter, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None


def export_gguf(
    model: StrPath,
    output: StrPath,
    *,
    adapters: Sequence[StrPath] = (),
    quants: str = "q8_0",
    template: StrPath | None = None,
    verify: bool | None = None,
) -> GgufReport:
    """Write a model, adapters merged, as the GGUF file `output`; several `quants` (with commas) give FILE-QUANT.gguf.

    `template` names the chat template to embed: a Jinja file or LLaMA-Factory's name. `verify` loads each file in
    llama.cpp and compares it with its source before it gets its name; by default where xllamacpp is installed. Raises
    UsageError for an output that exists or a quantization that is not known, ModelError for what cannot be exported,
    VerifyError; no file is then left behind.
    """
    outputs = _outputs(_gguf_path(output), quants)
    checks = _checks(verify)
    prompted = _prompted(model, adapters, template)
    if prompted.template is None:
        logger.warning("%s has no chat template: the file will continue texts; --template names one to chat", model)

    def check(quant: str, path: Path) -> None:
        _tell(_check(prompted, path, quant, outputs[quant]))

    embedded = None
    if prompted.template is not None:
        folder = tokenizer_folder(prompted.model.path, prompted.adapters)
        embedded = pin_variables(without_swallowed_space(prompted.template, folder))
    report = write_gguf_files(
        prompted.model, prompted.adapters, outputs, template=embedded, check=check if checks else None
    )
    for written in report.files:
        for fallback in written.fallbacks:
            logger.info("%s: %s", written.quant, fallback)
    return report


def export_gguf_adapter(model: StrPath, output: StrPath, *, adapter: StrPath) -> GgufReport:
    """Write an adapter on `model` as the file that llama.cpp takes with `--lora`, in float32."""
    path = _gguf_path(output)
    prompted = _prompted(model, [adapter], None)
    report = export_lora(prompted.model, prompted.adapters[0], path)
    for note in report.notes:
        logger.warning(note)
    return report


def export_ollama(
    model: StrPath,
    output: StrPath,
    *,
    adapters: Sequence[StrPath] = (),
    name: str | None = None,
    quant: str = "q4_k_m",
    system: str | None = None,
    template: StrPath | None = None,
    verify: bool | None = None,
) -> OllamaReport:
    """Write a model, adapters merged, as a new folder for `ollama create`: the GGUF, a Modelfile and a report.

    `name` is what Ollama will call it, by default made of the model's and the adapter's name; `system` a system prompt
    for every conversation. `template` and `verify` are those of `export_gguf`. Raises UsageError, ModelError for a
    model without a chat template or one that cannot be exported, VerifyError.
    """
    _check_quant(quant)
    checks = _checks(verify)
    prompted = _prompted(model, adapters, template)
    if prompted.template is None:
        raise ModelError(f"{model} has no chat template, which Ollama needs to prompt it: name one with --template")

    def check(path: Path, name: Path) -> Mapping[str, Any]:
        return asdict(_check(prompted, path, quant, name))

    return write_folder(
        prompted.model,
        prompted.adapters,
        Path(output),
        name=name if name is not None else default_name(prompted.model, prompted.adapters),
        quant=quant,
        template=prompted.template,
        system=system,
        check=check if checks else None,
        in_llama_cpp=checks,
    )


def create_in_ollama(report: OllamaReport) -> Created:
    """Make an exported folder a model of the Ollama that runs here (OLLAMA_HOST), and show the upload."""
    path = report.gguf.path
    with counting_bytes(path.stat().st_size, f"uploading {path.name}") as advance:
        upload = Upload(path, path.name, report.gguf.sha256)
        return create_model(report.request, upload, on_upload=advance, on_status=logger.info)


def _gguf_path(output: StrPath) -> Path:
    path = Path(output)
    if path.suffix != _SUFFIX:
        raise UsageError(f"--output {path}: the name of a GGUF file ends in {_SUFFIX}")
    return path


def _outputs(output: Path, quants: str) -> dict[str, Path]:
    """The file of each quantization: FILE itself, or FILE-QUANT.gguf if there are several."""
    names = [name.strip().lower() for name in quants.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        known = ", ".join(QUANTS)
        raise UsageError(f"--quant {quants!r}: expected one or more of {known}, each once, separated by commas")
    for name in names:
        _check_quant(name)
    if len(names) == 1:
        return {names[0]: output}
    return {name: output.with_name(f"{output.stem}-{name}{_SUFFIX}") for name in names}


def _check_quant(name: str) -> None:
    if name not in QUANTS:
        raise UsageError(f"--quant {name}: not known; expected one of {', '.join(QUANTS)}")


def _checks(verify: bool | None) -> bool:
    """Whether to load the result in llama.cpp: as asked, or where it is installed."""
    if verify and not is_installed():
        raise MissingPackageError("--verify needs llama.cpp: pip install 'macft[export]', or leave it out")
    return is_installed() if verify is None else verify


def _prompted(model: StrPath, adapters: Sequence[StrPath], template: StrPath | None) -> _Prompted:
    base = _resolved(os.fspath(model))
    read = read_adapters(adapters, base.path)
    tokenizer = load_tokenizer(tokenizer_folder(base.path, read))
    folder = base.path
    for adapter in read:
        folder = template_folder(folder, adapter.folder)
    chat = None
    if template is not None or has_template(folder):
        name = os.fspath(template) if template is not None else None
        chat = load_template(folder, tokenizer.special_map, name, opening=tokenizer.opening)
    return _Prompted(base, read, tokenizer, chat)


def _resolved(model: str) -> ModelFolder:
    try:
        return resolve_model(model)
    except ModelError:
        if not is_litgpt(Path(model).expanduser()):
            raise
        advice = f"convert it first: macft convert model {model} DIR --to hf"
        raise ModelError(f"{model}: a litgpt checkpoint, which cannot be exported as it is; {advice}") from None


def _check(prompted: _Prompted, path: Path, quant: str, name: Path) -> GgufCheck:
    """Compare the file at `path`, which will be `name`, with its source; an error says that no file is left."""
    logger.info("loading %s in llama.cpp", name.name)
    subject = Subject(prompted.model.path, prompted.adapters)
    try:
        return verify_gguf(
            path, subject, quant=quant, tokenizer=prompted.tokenizer, template=prompted.template, name=name
        )
    except (ModelError, VerifyError) as error:
        raise type(error)(f"{error}; nothing was written (--no-verify writes it without this check)") from None


def _tell(check: GgufCheck) -> None:
    for warning in check.warnings:
        logger.warning(warning)
    logger.info(check.note)
    logger.info("llama.cpp answers: %r", check.answer)
