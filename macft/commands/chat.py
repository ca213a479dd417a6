"""Define `macft chat`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from macft.commands.options import answer_options
from macft.errors import UsageError


@click.command()
@click.argument("model")
@click.option("--adapter", metavar="DIR", help="A PEFT or mlx-lm adapter folder.")
@click.option("--prompt", metavar="TEXT", help="Answer this and leave.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Answer each line of a file and leave.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="No chat template: continue the text as it is.")
@answer_options
# named as the fields of `Sampling`
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: no limit.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def chat(
    model: str,
    adapter: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    backend: str,
    template: str | None,
    quantization_bit: int | None,
    max_new_tokens: int,
    **sampling: Any,
) -> None:
    """Talk to MODEL: `smollm2-135m`, a hub id, a folder or a .gguf file."""
    from macft.api.models import load_model
    from macft.backends.base import Sampling
    from macft.inference.chat import answer_prompts, chat_loop
    from macft.inference.prompts import read_prompts, user_turn, with_system

    if raw and (system is not None or template is not None):
        raise UsageError("--raw uses no chat template, so --system and --template have no effect; drop one")
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other; keep one")
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty; give the text to answer")
    conversations = None
    if prompt is not None:
        conversations = [user_turn(prompt)]
    elif prompt_file is not None:
        conversations = read_prompts(prompt_file)
    loaded = load_model(
        model, adapter=adapter, backend=backend, template=template, raw=raw, quantization_bit=quantization_bit
    )
    chat_model = replace(loaded.chat, sampling=Sampling(**sampling), max_new_tokens=max_new_tokens)
    if conversations is not None:
        conversations = [with_system(messages, system) for messages in conversations]
        answer_prompts(chat_model, conversations, sys.stdout, sys.stderr)
    else:
        chat_loop(chat_model, system=system, source=sys.stdin, out=sys.stdout, notes=sys.stderr)
