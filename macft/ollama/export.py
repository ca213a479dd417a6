"""Export a model folder with its adapters as a folder for `ollama create`, with a report of what was proven."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from macft.data.templates.chat_template import ChatTemplate
from macft.errors import UsageError
from macft.files import new_dir, new_parents, write_json, write_text
from macft.gguf.exporter.export import if_not_finite, read_gguf_model
from macft.gguf.format import Field, GgufModel
from macft.gguf.swallowed_space import without_swallowed_space
from macft.gguf.template_variables import pin_variables
from macft.gguf.vocabulary.special_ids import ENDS_BY_TEXT
from macft.gguf.writing.writer import write_gguf
from macft.ollama.client import ModelRequest, Parameter
from macft.ollama.detection import pad_template
from macft.ollama.modelfile import modelfile
from macft.ollama.native import prove_native
from macft.ollama.report import (
    MODELFILE,
    MODELFILE_JINJA,
    REPORT,
    REPORT_TEXT,
    REQUIRES,
    OllamaReport,
    as_json,
    report_lines,
)
from macft.ollama.template import Proof, needed_stops, prove_template
from macft.ollama.ways import GO, JINJA, ollama_way, without_harm
from macft.weights.adapters.fitting import tokenizer_folder
from macft.weights.adapters.peft import Adapter
from macft.weights.folder import ModelFolder

# Ollama sends its own defaults (temperature 0.8, top_k 40 ...) with every request, and llama.cpp then leaves
# general.sampling.* unread: what the model's makers recommend takes effect only as a PARAMETER.
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.penalty_last_n": "repeat_last_n",
}
_END_IDS = ("eos", "eot", "eom")
# [host/][namespace/]model[:tag]
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:[A-Za-z0-9_][\w.:-]*/)?(?:[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?", re.ASCII)


def default_name(model: ModelFolder, adapters: Sequence[Adapter]) -> str:
    """A name that Ollama accepts, from the model's and the last adapter's."""
    own = model.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    parts = [own, *(adapter.folder.absolute().name for adapter in adapters[-1:])]
    return _file_stem("-".join(parts)).lower()


def check_name(name: str) -> None:
    """UsageError for a name that Ollama would refuse, but only after the upload."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: Ollama does not accept this name; write [namespace/]model[:tag], each at most 80 "
            "letters, digits, '_', '-' and '.', a letter or digit first"
        )


def export_ollama(
    model: ModelFolder,
    adapters: Sequence[Adapter],
    output: Path,
    *,
    name: str,
    quant: str,
    template: ChatTemplate,
    system: str | None = None,
    check: Callable[[Path, Path], Mapping[str, Any]] | None = None,
    in_llama_cpp: bool = False,
) -> OllamaReport:
    """Write the GGUF, a Modelfile and the report as the new folder `output`, completely or not at all.

    `template` is the one trained with: it is embedded in the GGUF, and if a Go template is proven equal to it,
    that becomes Ollama's TEMPLATE. The only SYSTEM is `system`: a system text that the template brings itself is
    inside both, and one it does not bring was not trained with. `check` gets the path of the finished GGUF and the
    one it will have; its result goes into the report, its errors leave no folder behind. With `in_llama_cpp` prompts
    that Ollama leaves to llama.cpp are compared there. num_ctx is left to the user: Ollama picks it by the available
    memory, and the length trained with (`cutoff_len`) does not bound the model.

    Raises UsageError for a name Ollama refuses, an existing output or a system text that the template cannot hold.
    """
    check_name(name)
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output}: exists already; name a folder that does not, or remove this one")
    template = without_swallowed_space(template, tokenizer_folder(model.path, adapters))
    # padded also where there will be a TEMPLATE: the stop parameters of a template that Ollama detects would stay
    embedded = pad_template(pin_variables(template))
    read, notes = read_gguf_model(model, adapters, template=embedded, quants=[quant])
    bos = bos_text(read.fields)
    proof, way = _proof_and_way(read, template, bos)
    if system and not proof.takes_system:
        raise UsageError(f"--system: {template.name} takes no system message, so it would not reach the model")
    file = f"{_file_stem(name)}-{quant}.gguf"
    further, hidden = further_ends(read.fields)
    notes += [_hidden_note(hidden)] if hidden else []
    stops = dict.fromkeys([*needed_stops(proof, end_texts(read.fields)), *further])
    parameters = [("stop", stop) for stop in stops]
    request = ModelRequest(
        name=name,
        template=proof.go,
        system=system or None,
        parameters=(*parameters, *sampling_parameters(read.fields)),
        requires=REQUIRES if proof.go is None else None,
    )
    has_choice = way == GO and bool(proof.excluded)
    texts = {MODELFILE: modelfile(f"./{file}", request)}
    if has_choice:
        texts[MODELFILE_JINJA] = modelfile(f"./{file}", replace(request, template=None, requires=REQUIRES))
    with _new_folder(output) as folder:
        broken = if_not_finite(model, adapters)
        [gguf] = write_gguf(read, {quant: folder / file}, if_not_finite=broken, name=str(output / file))
        found = check(folder / file, output / file) if check is not None else {}
        native = None
        if in_llama_cpp and (way == JINJA or has_choice):
            native = prove_native(folder / file, template, bos=bos, name=output / file)
        for modelfile_name, text in texts.items():
            write_text(folder / modelfile_name, text)
        gguf = replace(gguf, path=output / file)
        report = OllamaReport(output, name, gguf, request, proof, way, native, has_choice, tuple(notes), found)
        write_json(folder / REPORT, as_json(report))
        write_text(folder / REPORT_TEXT, "\n".join(report_lines(report)) + "\n")
    return report


