"""A saved adapter in; the shape a backend attaches to load it, and a warning if its base is another, out."""

from __future__ import annotations

import logging

from macft.backends.base import LoraSpec
from macft.weights.adapter import Adapter
from macft.weights.locate import ModelFolder, weights_hash

logger = logging.getLogger("macft")


def spec_of_adapter(adapter: Adapter, dropout: float = 0.0) -> LoraSpec:
    """The spec that a saved adapter fits."""
    config = adapter.config
    return LoraSpec(
        rank=config.rank,
        alpha=config.alpha,
        dropout=dropout,
        target=config.target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def warn_of_other_base(adapter: Adapter, base: ModelFolder) -> None:
    """One warning when an adapter was trained on weights other than these."""
    if adapter.base_hash is not None and adapter.base_hash != weights_hash(base.path):
        logger.warning(
            "%s was trained on %s, whose weights are not those of %s",
            adapter.folder,
            adapter.config.base,
            base.name,
        )
