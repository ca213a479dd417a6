"""The reference of a preference run: what it says, when it is computed again, and that one model is in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.pair_oracle import scores
from support.toy_backend import ENGINES, curve, toy_settings, write_toy_model

from macft import system
from macft.backends import load_model
from macft.training import reference, run
from macft.training.prepare import prepare
from macft.training.run import train

pytestmark = pytest.mark.usefixtures("small_threads", "cache")

# of 11 pairs, two a batch
PASSES = 6


@pytest.fixture(scope="module")
def data(pair_data) -> Path:
    return pair_data


class _Watched:
    """A model that records what it is asked for."""

    def __init__(self, model: Any, calls: list[str]):
        self._inner = model
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def logps(self, *arguments: Any) -> np.ndarray:
        self._calls.append("logps")
        return self._inner.logps(*arguments)

    def train_step(self, *arguments: Any, **keys: Any) -> Any:
        self._calls.append("step")
        return self._inner.train_step(*arguments, **keys)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What the engines of the test's runs are asked for, in order."""
    found: list[str] = []
    models: list[weakref.ref] = []

    def load(*arguments: Any) -> _Watched:
        gc.collect()
        found.append(f"load beside {sum(model() is not None for model in models)}")
        loaded: Any = load_model(*arguments)
        models.append(weakref.ref(loaded._model))
        return _Watched(loaded, found)

    for module in (run, reference):
        monkeypatch.setattr(module, "load_model", load)
    return found


def one_step(model: Path, data: Path, output_dir: Path, engine: str, **keys):
    """A run of one step that takes in all pairs."""
    return toy_settings(
        model, data, output_dir, engine, **{"stage": "dpo", "max_steps": 1, "gradient_accumulation_steps": 6, **keys}
    )


def passes(calls: list[str], settings) -> int:
    """Forward passes of a run before its first step."""
    calls.clear()
    train(settings)
    return calls[: calls.index("step")].count("logps")


# ---- what it says


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_columns_are_what_transformers_computes(engine, kind, model, data, adapter, cache, tmp_path):
    """All pairs, held-out ones too, each at its own place although the passes are sorted by length."""
    start = adapter if kind == "adapter" else None
    keys = {"stage": "foodpo", "adapter_name_or_path": str(start) if start else None, "val_size": 4}
    settings = one_step(model, data, tmp_path / "out", engine, **keys)
    train(settings)
    prepared = prepare(settings)
    files = {len(columns): columns for columns in (load_file(path)["columns"] for path in cache.iterdir())}
    assert sorted(files) == [4, 7]
    for pairs in (prepared.train, prepared.valid):
        np.testing.assert_allclose(files[len(pairs)], scores(model, pairs, start), rtol=1e-5)


# ---- when it is computed

REUSED = {
    "the same run": {},
    "what the loss does with it": {"pref_beta": 0.3, "pref_loss": "ipo", "learning_rate": 1e-3},
    "smoothing and the supervised loss": {"dpo_label_smoothing": 0.1, "pref_ftx": 0.5},
    "another seed": {"seed": 7},
    "another shape of a fresh adapter": {"lora_rank": 2, "lora_target": "q_proj", "use_rslora": True},
    "DoRA": {"use_dora": True},
    "a cutoff that cuts nothing": {"cutoff_len": 1000},
    "other batches": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    "a foodpo without strengths": {"stage": "foodpo", "pref_beta_scale": 0.0},
}
NEW = {
    "another precision": {"bf16": True},
    "another quantization": {"quantization_bit": 8},
    "a loaded adapter": {"adapter_name_or_path": "ADAPTER"},
    "a loaded adapter below a new one": {"adapter_name_or_path": "ADAPTER", "create_new_adapter": True},
    # in 16 bits it rounds at other places
    "full fine-tuning": {"finetuning_type": "full", "learning_rate": 1e-4},
    "another model as reference": {"ref_model": "OTHER"},
    "an adapter on another model as reference": {"ref_model": "OTHER", "ref_model_adapters": "ADAPTER"},
    "ld_alpha": {"ld_alpha": 0.5},
    "prompts": {"stage": "foodpo"},
    "another cutoff": {"cutoff_len": 30},
    "fewer pairs": {"max_samples": 10},
    "another template": {"template": "empty"},
}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("other"), seed=1)


def filled_in(keys: dict, adapter: Path, other: Path) -> dict:
    return {key: {"ADAPTER": str(adapter), "OTHER": str(other)}.get(str(value), value) for key, value in keys.items()}


@pytest.mark.slow
@pytest.mark.torch
def test_a_later_run_computes_again_only_what_depends_on_its_settings(
    model, data, adapter, other, cache, calls, tmp_path
):
    assert passes(calls, one_step(model, data, tmp_path / "first", "torch")) == PASSES
    assert calls[-1] == "step"
    for number, (kind, keys) in enumerate(REUSED.items()):
        settings = one_step(model, data, tmp_path / f"reused-{number}", "torch", **keys)
        assert passes(calls, settings) == 0, kind
    assert len(list(cache.iterdir())) == 1
    for number, (kind, keys) in enumerate(NEW.items(), start=1):
        settings = one_step(model, data, tmp_path / f"new-{number}", "torch", **filled_in(keys, adapter, other))
        assert passes(calls, settings) == (5 if kind == "fewer pairs" else PASSES), kind
        assert len(list(cache.iterdir())) == 1 + number, kind
    # as a reference they were the same before
    assert passes(calls, one_step(other, data, tmp_path / "other", "torch")) == 0
    named = one_step(model, data, tmp_path / "named", "torch", ref_model_adapters=str(adapter))
    assert passes(calls, named) == 0


