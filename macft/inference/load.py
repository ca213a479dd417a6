"""Load a model, with an adapter on it, so that it is ready to answer."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from macft.backends import load_model
from macft.backends.adapters import can_be_attached, check_base, spec_of_adapter
from macft.backends.base import Model, ModelSpec
from macft.conversion.merged import export_merged
from macft.data.templates.chat_template import (
    Message,
    has_template,
    load_template,
    template_end_ids,
    template_folder,
)
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ConfigError, ModelError
from macft.files import cache_dir
from macft.inference.chat import ChatModel, FittedPrompt, answer, prompt_ids
from macft.models.locate import resolve_adapter, resolve_model
from macft.process_group import ONE_PROCESS
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.fitting import read_on
from macft.weights.adapters.peft import Adapter, naming_adapter
from macft.weights.folder import ModelFolder
from macft.weights.model_config import embedding_rows, read_config

logger = logging.getLogger("macft")


@dataclass(frozen=True)
class ChatOptions:
    """How to load a model to talk to."""

    backend: str = "auto"
    template: str | None = None  # None: the adapter's, or the model's own
    raw: bool = False  # no template
    quantization_bit: int | None = None  # None: as the adapter's run had it


def load_chat_model(model: str, adapter: str | None, options: ChatOptions) -> ChatModel:
    """Load a base model, with an adapter if one is named, and the template it is prompted with."""
    base = resolve_model(model)
    trained = _read_adapter(adapter, base) if adapter is not None else None
    return _chat_model(base, trained, options, options.quantization_bit or _trained_bits(trained))


def compare_answers(
    model: str,
    adapters: Sequence[str],
    conversations: Sequence[list[Message]],
    options: ChatOptions,
    *,
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """Answer greedily with only the base and with each adapter; returns answers under the labels to show.

    One model is in memory at a time. The base is quantized as for the first adapter.
    """
    base = resolve_model(model)
    # a problem of an adapter shows before the base has answered, which takes a while
    read = {name: _read_adapter(name, base) for name in adapters}
    answers: dict[str, list[str]] = {}
    for adapter in (None, *adapters):
        trained = read[adapter] if adapter is not None else None
        bits = options.quantization_bit or _trained_bits(trained or next(iter(read.values()), None))
        chat = replace(_chat_model(base, trained, options, bits), max_new_tokens=max_new_tokens)
        label = model if adapter is None else f"+ {adapter}"
        logger.info("answering with %s", model if adapter is None else f"{adapter} on {model}")
        answers[label] = [_answer(chat, messages) for messages in conversations]
        # the next one may need all of the memory
        del chat
        gc.collect()
    return answers


def _answer(chat: ChatModel, messages: list[Message]) -> str:
    return "".join(answer(chat, FittedPrompt(prompt_ids(chat, messages), chat.max_new_tokens, dropped=0)))


def _read_adapter(name: str, base: ModelFolder) -> Adapter:
    adapter = read_on(resolve_adapter(name), base.path)
    check_base(adapter, base)
    return adapter


def _trained_bits(adapter: Adapter | None) -> int | None:
    """The `quantization_bit` of the run that an adapter, or a checkpoint of it, is from; None where no run is found."""
    if adapter is None:
        return None
    folder = adapter.folder.parent if adapter.folder.name.startswith("checkpoint-") else adapter.folder
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    bits = settings.get("quantization_bit") if isinstance(settings, dict) else None
    if bits not in (4, 8):
        return None
    logger.info("%s was trained on a base of %d bits: so is this one", adapter.folder, bits)
    return int(bits)


def _chat_model(base: ModelFolder, adapter: Adapter | None, options: ChatOptions, bits: int | None) -> ChatModel:
    source = template_folder(base.path, adapter.folder if adapter is not None else None)
    if not options.raw and options.template is None and not has_template(source):
        raise ModelError(
            f"{base.name}: no chat template; give a Jinja file or a name as --template, or continue text as it is "
            "with macft chat --raw"
        )
    with _mergeable(base, adapter) as (merged, attached):
        tokenizer = load_tokenizer(merged.path)
        chat_template = None
        if not options.raw:
            special, opening = tokenizer.special_map, tokenizer.opening
            chat_template = load_template(source, special, options.template, opening=opening)
        stop_ids = tokenizer.eos_ids
        if chat_template is not None:
            stop_ids = stop_ids | template_end_ids(chat_template, tokenizer)
        config = read_config(merged.path)
        length = config.get("max_position_embeddings")
        return ChatModel(
            model=_load_with_adapter(merged, attached, options.backend, bits),
            tokenizer=tokenizer,
            template=chat_template,
            stop_ids=stop_ids,
            context_length=length if isinstance(length, int) else None,
            embedding_rows=embedding_rows(config),
        )


@contextmanager
def _mergeable(base: ModelFolder, adapter: Adapter | None) -> Iterator[tuple[ModelFolder, Adapter | None]]:
    """The model and adapter to load: those given, or for an adapter that no engine can attach a merged model."""
    if adapter is None or can_be_attached(adapter):
        yield base, adapter
        return
    cache_dir().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="merged-", dir=cache_dir(), ignore_cleanup_errors=True) as folder:
        logger.info("no engine can attach all of %s: it is merged into %s for this session", adapter.folder, base.name)
        said = other_base_note(adapter, base)  # by check_base, when the adapter was read
        for note in export_merged(base, [adapter], Path(folder) / "model").notes:
            if note != said:
                logger.warning("%s", note)
        yield replace(base, path=Path(folder) / "model"), None


def _load_with_adapter(base: ModelFolder, adapter: Adapter | None, backend: str, bits: int | None) -> Model:
    spec = ModelSpec(folder=base.path, lora=None, quantization_bit=bits)
    if adapter is None:
        return load_model(backend, spec, None, ONE_PROCESS)
    with naming_adapter(adapter, base.name, ConfigError):
        model = load_model(backend, replace(spec, lora=spec_of_adapter(adapter)), None, ONE_PROCESS)
    with naming_adapter(adapter, base.name, ModelError):
        model.set_trained_state(adapter.state)
    return model
