"""Draw the logged metrics of a run, and the betas of its pairs, into PNG pictures beside the log."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from macft.files import write_bytes
from macft.text import plural
from macft.training.log.report import read_log

Curve = tuple[list[int], list[float]]  # steps, values

_BLUE, _RED, _AMBER, _BROWN = "#2563eb", "#dc2626", "#f59e0b", "#92400e"
_GRID = "#e5e7eb"
_TEXT = "#374151"


@dataclass(frozen=True)
class _Picture:
    """Metrics that share one picture; `zero` draws a line at 0, which they should leave."""

    name: str
    title: str
    keys: tuple[str, ...]
    zero: bool = False
    share: bool = False  # values between 0 and 1

    @property
    def file(self) -> str:
        """Its name in the run folder."""
        return f"training_{self.name}.png"


_LOSS = _Picture("loss", "Training loss", ("loss",))
_PREFERENCE = (
    _Picture("rewards_accuracies", "Reward accuracy: pairs that chosen wins", ("rewards/accuracies",), share=True),
    _Picture("rewards_margins", "Reward margin: chosen minus rejected", ("rewards/margins",), zero=True),
    _Picture("rewards", "Rewards", ("rewards/chosen", "rewards/rejected"), zero=True),
    _Picture("logps", "Log-probability of the answers", ("logps/chosen", "logps/rejected")),
    _Picture("sft_loss", "Loss on the chosen answers", ("sft_loss",)),
    _Picture("odds_ratio_loss", "Odds ratio loss", ("odds_ratio_loss",)),
    _Picture("kl", "KTO: KL term", ("kl",)),
    _Picture("dynamic_beta", "FooDPO: mean beta of the pairs", ("dynamic_beta",)),
    _Picture("prompt_perplexity", "FooDPO: mean perplexity of the prompts", ("prompt_perplexity",)),
)
_DISTRIBUTION = "foodpo_distribution.png"

# Every picture that a run may leave.
PICTURES = (*(picture.file for picture in (_LOSS, *_PREFERENCE)), _DISTRIBUTION)


def plot_loss(output_dir: Path) -> Path | None:
    """Draw loss, smoothed loss and evaluation loss over steps into training_loss.png.

    Returns the picture's path, or None when nothing was logged.
    """
    return _plot(output_dir, read_log(output_dir), _LOSS)


def plot_metrics(output_dir: Path) -> list[Path]:
    """Draw the metrics of a preference run that its log holds, each into training_NAME.png; returns the paths."""
    rows = read_log(output_dir)
    paths = [_plot(output_dir, rows, picture) for picture in _PREFERENCE]
    return [path for path in paths if path is not None]


def plot_distribution(output_dir: Path, betas: np.ndarray, log_perplexities: np.ndarray, note: str) -> Path:
    """Draw how beta and the prompt's perplexity spread over the pairs into foodpo_distribution.png.

    `betas` and `log_perplexities` are float [pairs]; pairs whose perplexity is nan are left out and counted.
    `note`, which stands above both, says whose perplexities they are.
    """
    figure, draw = _figure(width=10)
    figure.suptitle(note, color=_TEXT, fontsize=11)
    left, right = figure.subplots(1, 2)
    _histogram(left, betas, "FooDPO: beta of each pair", "beta", _BLUE, is_log=False)
    with np.errstate(over="ignore"):
        perplexities = np.exp(np.asarray(log_perplexities, dtype=np.float64))
    _histogram(right, perplexities, "FooDPO: perplexity of each prompt", "perplexity", _AMBER, is_log=True)
    path = output_dir / _DISTRIBUTION
    write_bytes(path, draw())
    return path


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average that smooths harder the longer the curve: weight 0.9 tanh(n / 40).

    The same curve as LLaMA-Factory draws (its weight is 1.8 (sigmoid(0.05 n) - 0.5)).
    """
    weight = 0.9 * math.tanh(len(values) / 40)
    smoothed: list[float] = []
    for value in values:
        before = smoothed[-1] if smoothed else value
        smoothed.append(weight * before + (1 - weight) * value)
    return smoothed


