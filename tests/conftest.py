"""Shared set-up: a private cache, the fast BLAS before MLX, toy models and data built once a session."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# mlx-lm sets it when it is first imported, which would look like a variable that the test at hand leaves
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# SmolLM2 is imported into it once a session; nobody's own cache is read or written.
os.environ["MACFT_CACHE"] = tempfile.mkdtemp(prefix="macft-tests-")

# Before any test imports MLX: it loads OpenBLAS, without which MLX is a hundred times slower on Linux.
from support.data_folders import data_folder, qwen, skip_without_public_data  # noqa: F401
from support.isolation import isolated, pytest_fixture_setup  # noqa: F401
from support.mac import mac  # noqa: F401
from support.shuffle import pytest_addoption, pytest_report_header, shuffle  # noqa: F401
from support.tiny_models import write_model
from support.tiny_tokenizer import write_tiny_model
from support.toy_backend import one_thread, toy_settings, write_pairs, write_rows, write_toy_model

import macft.backends.mlx  # noqa: F401
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.training.run import train
from macft.weights.adapters.peft import read_adapter

# property tests draw the same cases each time, so that a change is what makes one fail
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
atexit.register(shutil.rmtree, os.environ["MACFT_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs absent public files; slow files first, so that no worker is left with one at the end."""
    skip_without_public_data(items)
    if (seed := config.getoption("--shuffle")) is not None:
        shuffle(items, seed)
        return
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """tiny_model("llama") is the folder of a tiny random llama, built once a session."""
    built: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in built:
            built[architecture] = write_model(tmp_path_factory.mktemp(architecture), architecture)
        return built[architecture]

    return get


@pytest.fixture(scope="module")
def small_threads() -> Iterator[None]:
    """For files that train toy models: `pytestmark = pytest.mark.usefixtures("small_threads")`."""
    with one_thread():
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that no reference is known; returns where references are kept."""
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy llama that trains and chats."""
    return write_toy_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of `model`, without its weights."""
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven preference pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 11)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An adapter of two modules that supervised training has moved away from the base."""
    parent = tmp_path_factory.mktemp("adapter")
    folder = parent / "run"
    with one_thread():
        train(toy_settings(model, write_rows(parent / "rows.jsonl"), folder, "torch", lora_target="q_proj,v_proj"))
    assert max(np.abs(value).max() for name, value in read_adapter(folder).state.items() if "_B" in name) > 1e-2
    return folder
