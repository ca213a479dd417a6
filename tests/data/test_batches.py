"""Which examples every step trains on: all of them, once an epoch, in an order that only the seed decides."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.data.batches import collate, in_order
from macft.data.plan import EpochPlan
from macft.data.tokenization.table import TokenizedExample

LENGTHS = np.random.default_rng(5).integers(5, 300, 1037)


def plan(
    lengths=LENGTHS, *, batch_size=4, accumulation=2, epochs=3.0, max_steps=-1, seed=42, by_length=True
) -> EpochPlan:
    return EpochPlan(np.asarray(lengths), batch_size, accumulation, epochs, max_steps, seed, by_length)


def rows_of(step: list[np.ndarray]) -> list[int]:
    return [int(index) for part in step for index in part]


def steps_of(plan: EpochPlan, after: int = 0) -> list[list[int]]:
    return [rows_of(step) for step in plan.steps(after)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 400), min_size=1, max_size=700),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    by_length=st.booleans(),
)
def test_every_example_is_trained_on_once_an_epoch(lengths, batch_size, accumulation, epochs, seed, by_length):
    ours = plan(
        lengths, batch_size=batch_size, accumulation=accumulation, epochs=epochs, seed=seed, by_length=by_length
    )
    steps = list(ours.steps())
    assert ours.total_steps == len(steps) == -(-len(lengths) // (batch_size * accumulation)) * epochs
    for epoch in range(epochs):
        taken = steps[epoch * ours.steps_per_epoch : (epoch + 1) * ours.steps_per_epoch]
        assert sorted(index for step in taken for index in rows_of(step)) == list(range(len(lengths)))
        sizes = sorted(len(rows_of(step)) for step in taken)
        # one step of the epoch is smaller when the numbers do not divide
        assert sizes[1:] == [batch_size * accumulation] * (len(sizes) - 1)
    assert all(1 <= len(part) <= batch_size for step in steps for part in step)
    assert all(len(step) <= accumulation for step in steps)


@pytest.mark.parametrize("by_length", [True, False])
def test_eight_rows_a_step_are_the_same_rows_however_they_are_cut(by_length):
    cuts = [(8, 1), (4, 2), (2, 4), (1, 8)]
    courses = [steps_of(plan(batch_size=b, accumulation=a, by_length=by_length)) for b, a in cuts]
    assert courses[0] == courses[1] == courses[2] == courses[3]


def test_the_longest_rows_come_in_the_first_step():
    for seed in range(20):
        first = steps_of(plan(seed=seed))[0]
        assert LENGTHS[first].max() == LENGTHS.max()


def test_the_seed_decides_the_order_and_every_epoch_has_its_own():
    ours = steps_of(plan())
    assert steps_of(plan()) == ours
    assert steps_of(plan(seed=43)) != ours
    per_epoch = plan().steps_per_epoch
    epochs = [ours[start : start + per_epoch] for start in range(0, len(ours), per_epoch)]
    assert all(one != two for one, two in pairwise(epochs))


@pytest.mark.parametrize("after", [1, 129, 130, 131, 389])
def test_going_on_after_a_step_gives_the_steps_that_are_left(after):
    assert plan().steps_per_epoch == 130
    assert steps_of(plan(), after) == steps_of(plan())[after:]


def test_without_shuffling_every_epoch_is_in_the_order_of_the_examples():
    kept = EpochPlan(np.array([3, 9, 1, 7, 5]), 2, 1, 2.0, -1, seed=4, sort_by_length=False, shuffle=False)
    assert [[part.tolist() for part in step] for step in kept.steps()] == [[[0, 1]], [[2, 3]], [[4]]] * 2


def test_sorting_by_length_leaves_little_padding():
    def padding(by_length: bool) -> float:
        parts = [part for step in plan(by_length=by_length).steps() for part in step]
        width = sum(len(part) * LENGTHS[part].max() for part in parts)
        return 1 - sum(LENGTHS[part].sum() for part in parts) / width

    assert padding(True) < 0.02
    assert padding(False) > 0.3


def test_max_steps_wins_over_epochs_and_may_pass_over_the_data_again():
    short, long = plan(max_steps=5), plan(max_steps=500)
    assert steps_of(short) == steps_of(plan())[:5]
    assert len(steps_of(long)) == long.total_steps == 500
    assert steps_of(long)[:390] == steps_of(plan())


def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps():
    assert plan(epochs=0.5).total_steps == 65
    assert plan(epochs=0.001).total_steps == 1
    assert len(steps_of(plan(epochs=2.501))) == 326


def examples(*lengths: int) -> list[TokenizedExample]:
    return [TokenizedExample(np.arange(1, n + 1, dtype=np.int32) * 10, np.arange(n) >= n // 2) for n in lengths]


def test_padding_is_on_the_right_and_never_a_target():
    batch = collate(examples(4, 2, 3))
    assert batch.tokens.tolist() == [[10, 20, 30, 40], [10, 20, 0, 0], [10, 20, 30, 0]]
    assert batch.lengths.tolist() == [4, 2, 3]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert (batch.tokens.dtype, batch.loss_mask.dtype, batch.lengths.dtype) == (np.int32, np.bool_, np.int32)


def test_evaluation_sees_every_example_once_neighbors_in_length_together():
    batches = [batch for _, batch in in_order(examples(4, 9, 2, 7, 3), 2)]
    assert [batch.lengths.tolist() for batch in batches] == [[9, 7], [4, 3], [2]]
