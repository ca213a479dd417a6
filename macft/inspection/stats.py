"""Measure how long the rows of a data set are, and what `cutoff_len` cuts from them."""

from __future__ import annotations

import heapq
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from macft.data.cache.workers import Encoder, chunks
from macft.data.formats.reader import DataRow
from macft.data.kinds import Kind
from macft.data.tokenization.table import ANSWER_CUT, EMPTIED, SHORTENED, Table
from macft.errors import DataError
from macft.files import write_bytes
from macft.text import plural

# rows measured together
_CHUNK = 1000
_UNCUT = 2**31 - 1
_LONGEST = 5
_BARS = 14
_BAR_WIDTH = 40


@dataclass
class CutCounts:
    """What one `cutoff_len` does to the rows; tokens of a pair are those of both its sides."""

    cutoff_len: int
    too_long: int = 0
    shortened: int = 0  # lost user text
    emptied: int = 0  # of those: lost all of it
    answer_cut: int = 0  # an answer lost its end
    left_out: int = 0  # nothing to train on is left
    tokens_lost: int = 0
    rows: int | None = None  # of texts: how many rows they fill


@dataclass
class Stats:
    """`lengths` int64: tokens of each row that can be trained on, of a pair those of its longer side."""

    kind: Kind
    rows: int = 0
    untrained: int = 0  # nothing to train on, whatever the cutoff_len
    tokens: int = 0
    trained_tokens: int = 0
    boundary_tokens: int = 0
    with_special: int = 0
    first_special: str = ""  # the place of the first of them
    with_tools: int = 0
    turns: Counter[int] = field(default_factory=Counter)  # answers in a row -> rows
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    longest: list[tuple[int, str]] = field(default_factory=list)  # (tokens, file:line)
    cuts: list[CutCounts] = field(default_factory=list)

    @property
    def noun(self) -> str:
        """What a row is called."""
        return self.kind.row_noun


