"""Let decoder layers keep only their large matrix products for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# An inner dimension this small is a LoRA's rank: its product costs next to nothing to compute again.
_MAX_RANK = 64
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def recompute_elementwise(model: torch.nn.Module) -> None:
    """Let every block compute norms, rotations, activations and LoRA products again in the backward pass.

    Every operation passes through Python, so this is for a CPU, where operations take far longer than that. A model
    whose decoder has no list of blocks is left as it is.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    lists = [child for child in model.get_decoder().children() if isinstance(child, torch.nn.ModuleList)]
    for block in max(lists, key=len, default=()):
        block.forward = _checkpointed(block.forward, contexts)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=True, **kwargs)

    return run


def _policy(_context: Any, operation: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operation in _PRODUCTS and args[-2].shape[-1] > _MAX_RANK and args[-1].shape[-1] > _MAX_RANK:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
