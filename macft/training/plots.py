"""A run's trainer_log.jsonl goes in; PNG curves beside it come out."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from macft.files import write_bytes
from macft.training.report import read_log

Curve = tuple[list[int], list[float]]  # steps, values

_COLOUR = "#2563eb"
_EVAL_COLOUR = "#dc2626"


def plot_loss(output_dir: Path) -> Path | None:
    """Draw loss, smoothed loss and evaluation loss over steps into training_loss.png.

    Returns the picture's path, or None when nothing was logged.
    """
    return _plot(output_dir, "loss", "Training loss", evaluation="eval_loss")


def plot_metric(output_dir: Path, key: str) -> Path | None:
    """Draw one logged metric over steps into training_KEY.png ("/" in the key becomes "_")."""
    return _plot(output_dir, key, key, evaluation=None if key.startswith("eval_") else f"eval_{key}")


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


def _plot(output_dir: Path, key: str, title: str, evaluation: str | None) -> Path | None:
    rows = read_log(output_dir)
    steps, values = _curve(rows, key)
    held_out = _curve(rows, evaluation) if evaluation else ([], [])
    if not steps and not held_out[0]:
        return None
    path = output_dir / f"training_{key.replace('/', '_')}.png"
    write_bytes(path, _draw((steps, values), held_out, key, title))
    return path


def _curve(rows: Sequence[dict[str, Any]], key: str) -> Curve:
    points = [(row["current_steps"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    return [step for step, _ in points], [value for _, value in points]


def _draw(curve: Curve, held_out: Curve, key: str, title: str) -> bytes:
    # matplotlib announces the building of its font cache as a warning
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = curve
    few = "o" if len(steps) == 1 else ""
    axes.plot(steps, values, color=_COLOUR, alpha=0.45, linewidth=1, marker=few, label=key)
    if len(steps) > 2:
        axes.plot(steps, smooth(values), color=_COLOUR, linewidth=2.2, label=f"{key}, smoothed")
    if held_out[0]:
        axes.plot(*held_out, color=_EVAL_COLOUR, linewidth=1.4, marker="o", markersize=4, label=f"eval_{key}")
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
