"""What a look at a data set has found in; text for a terminal or JSON, with the place of each, out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from macft.text import plural

# places of one kind that are shown
_SHOWN = 10

Level = Literal["problem", "left out", "note"]
# kinds of findings in the order they are told -> how bad they are, and what is said of it
KINDS: dict[str, tuple[Level, str]] = {
    "unreadable": ("problem", "cannot be read"),
    "refused": ("problem", "cannot be trained on"),
    "left out": ("left out", "left out of training"),
    "answer cut": ("note", "an answer loses its end to fit cutoff_len"),
    "shortened": ("note", "user text is lost to fit cutoff_len"),
    "empty": ("note", "an empty question or answer"),
    "order": ("note", "roles in an unusual order"),
    "placeholder": ("note", "a placeholder, which the model would learn to say"),
    "special token": ("note", "special tokens in the text, which stay special"),
    "identical": ("note", "the same tokens on both sides, which show no preference"),
    "contradiction": ("note", "the answer that an earlier pair rejects is preferred"),
    "duplicate": ("note", "repeats an earlier row"),
    "same prompt": ("note", "asks what an earlier row asks, with another answer"),
    "evaluation": ("note", "evaluated on and trained on"),
    "evaluation prompt": ("note", "evaluated on with a prompt that is trained on"),
    "boundary_tokens": ("note", "a token on the border of an answer"),
}


@dataclass(frozen=True)
class Finding:
    """`source`: where, as file:row; `detail`: what exactly."""

    kind: str
    source: str
    detail: str

    @property
    def level(self) -> Level:
        """problem: training refuses the data; left out: it goes on without the row; note: worth a look."""
        return KINDS[self.kind][0]


@dataclass
class Check:
    """What was found in so many rows."""

    noun: str
    rows: int = 0
    held_out: int = 0  # rows of the evaluation set
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether training takes every row."""
        return all(finding.level == "note" for finding in self.findings)


def as_json(report: Check) -> dict[str, Any]:
    """Counts, and every finding."""
    levels = [finding.level for finding in report.findings]
    return {
        "rows": report.rows,
        "evaluation_rows": report.held_out,
        "sound": report.is_sound,
        "problems": levels.count("problem"),
        "left_out": levels.count("left out"),
        "findings": [asdict(finding) | {"level": finding.level} for finding in report.findings],
    }


def show(report: Check, console: Console) -> None:
    """Print the findings by kind, the worst first, with the first places of each."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    styles = {"problem": "bold red", "left out": "bold yellow", "note": "bold"}
    for kind, (level, what) in KINDS.items():
        found = [finding for finding in report.findings if finding.kind == kind]
        if not found:
            continue
        places = len({finding.source for finding in found})
        line(f"{level}: {what} ({plural(places, report.noun)})", styles[level])
        for finding in found[:_SHOWN]:
            line(f"  {finding.source}{': ' if finding.detail else ''}{finding.detail}")
        if len(found) > _SHOWN:
            line(f"  ... and {len(found) - _SHOWN} more")
    of_them = f", {report.held_out} of the evaluation" if report.held_out else ""
    line(f"{plural(report.rows, report.noun)}{of_them}: {_summary(report)}")


def _summary(report: Check) -> str:
    counts = []
    for level, what in (("problem", "invalid"), ("left out", "left out in training"), ("note", "worth a look")):
        places = len({finding.source for finding in report.findings if finding.level == level})
        if places:
            counts.append(f"{places} {what}")
    return ", ".join(counts) or "nothing found"
