"""Split an mlx-lm model into backbone and LM head, so that the head computes only the requested rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from macft.backends.batch_layout import BatchLayout
from macft.backends.mlx import device
from macft.backends.mlx.ops import cross_entropy
from macft.backends.mlx.out_of_memory import explaining_out_of_memory
from macft.backends.mlx.packed import PackedCache, restarting_rope
from macft.backends.probes import agree, probe_packed, probe_pairs, probe_rows
from macft.backends.shared import GPU_LOGITS_AT_ONCE, LOGITS_AT_ONCE

# What model files call their backbone.
BACKBONES = ("model", "transformer", "backbone")

Columns = dict[str, mx.array]


class Backbone:
    """Stands in for a model's backbone; while `hidden` is set, it returns that instead of computing.

    The model file's own head then runs on [1, K, D]: soft caps, scaling and tied embeddings stay its business.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.hidden: mx.array | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.module(*args, **kwargs) if self.hidden is None else self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Record:
    """A cache for the prompts: keeps the keys and values that a layer made."""

    offset = 0

    def __init__(self) -> None:
        self.keys = self.values = mx.array(0.0)

    def make_mask(self, *_args: Any, **_kwargs: Any) -> str:
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class _Prefix:
    """A cache for the answers: their prompt's keys and values come first."""

    def __init__(self, prompt: _Record, offset: mx.array, mask: mx.array):
        # chosen rows and rejected rows have the same prompts
        self.keys = mx.concatenate([prompt.keys, prompt.keys])
        self.values = mx.concatenate([prompt.values, prompt.values])
        self.offset = offset
        self.mask = mask

    def make_mask(self, *_args: Any, **_kwargs: Any) -> mx.array:
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)


