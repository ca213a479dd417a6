"""Show the answers of several models to the same prompts side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NARROWEST_COLUMN = 20


def compare(prompts: Sequence[str], answers: Mapping[str, Sequence[str]], console: Console) -> None:
    """Show one row per prompt and one column per model; a console too narrow for that gets a list.

    `answers` maps a model's label to its answers, in the order of `prompts`.
    """
    if console.width >= max(80, (_NARROWEST_COLUMN + 3) * (len(answers) + 1)):
        console.print(_table(prompts, answers, drawn=console.is_terminal))
        return
    for line in _listing(prompts, answers):
        console.print(line, soft_wrap=True)


def as_json(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[dict[str, object]]:
    """The same for programs: one object per prompt, answers under their model's label."""
    return [
        {"prompt": prompt, "answers": {label: given[index] for label, given in answers.items()}}
        for index, prompt in enumerate(prompts)
    ]


def _table(prompts: Sequence[str], answers: Mapping[str, Sequence[str]], *, drawn: bool) -> Table:
    look = box.ROUNDED if drawn else box.ASCII
    table = Table(box=look, show_lines=True, expand=True, header_style="bold" if drawn else "")
    table.add_column("prompt", ratio=2, overflow="fold")
    for label in answers:
        table.add_column(Text(label), ratio=3, overflow="fold")
    for index, prompt in enumerate(prompts):
        cells = [prompt, *(given[index] for given in answers.values())]
        # Text, so that brackets in an answer are not taken for markup
        table.add_row(*(Text(cell.strip()) for cell in cells))
    return table


def _listing(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Iterator[Text]:
    for index, prompt in enumerate(prompts):
        if index:
            yield Text("")
        yield Text(f"prompt {index + 1}: {prompt.strip()}", style="bold")
        for label, given in answers.items():
            yield Text(f"  [{label}]", style="cyan")
            for line in given[index].strip().splitlines() or [""]:
                yield Text(f"    {line}")
