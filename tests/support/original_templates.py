"""The chat templates of published models that TRL ships, beside its variants with {% generation %} for training."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def original_names() -> list[str]:
    """The names of all, training variants included; none where TRL is not installed."""
    folder = _folder()
    return [] if folder is None else sorted(path.stem for path in folder.glob("*.jinja"))


def original(name: str) -> str:
    """The Jinja text of one."""
    folder = _folder()
    if folder is None:
        pytest.skip("trl is not installed: pip install trl")
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def _folder() -> Path | None:
    spec = find_spec("trl")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "chat_templates"
