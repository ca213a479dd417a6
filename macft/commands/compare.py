"""Define `macft compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from macft.commands.options import answer_options, json_option


@click.command()
@click.argument("model")
@click.option("--adapter", "adapters", metavar="DIR", multiple=True, help="A PEFT or mlx-lm adapter; may be repeated.")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="One prompt per line, or JSONL.")
@answer_options
@json_option
def compare(
    model: str,
    adapters: tuple[str, ...],
    prompts: Path,
    backend: str,
    template: str | None,
    quantization_bit: int | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answer the same prompts with MODEL and with each adapter on it, greedily, side by side."""
    from rich.console import Console

    from macft.inference.compare import as_json as to_json
    from macft.inference.compare import compare as show
    from macft.inference.load import ChatOptions, compare_answers
    from macft.inference.prompts import last_question, read_prompts

    conversations = read_prompts(prompts)
    options = ChatOptions(backend, template, quantization_bit=quantization_bit)
    answers = compare_answers(model, adapters, conversations, options, max_new_tokens=max_new_tokens)
    questions = [last_question(messages) for messages in conversations]
    if as_json:
        click.echo(json.dumps(to_json(questions, answers), indent=2, ensure_ascii=False))
    else:
        show(questions, answers, Console())
