"""Split a transformers model into backbone and LM head, so that the head computes only the requested rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from macft.backends.batch_layout import BatchLayout
from macft.backends.probes import agree, probe_packed, probe_pairs, probe_rows
from macft.backends.shared import GPU_LOGITS_AT_ONCE, LOGITS_AT_ONCE
from macft.backends.torch.attention import has_varlen, segment_bounds, use_packed
from macft.backends.torch.device import free_memory
from macft.backends.torch.out_of_memory import explaining_out_of_memory

Columns = dict[str, torch.Tensor]
KeysAndValues = tuple[torch.Tensor, torch.Tensor]

# a logit in the compute type, in float32, its log-softmax, and the gradients of these
_BYTES_PER_LOGIT = 16


class _Record(DynamicCache):
    """A cache for the prompts: keeps the keys and values of each layer, also when it computes them again."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, KeysAndValues] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        """The same keys and values."""
        self.made[layer_idx] = key_states, value_states
        return key_states, value_states


class _Prefix(DynamicCache):
    """A cache for the answers, chosen rows and rejected rows: their prompt's keys and values come first."""

    def __init__(self, prompts: dict[int, KeysAndValues]) -> None:
        super().__init__()
        self._prompts = prompts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> KeysAndValues:
        """Prompt and answer together."""
        keys, values = self._prompts[layer_idx]
        return _after(keys, key_states), _after(values, value_states)


def _after(prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cat([prompt, prompt]), answer], dim=2)


