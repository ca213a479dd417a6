"""Define `macft doctor`."""

from __future__ import annotations

import json

import click

from macft.commands.options import json_option


@click.command()
@json_option
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
