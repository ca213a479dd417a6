"""The two directions of GGUF's row order undo each other."""

from __future__ import annotations

import numpy as np
import pytest

from macft.gguf.row_order import deinterleave, interleave, interleaved
from macft.weights.tensors.lazy import from_array, read_rows


@pytest.mark.parametrize(("heads", "size", "columns"), [(1, 2, ()), (2, 4, (3,)), (3, 8, (1,)), (4, 6, (5,))])
def test_interleaving_and_its_inverse_give_the_rows_back(heads: int, size: int, columns: tuple[int, ...]) -> None:
    rows = np.arange(heads * size * int(np.prod(columns))).reshape(heads * size, *columns)
    assert np.array_equal(deinterleave(interleave(rows, heads), heads), rows)
    assert np.array_equal(interleave(deinterleave(rows, heads), heads), rows)


def test_the_rows_of_a_head_alternate_between_its_halves() -> None:
    assert interleave(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_any_part_of_a_lazy_tensor_is_that_part_of_the_whole() -> None:
    rows = np.arange(24 * 2).reshape(24, 2)
    lazy = interleaved(from_array("q", rows), 3)
    for start in range(24):
        for stop in range(start + 1, 25):
            assert np.array_equal(read_rows(lazy, start, stop), interleave(rows, 3)[start:stop])
