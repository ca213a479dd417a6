"""Shared set-up: a private cache, the fast BLAS before MLX, tiny models built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before any test imports MLX: it loads OpenBLAS, without which MLX is a hundred times slower on Linux.
from tiny_models import write_model

import macft.backends.mlx  # noqa: F401


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """tiny_model("llama") is the folder of a tiny random llama, built once a session."""
    built: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in built:
            built[architecture] = write_model(tmp_path_factory.mktemp(architecture), architecture)
        return built[architecture]

    return get
