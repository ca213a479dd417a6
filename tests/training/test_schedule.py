"""The learning rate of every step, against transformers' schedulers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from macft.config.settings import SCHEDULE_OPTIONS, Settings
from macft.training.schedule import DECAYS, Schedule, warmup_steps

TOTAL = 23


def reference(
    kind: str, warmup: int, options: dict[str, float] | None = None, total: int = TOTAL, peak: float = 3e-4
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, warmup, total, options or {})
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.torch
@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_every_rate_equals_transformers(kind, warmup):
    ours = Schedule(kind, 3e-4, TOTAL, warmup)
    # both compute in double precision; only the order of the products differs
    assert [ours.lr(step) for step in range(TOTAL)] == pytest.approx(reference(kind, warmup), rel=1e-14, abs=1e-20)


COURSES = [
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
]


@pytest.mark.torch
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(("kind", "options"), COURSES, ids=str)
def test_every_rate_of_a_course_with_options_equals_transformers(kind, options, warmup):
    ours = Schedule(kind, 3e-4, TOTAL, warmup, options)
    # the least rate is a factor there and a sum here: 1e-13 of the peak
    assert [ours.lr(step) for step in range(TOTAL)] == pytest.approx(
        reference(kind, warmup, options), rel=1e-12, abs=3e-17
    )


@pytest.mark.parametrize(("kind", "options"), [("cosine", {}), *COURSES])
def test_every_course_and_option_can_be_set(kind, options):
    assert set(options) <= SCHEDULE_OPTIONS[kind]
    assert set(DECAYS) == set(get_args(Settings.model_fields["lr_scheduler_type"].annotation))


@pytest.mark.torch
def test_constant_stays_at_the_peak():
    ours = Schedule("constant", 3e-4, TOTAL, 0)
    assert [ours.lr(step) for step in range(TOTAL)] == reference("constant", 0) == [3e-4] * TOTAL


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 10, 33, 100])
def test_a_warmup_ratio_is_rounded_up(ratio, total):
    assert warmup_steps(0, ratio, total) == math.ceil(ratio * total)


@pytest.mark.torch
@pytest.mark.parametrize("total", [1, 33, 100, 1000])
def test_warmup_is_as_long_as_the_trainer_of_transformers_makes_it(total, tmp_path):
    # 5.x takes a share as a float warmup_steps
    for share in (0.0, 0.03, 0.1):
        arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=share, report_to="none", use_cpu=True)
        assert warmup_steps(0, share, total) == arguments.get_warmup_steps(total)


def test_warmup_steps_come_before_a_ratio():
    assert warmup_steps(4, 0.5, 100) == 4


def test_the_last_warmup_step_reaches_the_peak_and_the_last_step_is_above_zero():
    linear = Schedule("linear", 1.0, 10, 4)
    assert [linear.lr(step) for step in range(10)] == pytest.approx(
        [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rel=1e-15
    )
