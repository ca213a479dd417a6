"""The tables of architectures in; one table of which model comes from where and goes where, for the docs, out."""

from __future__ import annotations

from macft.weights.gguf_architectures import ARCHITECTURES
from macft.weights.litgpt_config import model_types
from macft.weights.mlx_layout import LAYOUTS


def conversion_table() -> str:
    """Markdown: for each model type, which of the conversions know it; merging into HF layout knows all."""
    from_gguf = {architecture.model_type for architecture in ARCHITECTURES.values()}
    from_litgpt = set(model_types())
    rows = [
        f"| {name} | {_said(name in LAYOUTS)} | {_said(name in from_gguf)} | {_said(name in from_litgpt)} |"
        for name in sorted({*LAYOUTS, *from_gguf, *from_litgpt})
    ]
    head = ["| model type | HF <-> MLX, MLX-quantized | GGUF -> HF, MLX | litgpt -> HF, MLX |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _said(is_known: bool) -> str:
    return "yes" if is_known else "-"
