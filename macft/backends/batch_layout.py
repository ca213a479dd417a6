"""Lay out a batch for a forward pass: what the model reads, each prompt of a pair once, and which outputs are scored.

Packed rows are read with the positions of their examples, each from 0 on: both engines rotate
every token by its own position and let it attend to no other example. Relative positions alone would do
for plain rotary embeddings, but only up to rounding (an angle near 2000 radians is off by up to 6e-5 in float32),
and not where positions have a meaning of their own; restarted, each number is the unpacked one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from macft.data.batches import unpack
from macft.objectives.batch import Batch, NumpyBatch

# Sharing costs a second, masked attention: it must save at least this share of the tokens. On a GPU, which takes as
# long to start a pass as to compute a small one, that is more.
MIN_SAVING = 0.05
GPU_MIN_SAVING = 0.3

# From a size to one that is at least as large: few different ones cost a GPU less than a little padding.
RoundUp = Callable[[int], int]


def exact(size: int) -> int:
    """No padding."""
    return size


def multiples_of(step: int) -> RoundUp:
    """Pad to multiples."""
    return lambda size: size + -size % step


def quarter_octaves(size: int) -> int:
    """Pad to multiples of 32, and above 256 to four sizes between a power of two and the next."""
    step = 32 << max(0, (size - 1).bit_length() - 8)
    return size + -size % step


@dataclass(frozen=True)
class BatchLayout:
    """What the model reads, and where the log-probabilities that come out belong.

    Without `prompts` the model reads `inputs`. With them it first reads the prompts without their
    last token, and then `inputs`: the last prompt token and the answer, twice as many rows, which
    attend to the keys of their prompt. `rows` index the outputs of both passes, flattened, one after
    the other.
    """

    inputs: np.ndarray  # int32 [R, L]
    rows: np.ndarray  # int32 [K]
    targets: np.ndarray  # int32 [K], the token that comes next
    scatter_index: np.ndarray  # int32 [K], flat indices into [rows of the batch, T-1]
    valid: np.ndarray  # float32 [K], 0 at the padding of these four
    prompts: np.ndarray | None = None  # int32 [R/2, P]
    offsets: np.ndarray | None = None  # int32 [R], prompt tokens before `inputs`
    mask: np.ndarray | None = None  # bool [R, 1, L, P+L], True: may attend
    # only of packed rows: where each token stands in its example, so that each 0 begins one
    positions: np.ndarray | None = None  # int32 [R, L]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that this layout has, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def split_by_tokens(batch: NumpyBatch, tokens_at_once: int | None, *, packs: bool = True) -> list[NumpyBatch]:
    """Split a batch into parts of whole rows, or pairs, of at most so many padded tokens; at least one row or pair.

    Objectives are sums, so the parts add up to the batch, and only the activations of one part are in memory.
    A model that does not pack gets one example of the packed rows per row, in parts no larger than the batch.
    """
    if batch.segment_ids is not None and not packs:
        single = unpack(batch)
        longest_first = np.argsort(-single.lengths, kind="stable")
        return split_by_tokens(_part(single, longest_first, len(single.tokens)), tokens_at_once or batch.tokens.size)
    if tokens_at_once is None or batch.tokens.size <= tokens_at_once:
        return [batch]
    count = _units(batch)
    return [_part(batch, indices, count) for indices in _unit_parts(batch, tokens_at_once)]


def score_in_parts(
    batch: NumpyBatch,
    positions: np.ndarray,
    tokens_at_once: int | None,
    score: Callable[[NumpyBatch, np.ndarray], np.ndarray],
) -> np.ndarray:
    """`score(batch, positions)`, float32 like `positions`, computed in parts of whole rows or pairs."""
    if tokens_at_once is None or batch.tokens.size <= tokens_at_once:
        return score(batch, positions)
    found = np.zeros(positions.shape, dtype=np.float32)
    # what belongs to pairs, or to rated answers, is not asked for
    batch = Batch(**{name: column for name, column in batch.columns.items() if len(column) == len(batch.tokens)})
    count = _units(batch)
    for indices in _unit_parts(batch, tokens_at_once):
        part = _part(batch, indices, count)
        rows, length = _rows_of(batch, indices, count), part.tokens.shape[1] - 1
        found[rows, :length] = score(part, positions[rows, :length])
    return found


def _units(batch: NumpyBatch) -> int:
    """How many rows, or pairs, a batch has."""
    return len(batch.tokens) if batch.prompt_mask is None else len(batch.tokens) // 2


def _unit_parts(batch: NumpyBatch, tokens_at_once: int) -> Iterator[np.ndarray]:
    count = _units(batch)
    lengths = batch.lengths.reshape(-1, count).max(axis=0)
    rows_each = len(batch.tokens) // count
    start = 0
    while start < count:
        end = start + 1
        while end < count and lengths[start : end + 1].max() * rows_each * (end + 1 - start) <= tokens_at_once:
            end += 1
        yield np.arange(start, end)
        start = end


def _rows_of(batch: NumpyBatch, indices: np.ndarray, count: int) -> np.ndarray:
    return indices if batch.prompt_mask is None else np.concatenate([indices, indices + count])


def _part(batch: NumpyBatch, indices: np.ndarray, count: int) -> NumpyBatch:
    rows = _rows_of(batch, indices, count)
    length = int(batch.lengths[rows].max())
    columns = {}
    for name, column in batch.columns.items():
        chosen = column[rows if len(column) == len(batch.tokens) else indices]
        columns[name] = chosen[:, :length] if chosen.ndim == 2 else chosen
    return Batch(**columns)


def lay_out(
    batch: NumpyBatch,
    positions: np.ndarray,
    *,
    share: bool,
    round_up: RoundUp = exact,
    min_saving: float = MIN_SAVING,
) -> BatchLayout:
    """Choose how to compute log p(token_{t+1} | tokens up to t) at `positions`, bool [rows, T-1].

    With `share`, the prompts of pairs are computed once where that saves `min_saving` of the tokens. Lengths are padded
    by `round_up`.
    Packed rows keep their examples apart; a single example in its row needs nothing for that.
    """
    shared = shared_layout(batch, positions, round_up) if share and batch.prompt_mask is not None else None
    if shared is not None and _tokens(shared) <= (1 - min_saving) * batch.tokens[:, 1:].size:
        return shared
    return plain_layout(batch, positions, round_up)


def pad_batch(batch: NumpyBatch, round_up: RoundUp) -> NumpyBatch:
    """Pad a batch until T - 1 is what it is rounded up to, so that few shapes are compiled."""
    length = batch.tokens.shape[1] - 1
    extra = round_up(length) - length
    if not extra:
        return batch
    pad = ((0, 0), (0, extra))
    return Batch(**{name: np.pad(value, pad) if value.ndim == 2 else value for name, value in batch.columns.items()})


def plain_layout(batch: NumpyBatch, positions: np.ndarray, round_up: RoundUp) -> BatchLayout:
    """The layout in which every row is computed whole."""
    scored = np.flatnonzero(positions)
    targets = batch.tokens[:, 1:].reshape(-1)[scored]
    layout = BatchLayout(batch.tokens[:, :-1], scored, targets, scored, np.ones(len(scored)))
    if batch.segment_ids is not None and batch.segment_ids.max() > 1:
        layout = replace(layout, positions=_restarted(batch.segment_ids[:, :-1]))
    return _scored(layout, round_up)


def _restarted(segment_ids: np.ndarray) -> np.ndarray:
    """int32 [R, L]: how many tokens of the same segment stand before each."""
    columns = np.arange(segment_ids.shape[1])
    begins = np.diff(segment_ids, axis=1, prepend=-1) != 0
    return (columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)).astype(np.int32)


def shared_layout(batch: NumpyBatch, positions: np.ndarray, round_up: RoundUp) -> BatchLayout | None:
    """The layout in which the prompt of each pair is computed once; None where prompts have only one token."""
    pairs = len(batch.tokens) // 2
    starts = batch.loss_mask.argmax(axis=1)  # prompt tokens of each row, at least 1
    offsets = starts - 1
    width, length = round_up(int(offsets.max())), round_up(int((batch.lengths - starts).max()))
    if width == 0:
        return None
    prompts = np.zeros((pairs, width), dtype=np.int32)
    inputs = np.zeros((2 * pairs, length), dtype=np.int32)
    for row, (offset, end) in enumerate(zip(offsets, batch.lengths - 1, strict=True)):
        inputs[row, : end - offset] = batch.tokens[row, offset:end]
        if row < pairs:
            prompts[row, :offset] = batch.tokens[row, :offset]
    keys = np.arange(width + length)
    seen = (keys < width) & (keys < offsets[:, None])  # [R, P+L]: the row's own prompt
    causal = (keys >= width) & (keys - width <= np.arange(length)[:, None])  # [L, P+L]
    line, column = np.nonzero(positions)
    in_answer = column >= offsets[line]
    # a pair has one prompt, whichever of its rows asks
    in_prompt = line % pairs * width + column
    rows = np.where(in_answer, prompts.size + line * length + column - offsets[line], in_prompt)
    layout = BatchLayout(
        inputs=inputs,
        rows=rows,
        targets=batch.tokens[line, column + 1],
        scatter_index=line * positions.shape[1] + column,
        valid=np.ones(len(rows)),
        prompts=prompts,
        offsets=offsets.astype(np.int32),
        mask=(seen[:, None, :] | causal[None])[:, None],
    )
    return _scored(layout, round_up)


def _scored(layout: BatchLayout, round_up: RoundUp) -> BatchLayout:
    """The four [K] columns in their types, padded."""
    extra = max(1, round_up(len(layout.rows))) - len(layout.rows)
    columns = {name: np.pad(getattr(layout, name), (0, extra)) for name in ("rows", "targets", "scatter_index")}
    return replace(
        layout,
        **{name: value.astype(np.int32) for name, value in columns.items()},
        valid=np.pad(layout.valid, (0, extra)).astype(np.float32),
    )


def _tokens(layout: BatchLayout) -> int:
    return layout.inputs.size + (0 if layout.prompts is None else layout.prompts.size)


def rope_problem(config: dict[str, Any], max_length: int) -> str | None:
    """Why an example's positions depend on other rows of its pass, or None; `max_length` is the longest (0: any)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kind = next((str(k.get("rope_type", k.get("type"))) for k in kinds if _is_length_bound(k)), None)
    limits = (k.get("original_max_position_embeddings") for k in (*kinds, config))
    limit = next((limit for limit in limits if limit), config.get("max_position_embeddings", 0))
    if kind is None or 0 < max_length <= limit:
        return None
    return f"its {kind} rotary embedding changes for all rows of a pass once one is longer than {limit}"


def _is_length_bound(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope", "su")
