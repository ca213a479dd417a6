"""The pictures of a run: which are drawn, what is on them, and what does not spoil them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from macft.training.log import plots
from macft.training.log.plots import PICTURES, plot_distribution, plot_loss, plot_metrics, smooth


def test_smoothing_follows_its_formula():
    # n = 3: weight 1.8 (1 / (1 + exp(-0.15)) - 0.5) = 0.0673737...
    weight = 1.8 * (1 / (1 + 2.718281828459045**-0.15) - 0.5)
    second = weight * 4 + (1 - weight) * 2
    assert smooth([4.0, 2.0, 1.0]) == pytest.approx([4.0, second, weight * second + 1 - weight], rel=1e-12)
    assert smooth([]) == []


def write_log(folder: Path, losses: dict[int, float]) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        {"current_steps": step, "loss": loss, "eval_loss": 1.0, "rewards/accuracies": 0.5}
        for step, loss in losses.items()
    ]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_are_drawn_without_a_word_and_without_global_state(tmp_path):
    write_log(tmp_path, {step: 3.0 / step for step in range(1, 30)})
    code = (
        "import sys; from pathlib import Path; from macft.training.log.plots import plot_loss, plot_metrics\n"
        "plot_loss(Path(sys.argv[1])); plot_metrics(Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    for name in ("training_loss.png", "training_rewards_accuracies.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and _share_of_blue(picture) > 0.001


def test_a_loss_that_is_no_number_does_not_blank_the_smoothed_curve(tmp_path):
    losses = {step: 3.0 / step for step in range(1, 30)}
    pictures = []
    for name, seventh in (("whole", losses[7]), ("broken", float("nan"))):
        write_log(tmp_path / name, {**losses, 7: seventh})
        path = plot_loss(tmp_path / name)
        assert path is not None
        pictures.append(_share_of_blue(path.read_bytes()))
    # one point of 29 less, not most of the curve
    assert pictures[1] > 0.9 * pictures[0]


def _share_of_blue(picture: bytes) -> float:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(picture))
    return float(((pixels[..., 2] - pixels[..., 0]) > 0.3).mean())


def test_nothing_logged_means_no_picture(tmp_path):
    assert plot_loss(tmp_path) is None
    assert plot_metrics(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def write_rows(folder: Path, *rows: dict[str, float]) -> None:
    lines = [json.dumps({"current_steps": step, **row}) + "\n" for step, row in enumerate(rows, start=1)]
    (folder / "trainer_log.jsonl").write_text("".join(lines))


def test_each_logged_metric_of_a_preference_run_has_its_picture(tmp_path):
    write_rows(tmp_path, {"loss": 0.69})
    assert plot_metrics(tmp_path) == []
    rewards = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 1.0, "rewards/margins": 0.2}
    logps = {"logps/chosen": -9.0, "logps/rejected": -8.0}
    write_rows(tmp_path, {**rewards, **logps})
    dpo = ["rewards_accuracies", "rewards_margins", "rewards", "logps"]
    assert [path.name for path in plot_metrics(tmp_path)] == [f"training_{name}.png" for name in dpo]
    write_rows(
        tmp_path, {"sft_loss": 1.0, "odds_ratio_loss": 0.1, "dynamic_beta": 0.1, "prompt_perplexity": 9.0, "kl": 0.2}
    )
    others = ["sft_loss", "odds_ratio_loss", "kl", "dynamic_beta", "prompt_perplexity"]
    assert [path.name for path in plot_metrics(tmp_path)] == [f"training_{name}.png" for name in others]
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == set(PICTURES) - {"training_loss.png", "foodpo_distribution.png"}


def test_chosen_and_rejected_share_a_picture_in_two_colors(tmp_path):
    rows = [{"rewards/chosen": 0.1 * step, "rewards/rejected": -0.2 * step} for step in range(20)]
    write_rows(tmp_path, *rows)
    (path,) = plot_metrics(tmp_path)
    both = path.read_bytes()
    assert path.name == "training_rewards.png" and _share_of_blue(both) > 0.001 and _share_of_amber(both) > 0.001
    write_rows(tmp_path, *[{"rewards/chosen": row["rewards/chosen"]} for row in rows])
    (path,) = plot_metrics(tmp_path)
    assert _share_of_amber(path.read_bytes()) == 0 < _share_of_blue(path.read_bytes())


def test_a_metric_that_only_the_evaluation_has_is_drawn(tmp_path):
    write_rows(tmp_path, {"loss": 0.6}, {"eval_rewards/margins": 0.1}, {"eval_rewards/margins": 0.3})
    (path,) = plot_metrics(tmp_path)
    assert path.name == "training_rewards_margins.png"


def _share_of_amber(picture: bytes) -> float:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(picture))
    return float(((pixels[..., 0] - pixels[..., 2]) > 0.3).mean())


def histogram(values: list[float], *, is_log: bool = False):
    """What `_histogram` draws: axes whose legend, label and bars can be read."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plots._histogram(axes, np.array(values), "title", "beta", "#2563eb", is_log=is_log)
    return axes


def test_mean_and_percentiles_are_marked_where_they_are_by_hand():
    # 0, 1, ..., 99 and a far one: sum 4950 + 505 = 5455 over 101, order statistics at 5, 50 and 95
    axes = histogram([float(value) for value in range(100)] + [505.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean 54.01", "5 % 5", "50 % 50", "95 % 95"]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([5455 / 101, 5, 50, 95])
    assert sum(bar.get_height() for bar in axes.patches) == 101
    assert axes.get_xlabel() == "beta (101 pairs)"


def test_pairs_without_a_perplexity_are_left_out_and_counted():
    axes = histogram([2.0, float("nan"), 8.0, float("inf")], is_log=True)
    assert axes.get_xlabel() == "beta (2 pairs, 2 without)"
    assert sum(bar.get_height() for bar in axes.patches) == 2 and axes.lines[0].get_xdata()[0] == 5.0
    assert histogram([float("nan")]).get_xlabel() == "beta (0 pairs, 1 without)"


@pytest.mark.parametrize("is_log", [False, True])
def test_pairs_that_are_all_alike_stand_in_the_middle_bin(is_log):
    heights = [bar.get_height() for bar in histogram([0.1] * 7, is_log=is_log).patches]
    assert heights == [0, 0, 7, 0, 0]


def test_the_distribution_shows_both_histograms(tmp_path):
    costs = np.linspace(1, 5, 50).astype(np.float32)
    path = plot_distribution(tmp_path, 0.05 * costs, costs, "as the reference has them")
    assert path == tmp_path / "foodpo_distribution.png" and path.name in PICTURES
    picture = path.read_bytes()
    assert _share_of_blue(picture) > 0.05 and _share_of_amber(picture) > 0.05
