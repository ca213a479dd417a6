"""Read what a folder says of how a program other than MLX quantized it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Files beside config.json that older programs describe it in.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def described(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The description with its `quant_method`, from config.json or as files beside it imply; None where there is none.

    The places are those that transformers and mlx-lm look in.
    """
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, dict) else [config]
    for place in places:
        found = place.get("quantization_config") or place.get("compression_config")
        if isinstance(found, dict):
            by_bits = found.get("load_in_8bit") or found.get("load_in_4bit")
            return {"quant_method": "bitsandbytes", **found} if by_bits else found
    for name, method in _FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method}
    return None