def _plot(output_dir: Path, rows: Sequence[dict[str, Any]], picture: _Picture) -> Path | None:
    curves = {key: (_curve(rows, key), _curve(rows, f"eval_{key}")) for key in picture.keys}
    curves = {key: pair for key, pair in curves.items() if pair[0][0] or pair[1][0]}
    if not curves:
        return None
    path = output_dir / picture.file
    write_bytes(path, _draw(picture, curves))
    return path


def _curve(rows: Sequence[dict[str, Any]], key: str) -> Curve:
    points = [(row["current_steps"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    return [step for step, _ in points], [value for _, value in points]


def _draw(picture: _Picture, curves: dict[str, tuple[Curve, Curve]]) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure, draw = _figure(width=8)
    axes = figure.add_subplot()
    if picture.zero:
        axes.axhline(0, color="#9ca3af", linewidth=1)
    # evaluation in red beside a single blue curve; of two, each in the darker shade of its own
    colors = [(_BLUE, _RED)] if len(curves) == 1 else [(_BLUE, "#1e3a8a"), (_AMBER, _BROWN)]
    for (key, (curve, held_out)), (color, held_out_color) in zip(curves.items(), colors, strict=False):
        steps, values = curve
        few = "o" if len(steps) == 1 else ""
        if steps:
            axes.plot(steps, values, color=color, alpha=0.45, linewidth=1, marker=few, label=key)
        if len(steps) > 2:
            axes.plot(steps, smooth(values), color=color, linewidth=2.2, label=f"{key}, smoothed")
        if held_out[0]:
            label = f"eval_{key}"
            axes.plot(*held_out, color=held_out_color, linewidth=1.4, marker="o", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(next(iter(curves)) if len(curves) == 1 else picture.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if picture.share:
        axes.set_ylim(-0.03, 1.03)
    _dress(axes, picture.title)
    axes.legend(frameon=False)
    return draw()


def _histogram(axes: Any, values: np.ndarray, title: str, name: str, color: str, *, is_log: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    finite = values[np.isfinite(values)]
    left_out = len(values) - len(finite)
    count = plural(len(finite), "pair") + (f", {left_out} without" if left_out else "")
    axes.set_xlabel(f"{name} ({count})")
    axes.set_ylabel("pairs")
    _dress(axes, title)
    if not len(finite):
        return
    axes.hist(finite, bins=_edges(finite, is_log=is_log), color=color, alpha=0.55, edgecolor="white", linewidth=0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if is_log:
        _scale_by_factors(axes, finite)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.axvline(finite.mean(), color=_RED, linewidth=1.8, label=f"mean {finite.mean():.4g}")
    for percent, style in ((5, ":"), (50, "--"), (95, ":")):
        value = float(np.percentile(finite, percent))
        axes.axvline(value, color=_TEXT, linewidth=1.3, linestyle=style, label=f"{percent} % {value:.4g}")
    # the frame hides the lines behind it
    axes.legend(framealpha=1, edgecolor="white")


def _scale_by_factors(axes: Any, values: np.ndarray) -> None:
    """A logarithmic axis with plain numbers on it: 1, 2, 5, 10, or only powers of ten over a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    is_wide = values.max() > 1000 * values.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _edges(values: np.ndarray, *, is_log: bool) -> np.ndarray:
    """Edges of up to 40 bins; values that are all the same lie in the middle one of five."""
    low, high = float(values.min()), float(values.max())
    bins = int(np.clip(2 * np.sqrt(len(values)), 5, 40))
    if high - low <= 1e-6 * abs(high):
        low, high, bins = low - 0.1 * abs(low), high + 0.1 * abs(high), 5
    return np.geomspace(low, high, bins + 1) if is_log else np.linspace(low, high, bins + 1)


def _figure(width: float) -> tuple[Any, Callable[[], bytes]]:
    """An empty figure, and the function that turns it into the bytes of a PNG."""
    # matplotlib announces the building of its font cache as a warning
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)

    def draw() -> bytes:
        buffer = io.BytesIO()
        canvas.print_png(buffer)
        return buffer.getvalue()

    return figure, draw


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
