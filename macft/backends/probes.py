"""Make the small batches on which a model is tried at load, before a faster way to compute it is used."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from macft.backends.batch_layout import BatchLayout, exact, plain_layout, shared_layout
from macft.data.batches import unpack
from macft.errors import MacftError, ModelError
from macft.objectives.batch import Batch

# Rounding to 16 bits in other kernels gave 0.01 to 0.06 on real models, examples that see each other 0.7 to 1.5.
_LIMITS = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.2}


class ComputesLogits(Protocol):
    """One way to compute a model."""

    def logits(self, layout: BatchLayout) -> np.ndarray:
        """float32 [K, V]: the logits at `rows` of a layout."""


def agree(
    fast: ComputesLogits, layout: BatchLayout, plain: ComputesLogits, plain_layout: BatchLayout, precision: str
) -> bool:
    """Whether a faster way gives the logits of the plain one, at layouts of the same positions.

    Judged by the root mean square of the difference as a share of the logits' spread. Raises MacftError when the
    device itself fails, which says nothing about the model, and for logits that are not finite.
    """
    try:
        found, expected = fast.logits(layout), plain.logits(plain_layout)
    except MacftError:
        raise
    except Exception:  # whatever a foreign model file does not expect
        return False
    if not np.isfinite(expected).all():
        hint = "float16 overflows in it: compute in float32 (bf16=false, fp16=false)"
        raise ModelError(
            f"the model's logits on a few tokens are not finite in {precision}; "
            f"{hint if precision == 'float16' else 'its weights are damaged: download it again'}"
        )
    if found.shape != expected.shape:
        return False
    difference = np.sqrt(np.mean(np.square(found - expected), dtype=np.float64))
    return bool(difference <= _LIMITS[precision] * expected.std(dtype=np.float64))


def probe_rows() -> BatchLayout:
    """A few positions of two rows."""
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9) % 7
    batch = Batch(tokens, np.ones_like(tokens, dtype=bool), np.array([9, 9], dtype=np.int32))
    positions = np.zeros((2, 8), dtype=bool)
    positions[0, [1, 6]] = positions[1, [0, 7]] = True
    return plain_layout(batch, positions, exact)


def probe_pairs() -> tuple[BatchLayout, BatchLayout]:
    """The same positions of two pairs, with their prompts shared and without."""
    starts, lengths = np.array([6, 3, 6, 3]), np.array([9, 8, 8, 5], dtype=np.int32)
    columns = np.arange(9)
    tokens = (np.arange(36, dtype=np.int32).reshape(4, 9) * 5) % 7
    tokens[2:] = np.where(columns < starts[2:, None], tokens[:2], tokens[2:])
    loss_mask = (columns >= starts[:, None]) & (columns < lengths[:, None])
    batch = Batch(tokens, loss_mask, lengths, prompt_mask=np.zeros_like(loss_mask))
    positions = loss_mask[:, 1:].copy()
    positions[0, 2] = True
    shared = shared_layout(batch, positions, exact)
    assert shared is not None
    return shared, plain_layout(batch, positions, exact)


def probe_packed() -> tuple[BatchLayout, BatchLayout]:
    """The same positions of five examples, in two packed rows and in rows of their own."""
    lengths = np.array([[5, 1, 7], [4, 8, 0]])
    tokens = (np.arange(28, dtype=np.int32).reshape(2, 14) * 5) % 7
    segment_ids = np.zeros_like(tokens)
    for row, counts in enumerate(lengths):
        segment_ids[row, : counts.sum()] = np.repeat(np.arange(1, 4), counts)
    begins = np.diff(segment_ids, axis=1, prepend=0) != 0
    rows = lengths.sum(axis=1).astype(np.int32)
    packed = Batch(tokens, (segment_ids > 0) & ~begins, rows, segment_ids=segment_ids)
    single = unpack(packed)
    return plain_layout(packed, packed.loss_mask[:, 1:], exact), plain_layout(single, single.loss_mask[:, 1:], exact)
