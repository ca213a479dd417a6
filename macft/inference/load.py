"""Load a model, with an adapter on it, so that it is ready to answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from macft.backends import load_model
from macft.backends.adapters import spec_of_adapter, warn_of_other_base
from macft.backends.base import Model, ModelSpec
from macft.data.templates.chat_template import Message, load_template, template_end_ids, template_folder
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import ConfigError, ModelError
from macft.inference.chat import ChatModel, FittedPrompt, answer, prompt_ids
from macft.models.locate import resolve_adapter, resolve_model
from macft.process_group import ONE_PROCESS
from macft.weights.adapters.formats import read_any_adapter
from macft.weights.adapters.peft import Adapter, naming_adapter
from macft.weights.folder import ModelFolder
from macft.weights.model_config import embedding_rows, read_config

logger = logging.getLogger("macft")


def load_chat_model(
    model: str, adapter: str | None, *, backend_name: str, template: str | None, raw: bool = False
) -> ChatModel:
    """Load a base model, with an adapter if one is named, and the template it is prompted with.

    The adapter's template comes before the model's own; `template` names another; `raw` uses none.
    """
    base = resolve_model(model)
    trained = read_any_adapter(resolve_adapter(adapter), read_config(base.path)) if adapter is not None else None
    tokenizer = load_tokenizer(base.path)
    chat_template = None
    if not raw:
        source = template_folder(base.path, trained.folder if trained is not None else None)
        chat_template = load_template(source, tokenizer.special_map, template, opening=tokenizer.opening)
    stop_ids = tokenizer.eos_ids
    if chat_template is not None:
        stop_ids = stop_ids | template_end_ids(chat_template, tokenizer)
    config = read_config(base.path)
    length = config.get("max_position_embeddings")
    return ChatModel(
        model=_load_with_adapter(base, trained, backend_name),
        tokenizer=tokenizer,
        template=chat_template,
        stop_ids=stop_ids,
        context_length=length if isinstance(length, int) else None,
        embedding_rows=embedding_rows(config),
    )


def compare_answers(
    model: str,
    adapters: Sequence[str],
    conversations: Sequence[list[Message]],
    *,
    backend_name: str,
    template: str | None,
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """Answer greedily with only the base and with each adapter; returns answers under the labels to show."""
    base_config = read_config(resolve_model(model).path)
    for folder in adapters:
        # a problem shows before the base has answered, which takes a while
        read_any_adapter(resolve_adapter(folder), base_config)
    answers: dict[str, list[str]] = {}
    for adapter in (None, *adapters):
        chat = load_chat_model(model, adapter, backend_name=backend_name, template=template)
        chat = replace(chat, max_new_tokens=max_new_tokens)
        label = model if adapter is None else f"+ {adapter}"
        logger.info("answering with %s", model if adapter is None else f"{adapter} on {model}")
        answers[label] = [_answer(chat, messages) for messages in conversations]
    return answers


def _answer(chat: ChatModel, messages: list[Message]) -> str:
    return "".join(answer(chat, FittedPrompt(prompt_ids(chat, messages), chat.max_new_tokens, dropped=0)))


def _load_with_adapter(base: ModelFolder, adapter: Adapter | None, backend: str) -> Model:
    if adapter is None:
        return load_model(backend, ModelSpec(folder=base.path, lora=None), None, ONE_PROCESS)
    warn_of_other_base(adapter, base)
    with naming_adapter(adapter, base.name, ConfigError):
        model = load_model(backend, ModelSpec(base.path, spec_of_adapter(adapter)), None, ONE_PROCESS)
    with naming_adapter(adapter, base.name, ModelError):
        model.set_trained_state(adapter.state)
    return model