class SplitModel:
    """A model in two halves: `hidden` runs the backbone over a layout, `lm_head` turns hidden rows into logits.

    A model that cannot be split (`splits` False) computes all logits in `hidden`; `lm_head` passes them on.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, *, splits: bool, lm_head_is_frozen: bool):
        self.model = model
        self.device = device
        self.splits = splits
        self.lm_head_is_frozen = lm_head_is_frozen
        self.shares_prompts = False
        self.packs = False
        self.uses_varlen = False
        self._rows_at_once = _head_rows(int(model.config.vocab_size), device)
        self.head_bytes = _BYTES_PER_LOGIT * self._rows_at_once * int(model.config.vocab_size)

    def columns(self, layout: BatchLayout) -> Columns:
        """A layout on this device; of packed rows also where their examples begin, for kernels that ask."""
        columns = {name: torch.from_numpy(value).to(self.device) for name, value in layout.columns.items()}
        if self.uses_varlen and layout.positions is not None:
            bounds, longest = segment_bounds(layout.positions)
            columns |= {"bounds": torch.from_numpy(bounds).to(self.device), "longest": torch.tensor(longest)}
        return columns

    def hidden(self, layout: Columns) -> torch.Tensor:
        """[K, D] (or [K, V] logits): the outputs at `rows` of a layout's columns."""
        inputs, rows = layout["inputs"], layout["rows"]
        # Padding is on the right and attention is causal, so no mask is needed. Where positions start
        # again, transformers takes another example to begin, and makes the masks, windows included.
        packed: dict[str, Any] = {"position_ids": layout["positions"].long()} if "positions" in layout else {}
        if "bounds" in layout:
            # a mask of four dimensions is taken as it is, and these kernels need none
            packed["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
            packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = layout["bounds"]
            packed["max_length_q"] = packed["max_length_k"] = int(layout["longest"])
        if not self.splits:
            logits = self.model(input_ids=inputs, **packed).logits
            return logits.reshape(-1, logits.shape[-1])[rows]
        backbone = self.model.get_decoder()
        if "prompts" not in layout:
            output = backbone(input_ids=inputs, **packed).last_hidden_state
            return output.reshape(-1, output.shape[-1])[rows]
        record = _Record()
        first = backbone(input_ids=layout["prompts"], past_key_values=record, use_cache=True)
        offsets, length = layout["offsets"], inputs.shape[1]
        second = backbone(
            input_ids=inputs,
            past_key_values=_Prefix(record.made),
            position_ids=offsets[:, None] + torch.arange(length, device=self.device),
            attention_mask=layout["mask"],
            use_cache=True,
        )
        width = first.last_hidden_state.shape[-1]
        flat = [output.last_hidden_state.reshape(-1, width) for output in (first, second)]
        return torch.cat(flat)[rows]

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[K, D] -> float32 logits [K, V]."""
        if not self.splits:
            return hidden.float()
        dummy = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=self.device)
        with _instead_of_backbone(self.model.get_decoder(), hidden[None]):
            return self.model(input_ids=dummy).logits[0].float()

    def logits(self, layout: BatchLayout) -> np.ndarray:
        """float32 [K, V]: the logits at `rows` of a layout."""
        with explaining_out_of_memory(self.device, "trying the model on a few tokens", "load"):
            return self.lm_head(self.hidden(self.columns(layout))).cpu().numpy()

    def logps(self, layout: Columns) -> torch.Tensor:
        """float32 [K]: log p(target) at every row of a layout, times its validity.

        A frozen head is differentiated chunk by chunk in the forward pass, d logp / d hidden [K, D], so
        that the logits of only one chunk are in memory at a time, and none of them in the backward pass. One that is
        trained computes each chunk again in the backward pass.
        """
        with_gradient = torch.is_grad_enabled()
        hidden, targets = self.hidden(layout), layout["targets"].long()
        if with_gradient and not (self.splits and self.lm_head_is_frozen):
            return self._trained_head_logps(hidden, targets) * layout["valid"]
        values, slopes = [], []
        for start in range(0, len(hidden), self._rows_at_once):
            chunk = slice(start, start + self._rows_at_once)
            part = hidden.detach()[chunk].requires_grad_(with_gradient)
            value = self._head_logps(part, targets[chunk])
            if with_gradient:
                slopes.append(torch.autograd.grad(value.sum(), part)[0])
            values.append(value.detach())
        logps = torch.cat(values)
        if with_gradient:
            # 0 in value, the slopes in gradient
            logps = logps + ((hidden - hidden.detach()).float() * torch.cat(slopes).float()).sum(dim=-1)
        return logps * layout["valid"]

    def _head_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(self.lm_head(hidden), targets, reduction="none")

    def _trained_head_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not self.splits or len(hidden) <= self._rows_at_once:
            return self._head_logps(hidden, targets)
        chunks = zip(hidden.split(self._rows_at_once), targets.split(self._rows_at_once), strict=True)
        return torch.cat([checkpoint(self._head_logps, *chunk, use_reentrant=False) for chunk in chunks])


def _head_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are computed at once.

    Each chunk reads the whole head twice, which a GPU waits for: there a chunk takes a sixteenth of the free memory,
    at most a gigabyte.
    """
    if device.type == "cpu":
        return max(1, LOGITS_AT_ONCE // vocabulary)
    logits = min(GPU_LOGITS_AT_ONCE, free_memory(device) // (16 * _BYTES_PER_LOGIT))
    return max(128, logits // vocabulary // 128 * 128)


@contextmanager
def _instead_of_backbone(backbone: torch.nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Let the backbone return `hidden` [1, K, D] within the block, instead of computing."""
    # The mixture-of-experts kind has every field that a model may look for.
    output = MoeModelOutputWithPast(last_hidden_state=hidden)
    # another library may have put a forward of its own on this very module
    before = backbone.__dict__.get("forward")
    backbone.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if before is None:
            del backbone.forward
        else:
            backbone.forward = before


@torch.no_grad()
def split(
    model: torch.nn.Module,
    device: torch.device,
    *,
    lm_head_is_frozen: bool,
    may_share: bool,
    may_pack: bool,
    precision: str,
) -> SplitModel:
    """Split a model; the halves, shared prompts and packing are each used only if they change no logit."""
    whole = SplitModel(model, device, splits=False, lm_head_is_frozen=lm_head_is_frozen)
    halves = SplitModel(model, device, splits=True, lm_head_is_frozen=lm_head_is_frozen)
    rows = probe_rows()
    is_same = agree(halves, rows, whole, rows, precision)
    found = halves if is_same else whole
    found.shares_prompts = is_same and may_share and _can_share(halves, whole, precision)
    found.packs = may_pack and _can_pack(found, precision)
    if found.packs and has_varlen(device, torch.float32 if precision == "float32" else torch.bfloat16):
        _try_varlen(found, precision)
    return found


def _try_varlen(model: SplitModel, precision: str) -> None:
    """Attend to packed rows without a mask if that gives the logits of rows of their own."""
    before = model.model.config._attn_implementation
    if before != "sdpa":
        return
    use_packed(model.model)
    model.uses_varlen = True
    if not _can_pack(model, precision):
        model.uses_varlen = False
        model.model.config._attn_implementation = before


def _can_share(halves: SplitModel, whole: SplitModel, precision: str) -> bool:
    """Whether attention has no window or state of its own, and shared prompts give the same logits."""
    layers = DynamicCache(config=halves.model.config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return False
    shared, plain = probe_pairs()
    return agree(halves, shared, whole, plain, precision)


def _can_pack(model: SplitModel, precision: str) -> bool:
    """Whether examples in one row get the logits of rows of their own."""
    packed, plain = probe_packed()
    return agree(model, packed, model, plain, precision)
