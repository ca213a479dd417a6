"""Commands that make files for llama.cpp and Ollama: parse, call one function, print what came out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macft.errors import MissingPackageError, ModelError, UsageError

if TYPE_CHECKING:
    from macft.data.templates.chat_template import ChatTemplate
    from macft.data.tokenization.tokenizer import Tokenizer
    from macft.gguf.writing.writer import Written
    from macft.verify.llama_cpp import GgufCheck
    from macft.weights.adapters.peft import Adapter
    from macft.weights.folder import ModelFolder

logger = logging.getLogger("macft")

_SUFFIX = ".gguf"
_QUANT_NAMES = "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, q3_k_m"
_PATH = click.Path(path_type=Path)
_ADAPTERS = click.option(
    "--adapter",
    "adapters",
    metavar="DIR",
    multiple=True,
    help="An adapter folder of PEFT or mlx-lm; may be repeated, and is merged in this order.",
)
_TEMPLATE = click.option(
    "--template", metavar="NAME|FILE", help="The chat template. Default: the adapter's, or the model's."
)
_VERIFY = click.option(
    "--verify/--no-verify",
    default=None,
    help="Load the file in llama.cpp and compare it with its source. Default: where xllamacpp is installed.",
)


@dataclass(frozen=True)
class _Job:
    """What is exported: a model, adapters on it, and the prompt that goes with them (None: it has none)."""

    model: ModelFolder
    adapters: tuple[Adapter, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None


@click.command("gguf")
@click.argument("model")
@_ADAPTERS
@click.option("--output", type=_PATH, metavar="FILE", required=True, help="The .gguf file to write; must not exist.")
@click.option("--quant", "quants", help=f"One or more, with commas: {_QUANT_NAMES}. Default: q8_0.")
@click.option("--adapter-only", is_flag=True, help="Write the adapter alone, for llama.cpp's --lora, in float32.")
@_TEMPLATE
@_VERIFY
def gguf(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    quants: str | None,
    adapter_only: bool,
    template: str | None,
    verify: bool | None,
) -> None:
    """Write MODEL, adapters merged, as a GGUF file for llama.cpp in one pass; several --quant give several files."""
    if output.suffix != _SUFFIX:
        raise UsageError(f"--output {output}: the name of a GGUF file ends in {_SUFFIX}")
    if adapter_only:
        given = {"--quant": quants, "--template": template, "--verify": verify or None}
        _refuse_with_adapter_only([name for name, value in given.items() if value is not None])
        _export_adapter(model, adapters, output)
        return
    from macft.gguf.exporter.export import export_gguf

    outputs = _outputs(output, quants if quants is not None else "q8_0")
    wants_check = _wants_check(verify)
    job = _job(model, adapters, template)
    if job.template is None:
        logger.warning("%s has no chat template: the file will continue texts; --template names one to chat", model)
    report = export_gguf(
        job.model,
        job.adapters,
        outputs,
        tokenizer_folder=job.model.path,
        template=job.template.source if job.template is not None else None,
    )
    for note in report.notes:
        logger.warning(note)
    for written in report.files:
        for fallback in written.fallbacks:
            logger.info("%s: %s", written.quant, fallback)
        if wants_check:
            _say_check(_check(job, written.path, written.quant))
        click.echo(_line(written))


def _refuse_with_adapter_only(given: list[str]) -> None:
    if given:
        raise UsageError(
            f"--adapter-only writes the adapter alone, in float32, and compares it with nothing; {', '.join(given)} "
            "would have no effect: leave out the one or the other"
        )


def _export_adapter(model: str, adapters: tuple[str, ...], output: Path) -> None:
    from macft.gguf.exporter.export import export_lora

    if len(adapters) != 1:
        raise UsageError("--adapter-only writes one adapter: give --adapter once")
    job = _job(model, adapters, None)
    report = export_lora(job.model, job.adapters[0], output)
    for note in report.notes:
        logger.warning(note)
    click.echo(f"{_line(report.files[0])}; use it: llama-server -m BASE.gguf --lora {output}")


@click.command("ollama")
@click.argument("model")
@_ADAPTERS
@click.option("--output", type=_PATH, metavar="DIR", required=True, help="The folder to write; must not exist.")
@click.option("--name", help="What Ollama will call it. Default: from the model's and the adapter's name.")
@click.option("--quant", default="q4_k_m", show_default=True, help=f"One of {_QUANT_NAMES}.")
@click.option("--system", metavar="TEXT", help="A system prompt for every conversation; by default there is none.")
@click.option("--create", is_flag=True, help="Make it a model of the Ollama that runs here (OLLAMA_HOST).")
@_TEMPLATE
@_VERIFY
def ollama(
    model: str,
    adapters: tuple[str, ...],
    output: Path,
    name: str | None,
    quant: str,
    system: str | None,
    create: bool,
    template: str | None,
    verify: bool | None,
) -> None:
    """Write MODEL, adapters merged, as a folder for `ollama create`: the GGUF, a Modelfile, what was proven."""
    from macft.ollama.client import check_server
    from macft.ollama.export import create_in_ollama, default_name, export_ollama, report_lines

    _check_quant(quant)
    wants_check = _wants_check(verify)
    if create:
        check_server()
    job = _job(model, adapters, template)
    if job.template is None:
        raise ModelError(f"{model} has no chat template, which Ollama needs to prompt it: name one with --template")

    def check(path: Path) -> Mapping[str, Any]:
        return asdict(_check(job, path, quant))

    report = export_ollama(
        job.model,
        job.adapters,
        output,
        name=name if name is not None else default_name(job.model, job.adapters),
        quant=quant,
        tokenizer_folder=job.model.path,
        template=job.template,
        system=system,
        check=check if wants_check else None,
    )
    for line in report_lines(report):
        click.echo(line)
    if create:
        created = create_in_ollama(report, on_upload=_show_upload, on_status=lambda status: logger.info(status))
        click.echo(f"created in Ollama {created.version} at {created.url}; talk to it: ollama run {created.name}")


def _outputs(output: Path, quants: str) -> dict[str, Path]:
    """The file of each quantization: FILE itself, or FILE-QUANT.gguf if there are several."""
    names = [name.strip().lower() for name in quants.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--quant {quants!r}: expected one or more of {_QUANT_NAMES}, each once, with commas between")
    for name in names:
        _check_quant(name)
    if len(names) == 1:
        return {names[0]: output}
    return {name: output.with_name(f"{output.stem}-{name}{_SUFFIX}") for name in names}


def _check_quant(name: str) -> None:
    from macft.gguf.writing.quantize import QUANTS

    if name not in QUANTS:
        raise UsageError(f"--quant {name}: not known; expected one of {_QUANT_NAMES}")


def _wants_check(verify: bool | None) -> bool:
    if verify is False:
        return False
    from macft.verify.llama_cpp import is_installed

    if verify and not is_installed():
        raise MissingPackageError("--verify needs llama.cpp: pip install 'macft[export]', or leave it out")
    return is_installed()


def _job(model: str, adapters: tuple[str, ...], template: str | None) -> _Job:
    from macft.data.templates.chat_template import load_template, template_folder
    from macft.data.tokenization.tokenizer import load_tokenizer
    from macft.models.locate import resolve_adapter
    from macft.weights.adapters.formats import read_any_adapter
    from macft.weights.model_config import read_config

    base = _located(model)
    config = read_config(base.path)
    read = tuple(read_any_adapter(resolve_adapter(adapter), config, with_saved=True) for adapter in adapters)
    tokenizer = load_tokenizer(base.path)
    folder = base.path
    for adapter in read:
        folder = template_folder(folder, adapter.folder)
    chat = None
    if template is not None or _has_template(folder):
        chat = load_template(folder, tokenizer.special_map, template)
    return _Job(base, read, tokenizer, chat)


def _located(model: str) -> ModelFolder:
    from macft.models.locate import resolve_model

    try:
        return resolve_model(model)
    except ModelError:
        from macft.weights.layouts.litgpt import is_litgpt

        if not is_litgpt(Path(model).expanduser()):
            raise
        advice = f"convert it first: macft convert model {model} DIR --to hf"
        raise ModelError(f"{model}: a litgpt checkpoint, which cannot be exported as it is; {advice}") from None


def _has_template(folder: Path) -> bool:
    from macft.data.tokenization.tokenizer import read_json

    own = read_json(folder / "tokenizer_config.json").get("chat_template")
    return (folder / "chat_template.jinja").is_file() or bool(own)


def _check(job: _Job, path: Path, quant: str) -> GgufCheck:
    from macft.verify.llama_cpp import verify_gguf
    from macft.verify.logits import Subject

    logger.info("loading %s in llama.cpp", path.name)
    subject = Subject(job.model.path, job.adapters)
    return verify_gguf(path, subject, quant=quant, tokenizer=job.tokenizer, template=job.template)


def _say_check(check: GgufCheck) -> None:
    for warning in check.warnings:
        logger.warning(warning)
    logger.info(check.note)
    logger.info("llama.cpp answers: %r", check.answer)


def _line(written: Written) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(written.kinds.items()))
    return f"{written.path}: {written.quant}, {written.nbytes / 1e6:.1f} MB ({kinds})"


def _show_upload(sent: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if sent == total else ""
        sys.stderr.write(f"\r\x1b[Kuploading: {sent / 1e6:.0f} of {total / 1e6:.0f} MB{end}")
        sys.stderr.flush()
