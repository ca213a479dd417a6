"""The command line: parses, calls one function, prints its result."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from macft import __version__
from macft.commands.config import config
from macft.commands.convert import convert, export
from macft.commands.data import data
from macft.commands.export import gguf, ollama
from macft.errors import MacftError, StoppedError, UsageError

BACKEND = click.Choice(["auto", "mlx", "torch"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="macft")
def cli() -> None:
    """Fine-tune language models with LoRA on a Mac (MLX) or on NVIDIA (PyTorch) from one YAML file."""


cli.add_command(config)
cli.add_command(convert)
cli.add_command(data)
cli.add_command(export)
export.add_command(gguf)
export.add_command(ollama)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.yaml] [key=value | --key value]...")
@click.option("--backend", type=BACKEND, help="Training engine; overrides the config.")
@click.option("--dry-run", is_flag=True, help="Read all data, train two steps on the longest rows, keep nothing.")
def train(arguments: tuple[str, ...], backend: str | None, dry_run: bool) -> None:
    """Fine-tune as CONFIG.yaml says; key=value overrides a key of it."""
    from macft.config.load import load_settings
    from macft.training.run import dry_run as run_dry
    from macft.training.run import train as run

    if not arguments:
        raise UsageError("macft train wants a configuration: macft train configs/quickstart.yaml [key=value ...]")
    overrides = list(arguments)
    config = None
    if overrides and not overrides[0].startswith("--") and "=" not in overrides[0]:
        config = Path(overrides.pop(0))
    if backend is not None:
        overrides.append(f"backend={backend}")
    settings = load_settings(config, overrides)
    if dry_run:
        click.echo(run_dry(settings))
    else:
        click.echo(run(settings))


def _sampling_options(command: Any) -> Any:
    options = [
        click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: greedy."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True),
        click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: no limit."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True),
        click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _model_options(command: Any) -> Any:
    options = [
        click.option("--backend", type=BACKEND, default="auto", show_default=True),
        click.option(
            "--template",
            metavar="FILE",
            help="A Jinja chat template. Default: the adapter's, or the model's.",
        ),
        click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("model")
@click.option("--adapter", metavar="DIR", help="A PEFT or mlx-lm adapter folder.")
@click.option("--prompt", metavar="TEXT", help="Answer this and leave.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Answer each line of a file and leave.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="No chat template: continue the text as it is.")
@_model_options
@_sampling_options
def chat(
    model: str,
    adapter: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    backend: str,
    template: str | None,
    max_new_tokens: int,
    **sampling: Any,
) -> None:
    """Talk to MODEL: `smollm2-135m`, a hub id, a folder or a .gguf file."""
    from macft.backends.base import Sampling
    from macft.inference.chat import answer_prompts, chat_loop
    from macft.inference.load import load_chat_model
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
    chat_model, loaded = load_chat_model(
        model,
        adapter,
        backend_name=backend,
        template=template,
        raw=raw,
        sampling=Sampling(**sampling),
        max_new_tokens=max_new_tokens,
    )
    for note in loaded.notes:
        logging.getLogger("macft").warning(note)
    if conversations is not None:
        conversations = [with_system(messages, system) for messages in conversations]
        answer_prompts(chat_model, conversations, sys.stdout, sys.stderr)
    else:
        chat_loop(chat_model, system=system, source=sys.stdin, out=sys.stdout, notes=sys.stderr)


@cli.command()
@click.argument("model")
@click.option("--adapter", "adapters", metavar="DIR", multiple=True, help="A PEFT or mlx-lm adapter; may be repeated.")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="One prompt per line, or JSONL.")
@_model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    model: str,
    adapters: tuple[str, ...],
    prompts: Path,
    backend: str,
    template: str | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answer the same prompts with MODEL and with each adapter on it, greedily, side by side."""
    from rich.console import Console

    from macft.inference.compare import as_json as to_json
    from macft.inference.compare import compare as show
    from macft.inference.load import compare_answers
    from macft.inference.prompts import last_question, read_prompts

    conversations = read_prompts(prompts)
    answers = compare_answers(
        model, adapters, conversations, backend_name=backend, template=template, max_new_tokens=max_new_tokens
    )
    questions = [last_question(messages) for messages in conversations]
    if as_json:
        click.echo(json.dumps(to_json(questions, answers), indent=2, ensure_ascii=False))
    else:
        show(questions, answers, Console())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """What this machine has, what is missing, and how to get it."""
    from rich.console import Console

    from macft.doctor import as_json as to_json
    from macft.doctor import examine, show

    findings = examine()
    if as_json:
        click.echo(json.dumps(to_json(findings), indent=2, ensure_ascii=False))
    else:
        show(findings, Console())


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def _set_up() -> None:
    for stream in (sys.stdout, sys.stderr):
        # a terminal without a character gets a question mark; what is no text file is left as it is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("macft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # what libraries tell the authors of programs is of no use to who runs one
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main() -> None:
    """Run the command line; what goes wrong by the user's hand is one line and an exit code."""
    _set_up()
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except StoppedError as error:
        click.echo(f"\n{error}", err=True)
        code = error.exit_code
    except MacftError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nstopped", err=True)
        code = 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader left early; Python's own flush at exit must not complain of it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        else:
            click.echo(f"error: {error.filename or 'file system'}: {error.strerror or error}", err=True)
            code = 1
    sys.exit(code if isinstance(code, int) else 0)
