"""Recognize and read an adapter folder, of PEFT or of mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from macft.errors import ModelError
from macft.weights.adapters.mlx_lm import MLX_WEIGHTS_NAME, read_mlx_adapter
from macft.weights.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter, read_json_config
from macft.weights.layouts.mlx import flat_config
from macft.weights.model_config import Config

AdapterFormat = Literal["mlx", "peft"]


def adapter_format(folder: Path) -> AdapterFormat:
    """The format of an adapter folder; ModelError if it is neither of the two."""
    is_mlx, is_peft = ((folder / name).exists() for name in (MLX_WEIGHTS_NAME, WEIGHTS_NAME))
    if is_mlx and not is_peft:
        return "mlx"
    if is_peft and not is_mlx:
        return "peft"
    raw = read_json_config(folder)
    if "peft_type" in raw:
        return "peft"
    if "lora_parameters" in raw or "fine_tune_type" in raw:
        return "mlx"
    raise ModelError(
        f"{folder / CONFIG_NAME}: no peft_type and no lora_parameters; expected an adapter of PEFT ({WEIGHTS_NAME}) or "
        f"of mlx-lm ({MLX_WEIGHTS_NAME})"
    )


def read_any_adapter(folder: Path, base_config: Config | None = None, *, with_saved: bool = False) -> Adapter:
    """Read an adapter of PEFT or mlx-lm; its state has PEFT's names and layout, one module per expert.

    `base_config`, the base's config.json, is needed for adapters on embeddings, heads and experts; `with_saved` is as
    in `read_adapter`. Raises ModelError naming everything in the folder that would be computed differently.
    """
    config = flat_config(base_config) if base_config is not None else None
    if adapter_format(folder) == "peft":
        return read_adapter(folder, config, with_saved=with_saved)
    return read_mlx_adapter(folder, config)
