"""Run the `macft` command line."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import warnings

import click

from macft import __version__
from macft.errors import MacftError, StoppedError, as_typed

# each is a module of macft.commands with a command of its name
_COMMANDS = ("chat", "compare", "config", "convert", "data", "doctor", "export", "train")


class _LazyCommands(click.Group):
    """Imports the module of a command when that command is run or its help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"macft.commands.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="macft")
def cli() -> None:
    """Fine-tune language models with LoRA on a Mac (MLX) or on NVIDIA (PyTorch) from one YAML file."""


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + as_typed(record.getMessage())


def _set_up() -> None:
    for stream in (sys.stdout, sys.stderr):
        # a terminal that lacks a character gets a question mark; what is not a text file is left as it is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("macft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # what libraries tell programmers is of no use to the user of a program
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main() -> None:
    """Run the command line; an error that the user can mend is one line and an exit code."""
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
        click.echo(f"\n{as_typed(str(error))}", err=True)
        code = error.exit_code
    except MacftError as error:
        click.echo(f"error: {as_typed(str(error))}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nstopped", err=True)
        code = 130
    except BrokenPipeError:
        # the reader left early; Python's own flush at exit must not complain about it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        click.echo(f"error: {error.filename or 'file system'}: {error.strerror or error}", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
