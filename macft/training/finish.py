"""Write the model files, results, picture and model card of a finished run."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from macft.backends.base import Model
from macft.config.settings import Settings
from macft.data.tokenization.table import Pairs
from macft.files import write_text
from macft.objectives.preference import Preference
from macft.system import installed_version
from macft.training.checkpoint import Progress
from macft.training.log.plots import plot_distribution, plot_loss, plot_metrics
from macft.training.log.report import read_log
from macft.training.log.results import merge_results, model_card, train_results
from macft.training.model_files import ModelFiles
from macft.training.objective import make_objective
from macft.training.prepare import Prepared

logger = logging.getLogger("macft")

# Settings that a reader of the model card has no use for.
_NOT_SHOWN = (
    *("model_name_or_path", "dataset", "dataset_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("plot_loss", "report_to", "run_name", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
)


def finish(
    settings: Settings,
    prepared: Prepared,
    model: Model,
    files: ModelFiles,
    output_dir: Path,
    progress: Progress,
    packages: tuple[str, ...],
) -> str:
    """Write the model, the results, the picture and the card; returns the most important figures in one line."""
    files.write(output_dir, model.trained_state())
    plan = prepared.plan
    for warning in plan.warnings:
        logger.warning(warning)
    results = train_results(
        epoch=plan.epoch_at(progress.step),
        train_loss=progress.loss_sum / max(1, progress.step),
        seconds=progress.seconds,
        examples=_examples_seen(prepared, progress.step),
        steps=progress.step,
        tokens=progress.total_tokens,
        peak_memory_gb=model.peak_memory() / 1e9,
    )
    merge_results(output_dir, "train", results)
    if settings.plot_loss:
        _plot(settings, prepared, output_dir)
    if files.lora is not None:
        shown = {
            key: value for key, value in settings.model_dump().items() if value is not None and key not in _NOT_SHOWN
        }
        card = model_card(
            base=settings.model_name_or_path,
            adapter_dir=settings.output_dir,
            data=settings.dataset,
            settings=shown,
            results=results,
            versions={name: found for name in packages if (found := installed_version(name)) is not None},
        )
        write_text(output_dir / "README.md", card)
    return (
        f"{_rewards_text(settings, output_dir, progress)}mean loss {results['train_loss']:.4f}, "
        f"{results['train_tokens_per_second']:.0f} tokens/s, peak memory {results['peak_memory_gb']:.1f} GB"
    )


def _rewards_text(settings: Settings, output_dir: Path, progress: Progress) -> str:
    """The final margin of a preference run, with the accuracy if it has pairs; empty for other runs."""
    accuracy, margin = "rewards/accuracies", "rewards/margins"
    best = progress.best
    if settings.load_best_model_at_end and f"eval_{margin}" in best.results:
        source, figures = f"evaluation after step {best.step}", best.results
        accuracy, margin = f"eval_{accuracy}", f"eval_{margin}"
    elif rows := [row for row in read_log(output_dir) if margin in row]:
        source, figures = "last row of the log", rows[-1]
    else:
        return ""
    shown = f"accuracy {figures[accuracy]:.2f} and " if accuracy in figures else ""
    return f"{shown}margin {figures[margin]:+.2f} ({source}), "


def _plot(settings: Settings, prepared: Prepared, output_dir: Path) -> None:
    plot_loss(output_dir)
    if not settings.is_preference:
        return
    plot_metrics(output_dir)
    pairs = prepared.train
    if not isinstance(pairs, Pairs) or pairs.references is None:
        return
    is_known = ~np.isnan(pairs.references[:, 0])
    # a prompt of one token has no perplexity
    costs = np.where(pairs.prompt_lengths > 1, pairs.references[:, 2], np.nan)[is_known]
    objective = make_objective(settings)
    if isinstance(objective, Preference) and objective.prompt_beta is not None and len(costs):
        is_own = objective.prompt_beta.source == "reference"
        note = f"perplexities under the reference{'' if is_own else '; training takes those under the policy'}"
        plot_distribution(output_dir, objective.prompt_beta.strengths(objective.beta, costs), costs, note)


def _examples_seen(prepared: Prepared, steps: int) -> int:
    """Examples seen; a packed row counts as the mean number of examples per row. In a stream: rows seen."""
    rows = prepared.plan.rows_at(steps)
    return round(rows * len(prepared.examples) / len(prepared.train)) if prepared.train else rows