@pytest.mark.mlx
def test_one_other_word_in_one_answer_is_another_reference(model, data, calls, tmp_path):
    assert passes(calls, one_step(model, data, tmp_path / "first", "mlx")) == PASSES
    rows = data.read_text().splitlines()
    rows[4] = rows[4].replace('"}]}', ' hello"}]}')
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    assert passes(calls, one_step(model, tmp_path / "other.jsonl", tmp_path / "second", "mlx")) == PASSES


@pytest.mark.mlx
@pytest.mark.torch
def test_each_engine_has_its_own_reference(model, data, calls, tmp_path):
    assert passes(calls, one_step(model, data, tmp_path / "torch", "torch")) == PASSES
    assert passes(calls, one_step(model, data, tmp_path / "mlx", "mlx")) == PASSES


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_without_a_reference_ask_for_none(engine, model, data, cache, calls, tmp_path):
    for loss in ("orpo", "simpo"):
        assert passes(calls, one_step(model, data, tmp_path / loss, engine, pref_loss=loss)) == 0
    assert not cache.exists()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


def changed(change):
    def apply(path: Path) -> None:
        save_file(change(load_file(path)), path)

    return apply


DAMAGE = {
    "cut short": cut_short,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": garbage,
    "of fewer pairs": changed(lambda state: {"columns": state["columns"][1:]}),
    "another name": changed(lambda state: {"rows": state["columns"]}),
    "another type": changed(lambda state: {"columns": state["columns"].astype(np.float32)}),
    "not a number": changed(lambda state: {"columns": np.where(state["columns"] < -90, np.nan, state["columns"])}),
    "perplexities lost": changed(lambda state: {"columns": state["columns"] * [1, 1, np.nan]}),
}


@pytest.mark.mlx
def test_a_damaged_cache_is_computed_again(model, data, cache, calls, tmp_path):
    assert passes(calls, one_step(model, data, tmp_path / "first", "mlx", stage="foodpo")) == PASSES
    [path] = cache.iterdir()
    whole = path.read_bytes()
    for number, (kind, damage) in enumerate(DAMAGE.items()):
        damage(path)
        assert path.read_bytes() != whole, kind
        assert passes(calls, one_step(model, data, tmp_path / str(number), "mlx", stage="foodpo")) == PASSES, kind
        assert path.read_bytes() == whole, kind
        assert curve(tmp_path / str(number)) == curve(tmp_path / "first"), kind


# ---- where it is kept


@pytest.mark.mlx
def test_macft_cache_says_where_and_the_home_folder_is_the_default(model, data, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(one_step(model, data, tmp_path / "named", "mlx"))
    assert len(list(cache.iterdir())) == 1 and not (tmp_path / "home").exists()
    monkeypatch.delenv("MACFT_CACHE")
    train(one_step(model, data, tmp_path / "unnamed", "mlx"))
    [path] = (tmp_path / "home" / ".cache" / "macft" / "reference").iterdir()
    assert path.read_bytes() == next(cache.iterdir()).read_bytes()


@pytest.mark.mlx
def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(model, data, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path / "file"))
    train(one_step(model, data, tmp_path / "out", "mlx"))
    assert len(curve(tmp_path / "out")) == 1
    said = next(record.message for record in caplog.records if "reference: not cached" in record.message)
    assert said.startswith(f"reference: not cached for later runs: {tmp_path / 'file' / 'reference'}")


# ---- memory


@pytest.mark.parametrize(
    ("keys", "loads"),
    [
        ({}, 1),
        ({"finetuning_type": "full", "learning_rate": 1e-4}, 1),
        ({"adapter_name_or_path": "ADAPTER"}, 1),
        ({"adapter_name_or_path": "ADAPTER", "create_new_adapter": True}, 1),
        ({"ref_model": "OTHER"}, 2),
        ({"ref_model_adapters": "ADAPTER"}, 2),
        ({"ref_model": "OTHER", "finetuning_type": "full", "learning_rate": 1e-4}, 2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_two_models_are_in_memory_at_once(engine, keys, loads, model, data, adapter, other, calls, tmp_path):
    train(one_step(model, data, tmp_path / "out", engine, **filled_in(keys, adapter, other)))
    assert calls == [*(["load beside 0"] + ["logps"] * PASSES if loads == 2 else []), "load beside 0"] + (
        ["logps"] * PASSES if loads == 1 else []
    ) + ["step"]


@pytest.mark.mlx
def test_a_named_reference_that_is_known_is_not_loaded_again(model, data, other, calls, tmp_path):
    train(one_step(model, data, tmp_path / "first", "mlx", ref_model=str(other)))
    assert calls.count("logps") == PASSES
    calls.clear()
    train(one_step(model, data, tmp_path / "second", "mlx", ref_model=str(other)))
    assert calls.count("logps") == 0


@pytest.mark.mlx
def test_a_mac_stays_awake_from_loading_on(model, data, calls, tmp_path, monkeypatch):
    """Scoring the reference may take hours too; `caffeinate` is a Mac's program, so one is made up."""

    class Caffeinate:
        def __init__(self, command: list[str]):
            calls.append(" ".join(command[:3]))

        def terminate(self) -> None:
            calls.append("end")

    monkeypatch.setattr(system, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(system, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
    monkeypatch.setattr(system, "subprocess", SimpleNamespace(Popen=Caffeinate))
    train(one_step(model, data, tmp_path / "out", "mlx"))
    assert calls == ["caffeinate -i -m", "load beside 0", *["logps"] * PASSES, "step", "end"]
