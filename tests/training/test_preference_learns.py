"""SmolLM2 learns from the shipped pairs which of two answers is better, on both engines."""

from __future__ import annotations

import numpy as np
import pytest
from support.paths import CHECKOUT
from support.toy_backend import ENGINES

from macft.config.load import load_config
from macft.training.log.report import read_log
from macft.training.run import train

STEPS = 12


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2_learns_to_prefer(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    overrides = [
        *(
            f"dataset={CHECKOUT / 'data' / 'quickstart_pairs.jsonl'}",
            f"output_dir={tmp_path / 'out'}",
            f"backend={engine}",
        ),
        # few steps at a high rate: 32 pairs, 8 held out, are enough to see it learn
        *(f"max_steps={STEPS}", "max_samples=40", "learning_rate=2e-4", "logging_steps=1", "plot_loss=false"),
    ]
    train(load_config(CHECKOUT / "configs" / "dpo.yaml", overrides))
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    last = rows[-5:]
    assert np.mean([row["rewards/margins"] for row in last]) > 0.5
    assert np.mean([row["rewards/accuracies"] for row in last]) > 0.8
    # pairs that no step has seen
    held_out = [row for row in read_log(tmp_path / "out") if "eval_loss" in row][-1]
    assert held_out["eval_rewards/margins"] > 0.5 and held_out["eval_rewards/accuracies"] > 0.8
