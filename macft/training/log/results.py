"""Write the result files of a run and the model card of its adapter."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macft import __version__
from macft.files import write_json


def train_results(
    *,
    epoch: float,
    train_loss: float,
    seconds: float,
    examples: int,
    steps: int,
    tokens: int,
    peak_memory_gb: float | None,
) -> dict[str, float]:
    """The content of train_results.json, under LLaMA-Factory's names.

    `train_loss` is the mean of the step losses; `examples`, `steps` and `tokens` are what these
    `seconds` went through in all epochs; memory is in 10^9 bytes.
    """
    results = {
        "epoch": epoch,
        "train_loss": train_loss,
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": _rate(examples, seconds),
        "train_steps_per_second": _rate(steps, seconds),
        "train_tokens_per_second": _rate(tokens, seconds),
        "total_tokens": tokens,
    }
    if peak_memory_gb is not None:
        results["peak_memory_gb"] = round(peak_memory_gb, 3)
    return results


def eval_results(*, epoch: float, values: Mapping[str, float], seconds: float, examples: int) -> dict[str, float]:
    """The content of eval_results.json, under LLaMA-Factory's names; `values` are eval_loss and its like."""
    return {
        "epoch": epoch,
        **values,
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": _rate(examples, seconds),
    }


def merge_results(output_dir: Path, name: str, values: Mapping[str, float]) -> None:
    """Write `name`_results.json ("train", "eval") and fold its values into all_results.json."""
    write_json(output_dir / f"{name}_results.json", dict(values))
    path = output_dir / "all_results.json"
    write_json(path, {**_read_results(path), **values})


def model_card(
    *,
    base: str,
    adapter_dir: str,
    data: str,
    settings: Mapping[str, Any],
    results: Mapping[str, float],
    versions: Mapping[str, str],
) -> str:
    """The README.md of an adapter: `base` and `data` as the user typed them, settings in their order."""
    command = f"macft chat {shlex.quote(base)} --adapter {shlex.quote(adapter_dir)}"
    ran_with = {"macft": __version__, "Python": platform.python_version(), **versions}
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base, ensure_ascii=False)}",
            "library_name: peft",
            "tags:",
            "- lora",
            "- macft",
            "---",
            "",
            f"# LoRA adapter for {base}",
            "",
            f"Trained with macft on {data}.",
            "",
            "## Chat with it",
            "",
            "```sh",
            command,
            "```",
            "",
            "## Results",
            "",
            *_table(("figure", "value"), {key: _figure(value) for key, value in results.items()}),
            "",
            "## Settings",
            "",
            *_table(("setting", "value"), settings),
            "",
            "## Versions",
            "",
            *_table(("package", "version"), ran_with),
            "",
        ]
    )


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _read_results(path: Path) -> dict[str, float]:
    # a damaged summary must not cost the figures of a run that has just finished
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(header: Sequence[str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "| --- | --- |"]
    return lines + [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]


def _cell(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict | None) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _figure(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
