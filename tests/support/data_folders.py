"""Give tests data of our own and, where a machine has them, the public files of the same names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.own_data import write_own_data
from support.own_qwen import write_own_qwen

VARIABLE = "MACFT_PUBLIC_DATA"
_QWEN = "qwen2.5-0.5b-instruct"
_FILES = (
    "alpaca_zh_demo.json",
    "identity.json",
    "dpo_zh_demo.json",
    "glaive_toolcall_zh_demo.json",
    "mini_qwen",
    _QWEN,
)
_OWN_AND_PUBLIC = ["own", pytest.param("public", marks=pytest.mark.public_data)]
# for tests that say something of the public files themselves; all others use ours alone
own_and_public_data = pytest.mark.parametrize("data_folder", _OWN_AND_PUBLIC, indirect=True)
own_and_public_qwen = pytest.mark.parametrize("qwen", _OWN_AND_PUBLIC, indirect=True)


def missing_public_data() -> str | None:
    """Why tests marked public_data cannot run; None if they can."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} is not set; it names the folder of {', '.join(_FILES)}"
    missing = [name for name in _FILES if not (Path(folder) / name).exists()]
    return f"{VARIABLE}={folder} has no {', '.join(missing)}" if missing else None


def skip_without_public_data(items: list[pytest.Item]) -> None:
    """Mark what needs the public files where they are not."""
    if reason := missing_public_data():
        for item in items:
            if item.get_closest_marker("public_data"):
                item.add_marker(pytest.mark.skip(reason=reason))


# of a module each: tests with a parameter of the session would be sorted by it, across files


@pytest.fixture(scope="module")
def data_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows as LLaMA-Factory ships them, and Parquet files of the mini_qwen data set."""
    if getattr(request, "param", "own") == "public":
        return Path(os.environ[VARIABLE])
    return write_own_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(scope="module")
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer files of Qwen2.5, or small ones of the same kind."""
    if getattr(request, "param", "own") == "public":
        return Path(os.environ[VARIABLE]) / _QWEN
    return write_own_qwen(tmp_path_factory.mktemp("own_qwen") / "model")