def measure(
    rows: Iterable[DataRow],
    encoder: Encoder,
    cutoffs: Sequence[int],
    *,
    packing: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Stats:
    """Tokenize all rows, whole and at each of `cutoffs`, keeping only a few numbers per row.

    `packing` is for texts; `advance` is told how many more rows are done. Raises DataError as reading and rendering
    do, or when there are no rows.
    """
    stats = Stats(encoder.kind, cuts=[CutCounts(cutoff_len) for cutoff_len in cutoffs])
    whole, *shorter = (
        replace(encoder, encoding=replace(encoder.encoding, cutoff_len=cutoff_len)) for cutoff_len in (_UNCUT, *cutoffs)
    )
    lengths: list[np.ndarray] = []
    for chunk in chunks(rows, _CHUNK):
        table = whole(chunk)
        lengths.append(table.lengths)
        _count(stats, chunk, table)
        if not encoder.kind.fills_rows:
            for cut, encode in zip(stats.cuts, shorter, strict=True):
                _cut(cut, chunk, table, encode)
        advance(len(chunk))
    if not stats.rows:
        raise DataError("the data set holds no rows")
    every = np.concatenate(lengths)
    # rows that are left out have no tokens
    stats.lengths = every[every > 0]
    stats.longest = sorted((one for one in stats.longest if one[0]), key=lambda one: -one[0])
    if encoder.kind.fills_rows:
        for cut in stats.cuts:
            cut.too_long = int((stats.lengths > cut.cutoff_len).sum())
            filled = -(-(np.array([stats.tokens]) if packing else stats.lengths) // cut.cutoff_len)
            cut.rows = int(filled.sum())
    return stats


def _count(stats: Stats, chunk: Sequence[DataRow], table: Table) -> None:
    columns = table.columns
    stats.rows += len(chunk)
    stats.untrained += int((columns["skip_reason"] > 0).sum())
    stats.tokens += int(table.totals.sum())
    stats.trained_tokens += int(columns["trained"].sum())
    stats.boundary_tokens += int(columns["boundary_tokens"].sum())
    special = columns["special"] >= 0
    stats.with_special += int(special.sum())
    if special.any() and not stats.first_special:
        stats.first_special = chunk[int(np.argmax(special))].source
    for row, length in zip(chunk, table.lengths.tolist(), strict=True):
        if row.messages:
            stats.turns[row.answers] += 1
        stats.with_tools += row.has_tools
        if len(stats.longest) < _LONGEST:
            heapq.heappush(stats.longest, (length, row.source))
        elif length > stats.longest[0][0]:
            heapq.heapreplace(stats.longest, (length, row.source))


def _cut(cut: CutCounts, chunk: Sequence[DataRow], table: Table, encoder: Encoder) -> None:
    """Add what one cutoff_len does; only rows that are too long are tokenized again."""
    long = np.flatnonzero(table.lengths > cut.cutoff_len)
    if not len(long):
        return
    fitted = encoder([chunk[i] for i in long.tolist()])
    columns = fitted.columns
    cut.too_long += len(long)
    cut.shortened += int((columns["flags"] & SHORTENED > 0).sum())
    cut.emptied += int((columns["flags"] & EMPTIED > 0).sum())
    cut.answer_cut += int((columns["flags"] & ANSWER_CUT > 0).sum())
    cut.left_out += int((columns["skip_reason"] > 0).sum())
    cut.tokens_lost += int(table.totals[long].sum() - fitted.totals.sum())


def as_json(stats: Stats) -> dict[str, Any]:
    """All figures as JSON values."""
    value = {name: getattr(stats, name) for name in ("noun", "rows", "untrained", "tokens", "trained_tokens")}
    value |= {name: getattr(stats, name) for name in ("boundary_tokens", "with_special", "first_special", "with_tools")}
    return value | {
        "turns": {str(answers): count for answers, count in sorted(stats.turns.items())},
        "length": _summary(stats.lengths),
        "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in histogram(stats.lengths)],
        "longest": [{"tokens": tokens, "source": source} for tokens, source in stats.longest],
        "cutoffs": [asdict(cut) for cut in stats.cuts],
    }


def _summary(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    middle, high = np.percentile(lengths, (50, 95))
    return {"mean": float(lengths.mean()), "median": float(middle), "95 %": float(high), "max": int(lengths.max())}


def histogram(lengths: np.ndarray) -> list[tuple[int, int | None, int]]:
    """(first length, last length, rows) of each bar; the last bar may have no end, and holds the few longest rows."""
    if not len(lengths):
        return []
    # the few longest would press all others into one bar
    most = max(1, int(np.percentile(lengths, 99)))
    width = 1 << max(0, int(np.ceil(np.log2(most / _BARS))))
    first = int(lengths.min()) // width
    last = max(first, most // width)
    counts = np.bincount(np.minimum(lengths // width, last + 1), minlength=last + 2)
    bars: list[tuple[int, int | None, int]] = [
        (i * width, (i + 1) * width - 1, int(counts[i])) for i in range(first, last + 1)
    ]
    return [*bars, ((last + 1) * width, None, int(counts[last + 1]))] if counts[last + 1] else bars


def show(stats: Stats, cutoff_len: int, console: Console) -> None:
    """Print the figures, the lengths as bars (red where longer than `cutoff_len`), and what each cutoff cuts."""
    for name, text in _facts(stats):
        console.print(Text(f"{name:<16}{text}"), soft_wrap=True, highlight=False)
    _show_bars(stats, cutoff_len, console)
    _show_cuts(stats, cutoff_len, console)
    longest = ", ".join(f"{source} ({tokens:,})" for tokens, source in stats.longest)
    console.print(Text(f"longest: {longest or 'none'}"), soft_wrap=True, highlight=False)


def _facts(stats: Stats) -> Iterator[tuple[str, str]]:
    noun, length = stats.noun, _summary(stats.lengths)
    untrained = f", {stats.untrained:,} of them with nothing to train on" if stats.untrained else ""
    yield f"{noun}s", f"{stats.rows:,}{untrained}"
    if length:
        yield "tokens", f"{stats.tokens:,}"
        yield "trained", f"{stats.trained_tokens:,} ({stats.trained_tokens / stats.tokens:.1%})"
        of = f"a {noun}" if stats.kind.width == 1 else f"the longer side of a {noun}"
        shown = f"{length['mean']:.1f} on average, median {length['median']:.0f}, 95 % up to {length['95 %']:.0f}"
        yield "length", f"{of} has {shown}, the longest {length['max']:,}"
    if stats.turns:
        turns = sorted(stats.turns.items())
        more = sum(count for _, count in turns[4:])
        parts = [f"{answers} in {plural(count, noun)}" for answers, count in turns[:4]]
        yield "answers", ", ".join([*parts, *([f"more in {plural(more, noun)}"] if more else [])])
    if stats.with_tools:
        yield "tools", f"in {plural(stats.with_tools, noun)}"
    first = f" (first: {stats.first_special})" if stats.with_special else ""
    yield "special tokens", f"typed in the text of {plural(stats.with_special, noun)}{first}"
    if not stats.kind.fills_rows:
        yield "boundary tokens", f"{plural(stats.boundary_tokens, 'token')} on the border of an answer"


def _show_bars(stats: Stats, cutoff_len: int, console: Console) -> None:
    bars = histogram(stats.lengths)
    if not bars:
        return
    most = max(count for *_, count in bars)
    names = [f"{low}-{high}" if high is not None else f"{low} and more" for low, high, _ in bars]
    margin, numbers = max(map(len, names)), max(len(str(count)) for *_, count in bars)
    console.print(Text(f"\ntokens of a {stats.noun}"), highlight=False)
    for name, (low, _, count) in zip(names, bars, strict=True):
        filled = max(int(count > 0), round(_BAR_WIDTH * count / most))
        line = Text(f"{name:>{margin}}  {count:>{numbers}} ")
        line.append("█" * filled, style="red" if low >= cutoff_len else "blue")
        console.print(line, soft_wrap=True, highlight=False)
    console.print()


def _show_cuts(stats: Stats, cutoff_len: int, console: Console) -> None:
    grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names: tuple[str, ...]
    figures: list[tuple[int | None, ...]]
    if stats.kind.fills_rows:
        names = ("cutoff_len", "rows to train on", f"{stats.noun}s longer than a row")
        figures = [(cut.rows, cut.too_long) for cut in stats.cuts]
    else:
        names = ("cutoff_len", "too long", "user text cut", "all of it", "answer cut", "left out", "tokens lost")
        figures = [(c.too_long, c.shortened, c.emptied, c.answer_cut, c.left_out, c.tokens_lost) for c in stats.cuts]
    for name in names:
        grid.add_column(name, justify="right")
    for cut, values in zip(stats.cuts, figures, strict=True):
        style = "bold" if cut.cutoff_len == cutoff_len else None
        grid.add_row(str(cut.cutoff_len), *(f"{value:,}" for value in values), style=style)
    console.print(grid, highlight=False)
    console.print()


def plot(stats: Stats, cutoff_len: int, path: Path) -> None:
    """Draw the lengths as bars, with lines at the median and `cutoff_len`, into a PNG."""
    # matplotlib announces the building of its font cache as a warning
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = stats.lengths
    if len(lengths):
        axes.hist(lengths, bins=int(np.clip(2 * np.sqrt(len(lengths)), 5, 40)), color="#2563eb", alpha=0.55)
        axes.axvline(float(np.median(lengths)), color="#374151", linestyle="--", label=f"median {np.median(lengths):g}")
        # a cutoff_len far beyond all rows would press them together
        if cutoff_len <= 2 * lengths.max():
            axes.axvline(cutoff_len, color="#dc2626", linewidth=1.8, label=f"cutoff_len {cutoff_len}")
        axes.legend(frameon=False)
    axes.set_title(f"Tokens of {plural(len(lengths), stats.noun)}", loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{stats.noun}s")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_bytes(path, buffer.getvalue())