class SplitModel:
    """A model in two halves: `hidden` runs the backbone over a layout, `lm_head` turns hidden rows into logits.

    A model whose backbone was not found (`backbone` None) computes all logits in `hidden`; `lm_head` passes them on.
    """

    def __init__(self, model: nn.Module, backbone: Backbone | None, lm_head_is_frozen: bool):
        self.model = model
        self.backbone = backbone
        self.lm_head_is_frozen = lm_head_is_frozen
        self.shares_prompts = False
        self.packs = False
        vocabulary = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
        # of each logit: in the compute type, in float32, its log-softmax, and the gradients of these
        self.row_bytes = 16 * vocabulary
        self._rows_at_once = max(1, (_gpu_logits() if device.on_gpu() else LOGITS_AT_ONCE) // vocabulary)
        self.head_bytes = self.row_bytes * self._rows_at_once

    def hidden(self, layout: Columns) -> mx.array:
        """[K, D] (or [K, V] logits): the outputs at `rows` of a layout's columns."""
        run: Callable[..., mx.array] = self.model if self.backbone is None else self.backbone
        inputs, rows = layout["inputs"], layout["rows"]
        if "prompts" not in layout:
            if "positions" in layout:
                output = run(inputs, cache=[PackedCache(layout["positions"])] * len(self.model.layers))
            else:
                output = run(inputs)
            return output.reshape(-1, output.shape[-1])[rows]
        records = [_Record() for _ in self.model.layers]
        prompt_output = run(layout["prompts"], cache=records)
        prefixes = [_Prefix(record, layout["offsets"], layout["mask"]) for record in records]
        output = run(inputs, cache=prefixes)
        width = output.shape[-1]
        return mx.concatenate([prompt_output.reshape(-1, width), output.reshape(-1, width)])[rows]

    def lm_head(self, hidden: mx.array) -> mx.array:
        """[K, D] -> logits [K, V]."""
        if self.backbone is None:
            return hidden
        self.backbone.hidden = hidden[None]
        try:
            return self.model(mx.zeros((1, hidden.shape[0]), dtype=mx.int32))[0]
        finally:
            self.backbone.hidden = None

    def logits(self, layout: BatchLayout) -> np.ndarray:
        """float32 [K, V]: the logits at `rows` of a layout."""
        with explaining_out_of_memory("trying the model on a few tokens", "load"):
            return np.array(self.lm_head(self.hidden(to_device(layout.columns))).astype(mx.float32))

    def logps(self, layout: Columns, *, with_gradient: bool) -> mx.array:
        """float32 [K]: log p(target) at every row of a layout, times its validity.

        A frozen head is differentiated chunk by chunk in the forward pass, d logp / d hidden [K, D], so
        that the logits of only one chunk are in memory at a time, and none of them in the backward pass. One that is
        trained computes each chunk again in the backward pass.
        """
        hidden, targets = self.hidden(layout), mx.stop_gradient(layout["targets"])
        if with_gradient and (self.backbone is None or not self.lm_head_is_frozen):
            return self._trained_head_logps(hidden, targets) * layout["valid"]
        constant = mx.stop_gradient(hidden)
        values: list[mx.array] = []
        slopes: list[mx.array] = []
        for start in range(0, hidden.shape[0], self._rows_at_once):
            chunk = slice(start, start + self._rows_at_once)
            part, expected = _after(constant[chunk], [*values[-1:], *slopes[-1:]]), targets[chunk]

            def score(rows: mx.array, expected: mx.array = expected) -> mx.array:
                return -cross_entropy(self.lm_head(rows), expected)

            if with_gradient:
                [value], [slope] = mx.vjp(score, [part], [mx.ones(part.shape[0])])
                slopes.append(slope)
            else:
                value = score(part)
            values.append(value)
        logps = mx.stop_gradient(mx.concatenate(values))
        if with_gradient:
            # 0 in value, the slopes in gradient
            slope = mx.stop_gradient(mx.concatenate(slopes)).astype(mx.float32)
            logps = logps + ((hidden - constant).astype(mx.float32) * slope).sum(axis=-1)
        return logps * layout["valid"]

    def _trained_head_logps(self, hidden: mx.array, targets: mx.array) -> mx.array:
        if self.backbone is None or hidden.shape[0] <= self._rows_at_once:
            return -cross_entropy(self.lm_head(hidden), targets)
        trained = tree_flatten(self.model.trainable_parameters())
        head = {path: value for path, value in trained if ".layers." not in path}
        chunks = [slice(start, start + self._rows_at_once) for start in range(0, hidden.shape[0], self._rows_at_once)]

        def score(chunk: slice, rows: mx.array, *parameters: mx.array) -> mx.array:
            self.model.update(tree_unflatten(list(zip(head, parameters, strict=True))))
            return -cross_entropy(self.lm_head(rows), targets[chunk])

        # Not mx.checkpoint: without an order among them, MLX computes the chunks of a backward pass side by side.
        @mx.custom_function
        def logps(hidden: mx.array, *parameters: mx.array) -> mx.array:
            values: list[mx.array] = []
            for chunk in chunks:
                values.append(score(chunk, _after(hidden[chunk], values[-1:]), *parameters))
            return mx.concatenate(values)

        @logps.vjp
        def slopes(
            inputs: Sequence[mx.array] | mx.array, cotangent: mx.array, _: mx.array
        ) -> tuple[mx.array, ...] | mx.array:
            # a single input comes, and its slope goes, without a tuple
            hidden, *parameters = [inputs] if isinstance(inputs, mx.array) else inputs
            rows: list[mx.array] = []
            totals: list[mx.array] = []
            for chunk in chunks:
                part = _after(hidden[chunk], [*rows[-1:], *totals])
                slope, *found = mx.vjp(partial(score, chunk), [part, *parameters], [cotangent[chunk]])[1]
                rows.append(slope)
                # a sum of many in 16 bits would be rounded at every chunk
                more = [gradient.astype(mx.float32) for gradient in found]
                totals = [total + new for total, new in zip(totals, more, strict=True)] if totals else more
            sums = (total.astype(value.dtype) for total, value in zip(totals, parameters, strict=True))
            return (mx.concatenate(rows), *sums) if parameters else mx.concatenate(rows)

        found: mx.array = logps(hidden, *head.values())  # type: ignore[assignment]
        self.model.update(tree_unflatten(list(head.items())))
        return found


def _after(array: mx.array, before: list[mx.array]) -> mx.array:
    """The array, computed after others: without an order MLX computes up to 20 chunks side by side."""
    return mx.depends(array, before) if before else array


def _gpu_logits() -> int:
    """How many logits are computed at once: each chunk reads the whole head twice, which a GPU waits for."""
    # 16 bytes each, of a sixteenth of the free memory
    return min(GPU_LOGITS_AT_ONCE, device.free_memory() // (16 * 16))


def split(model: nn.Module, *, lm_head_is_frozen: bool, may_share: bool, may_pack: bool, precision: str) -> SplitModel:
    """Split a model; the halves, shared prompts and packing are each used only if they change no logit."""
    found = _split(model, lm_head_is_frozen=lm_head_is_frozen, may_share=may_share, precision=precision)
    found.packs = may_pack and _can_pack(found, precision)
    return found


def _split(model: nn.Module, *, lm_head_is_frozen: bool, may_share: bool, precision: str) -> SplitModel:
    whole = SplitModel(model, None, lm_head_is_frozen)
    owner = getattr(model, "language_model", model)
    name = next((name for name in BACKBONES if isinstance(owner.get(name), nn.Module)), None)
    if name is None:
        return whole
    backbone = Backbone(owner[name])
    # An instance attribute shadows the module's entry for reading; the parameter tree stays.
    object.__setattr__(owner, name, backbone)
    halves = SplitModel(model, backbone, lm_head_is_frozen)
    rows = probe_rows()
    if not agree(halves, rows, whole, rows, precision):
        object.__delattr__(owner, name)
        return whole
    halves.shares_prompts = may_share and _can_share(halves, whole, precision)
    return halves


def _can_share(halves: SplitModel, whole: SplitModel, precision: str) -> bool:
    """Whether attention has no window or state of its own, and shared prompts give the same logits."""
    if any(type(cache) is not KVCache for cache in make_prompt_cache(halves.model)):
        return False
    shared, plain = probe_pairs()
    return agree(halves, shared, whole, plain, precision)


def _can_pack(model: SplitModel, precision: str) -> bool:
    """Whether examples in one row get the logits of rows of their own; the rotary modules then stay able to restart."""
    packed, plain = probe_packed()
    restore = restarting_rope(model.model)
    is_same = agree(model, packed, model, plain, precision)
    if not is_same:
        restore()
    return is_same


def to_device(columns: Mapping[str, np.ndarray]) -> Columns:
    """The columns of a batch or of a layout as MLX arrays."""
    return {name: mx.array(value) for name, value in columns.items()}
