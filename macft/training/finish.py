"""The last step is done: model files, results, picture and card are written."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from macft.backends.base import Backend
from macft.config.settings import Settings
from macft.data.tokenize_pairs import TokenizedPair
from macft.objectives.losses import make_objective
from macft.objectives.preference import Preference
from macft.training.checkpoint import Progress
from macft.training.model_files import ModelFiles
from macft.training.plots import plot_distribution, plot_loss, plot_metrics
from macft.training.prepare import Prepared
from macft.training.results import merge_results, model_card, train_results, write_model_card

logger = logging.getLogger("macft")

# Settings that say nothing about the adapter.
_NOT_SHOWN = frozenset(
    ("model_name_or_path", "dataset", "dataset_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
) | frozenset(
    ("plot_loss", "report_to", "run_name", "logging_steps", "save_strategy", "save_steps", "save_total_limit")
)


def finish(
    settings: Settings,
    prepared: Prepared,
    backend: Backend,
    files: ModelFiles,
    output_dir: Path,
    progress: Progress,
    packages: tuple[str, ...],
) -> None:
    """Write the model, the results, the picture and the card."""
    files.write(output_dir, backend.adapter_state())
    plan = prepared.plan
    results = train_results(
        epoch=progress.step / plan.steps_per_epoch,
        train_loss=progress.loss_sum / max(1, progress.step),
        seconds=progress.seconds,
        examples=_examples_seen(prepared, progress.step),
        steps=progress.step,
        tokens=progress.total_tokens,
        peak_memory_gb=backend.peak_memory() / 1e9,
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
            versions=_versions(packages),
        )
        write_model_card(output_dir, card)
    logger.info(
        "done: mean loss %.4f, %.0f tokens/s, peak memory %.1f GB; saved to %s",
        *(results["train_loss"], results["train_tokens_per_second"], results["peak_memory_gb"], output_dir),
    )


def _plot(settings: Settings, prepared: Prepared, output_dir: Path) -> None:
    plot_loss(output_dir)
    if not settings.is_preference:
        return
    plot_metrics(output_dir)
    pairs = [pair for pair in prepared.train if isinstance(pair, TokenizedPair)]
    # a prompt of one token has no perplexity
    costs = np.array(
        [pair.reference.log_perplexity if pair.prompt_length > 1 else np.nan for pair in pairs if pair.reference]
    )
    objective = make_objective(settings)
    if isinstance(objective, Preference) and objective.prompt_beta is not None and len(costs):
        plot_distribution(output_dir, objective.prompt_beta.strengths(objective.beta, costs), costs)


def _examples_seen(prepared: Prepared, steps: int) -> int:
    plan = prepared.plan
    epochs, rest = divmod(steps, plan.steps_per_epoch)
    return epochs * len(plan.lengths) + rest * plan.batch_size * plan.accumulation


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
