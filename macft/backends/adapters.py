"""Say how an adapter on disk is attached to a base model, and check that it was trained on this one."""

from __future__ import annotations

import logging

from macft.backends.base import LoraSpec
from macft.errors import ModelError
from macft.weights.adapters.base_model import other_base_note
from macft.weights.adapters.experts import is_expert
from macft.weights.adapters.peft import Adapter, needs_merging
from macft.weights.folder import ModelFolder

logger = logging.getLogger("macft")


def spec_of_adapter(adapter: Adapter, dropout: float = 0.0) -> LoraSpec:
    """The spec that a saved adapter fits; ModelError names what no engine can attach an adapter to."""
    config = adapter.config
    if adapter.own.names:
        raise ModelError(needs_merging(adapter.folder, adapter.own))
    outside = [name for name in config.target_modules if _is_outside(name)]
    if outside:
        raise ModelError(
            f"{adapter.folder}: has adapters on {', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}; only "
            "linear layers inside the blocks can carry one here: merge it with macft export merged, and use the result"
        )
    return LoraSpec(
        rank=config.rank,
        alpha=config.alpha,
        dropout=dropout,
        target=config.target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def can_be_attached(adapter: Adapter) -> bool:
    """Whether an engine can put this adapter on the layers of a model, and need not merge it."""
    return not adapter.own.names and not any(_is_outside(target) for target in adapter.config.target_modules)


def _is_outside(target: str) -> bool:
    return target.rpartition(".")[2] in ("embed_tokens", "lm_head") or is_expert(target)


def check_base(adapter: Adapter, base: ModelFolder) -> None:
    """Warn when an adapter seems made for a model other than this one; ModelError when their tokens contradict."""
    if note := other_base_note(adapter, base):
        logger.warning("%s", note)