def _proof_and_way(read: GgufModel, template: ChatTemplate, bos: str | None) -> tuple[Proof, str]:
    """(The proof, with no TEMPLATE that would take the place of something better, and the way that Ollama takes.)"""
    proof = prove_template(template, bos=bos)
    embedded = str(read.fields["tokenizer.chat_template"])
    proof = without_harm(proof, ollama_way(read.architecture, embedded, proof.go))
    return proof, ollama_way(read.architecture, embedded, proof.go)


def bos_text(fields: Mapping[str, Field]) -> str | None:
    """The text of the token that llama.cpp puts before every prompt, or None when it puts none."""
    adds = fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.model") == "llama")
    return _token(fields, fields.get("tokenizer.ggml.bos_token_id")) if adds else None


def end_texts(fields: Mapping[str, Field]) -> tuple[str, ...]:
    """The texts of the tokens that the file names as ends of an answer, at which llama.cpp stops by itself."""
    found = [_token(fields, fields.get(f"tokenizer.ggml.{kind}_token_id")) for kind in _END_IDS]
    return tuple(dict.fromkeys(text for text in found if text is not None))


def further_ends(fields: Mapping[str, Field]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(Texts of ends that the model's settings name and at which llama.cpp does not stop; those that it hides.)

    A GGUF file has a place for three. A `stop` is a text that is looked for in the answer, in which llama.cpp does not
    write control tokens.
    """
    listed = fields.get("tokenizer.ggml.eos_token_ids")
    known = {*end_texts(fields), *ENDS_BY_TEXT}
    ids = [int(id_) for id_ in listed] if isinstance(listed, np.ndarray) else []
    kinds = fields.get("tokenizer.ggml.token_type")
    further = {text: id_ for id_ in ids if (text := _token(fields, id_)) is not None and text not in known}
    hidden = [
        text for text, id_ in further.items() if isinstance(kinds, np.ndarray) and kinds[id_] == TokenType.CONTROL
    ]
    return tuple(further), tuple(hidden)


def _hidden_note(texts: Sequence[str]) -> str:
    return (
        f"generation_config.json also ends answers at {', '.join(texts)}, for which a GGUF file has no place. Ollama "
        f"older than {REQUIRES} stops there by PARAMETER stop; newer ones do not, as llama.cpp hides these tokens"
    )


def sampling_parameters(fields: Mapping[str, Field]) -> tuple[Parameter, ...]:
    """The sampling settings of the model's generation_config.json, as Ollama names them."""
    found: list[Parameter] = []
    for key, name in _SAMPLING.items():
        value = fields.get(key)
        if value is not None:
            assert isinstance(value, int | float | np.generic), key
            number = value.item() if isinstance(value, np.generic) else value
            found.append((name, number if isinstance(number, int) else _short_float(float(number))))
    return tuple(found)


def _token(fields: Mapping[str, Field], place: Field | None) -> str | None:
    tokens = fields.get("tokenizer.ggml.tokens")
    return tokens[int(place)] if isinstance(tokens, list) and isinstance(place, int | np.integer) else None


def _short_float(value: float) -> float:
    """0.7 for the float32 nearest to it, which is 0.699999988079071."""
    return float(f"{value:.7g}")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """`new_dir`, with no parent folder left behind, and one line for what the system refuses."""
    try:
        with new_parents([output]), new_dir(output) as folder:
            yield folder
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{output}: cannot be written: {reason}; name a folder that can") from None


def _file_stem(name: str) -> str:
    """A file name that needs no quotes in a Modelfile or a shell, without the namespace but with the tag."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2]).strip(".-_")
    return stem or "model"
