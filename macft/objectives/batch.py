"""Define the batch that data, engines and objectives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Rows of one forward pass; numpy until a backend maps it to its own arrays."""

    tokens: ArrayT  # int32 [rows, T], right-padded with 0
    loss_mask: ArrayT  # bool [rows, T]; True where the token is a training target
    lengths: ArrayT  # int32 [rows], real tokens per row
    # Only in packed rows: 1, 2, ... at the tokens of each example, 0 at the padding.
    segment_ids: ArrayT | None = None  # int32 [rows, T]
    # Only pairs and rated answers have the reference's log-probabilities.
    reference_logps: ArrayT | None = None  # float32 [rows]; summed over each answer
    # Of pairs, rows 0..P-1 are chosen, rows P..2P-1 rejected.
    prompt_mask: ArrayT | None = None  # bool [rows, T]; True at the prompt tokens but the first, of chosen rows
    reference_log_perplexity: ArrayT | None = None  # float32 [pairs]; of the prompts, under the reference
    # Of N rated answers, rows N..2N-1 hold the same prompts with answers to others, until `kl` takes their place.
    desirable: ArrayT | None = None  # bool [N]; whether the answer is rated desirable
    kl: ArrayT | None = None  # float32 [N]; the KL term, the same for all

    @property
    def columns(self) -> dict[str, ArrayT]:
        """The columns of this batch that are not None, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def map(self, convert: Callable[[ArrayT], Any]) -> Batch[Any]:
        """The same batch with every column converted."""
        return Batch(**{name: convert(value) for name, value in self.columns.items()})


NumpyBatch = Batch[np.ndarray]
