"""On/off environment variables: one reading of them for the whole program."""

from __future__ import annotations

import pytest
from support.configs import load

from macft.data.sources.dataset_info import HubName
from macft.data.sources.hub import hub_files
from macft.errors import ConfigError, DataError, ModelError
from macft.hub.models import asks_modelscope
from macft.hub.modelscope import OFFLINE_VARIABLES, ModelScopeError, fetch_file, list_files, offline_variable
from macft.models.locate import resolve_adapter, resolve_model
from macft.system import is_on


@pytest.mark.parametrize(
    ("value", "expected"),
    [(word, True) for word in ("1", "true", "YES", "On", "y")]
    + [(word, False) for word in ("0", "False", "no", "OFF", "n", "")],
)
def test_every_spelling_of_yes_and_no_is_read(value, expected, monkeypatch):
    for name, ask in (
        ("USE_MODELSCOPE_HUB", lambda: asks_modelscope(None)),
        ("HF_HUB_OFFLINE", lambda: offline_variable() is not None),
    ):
        monkeypatch.setenv(name, value)
        assert is_on(name) is ask() is expected
        monkeypatch.delenv(name)
        assert not is_on(name)


def test_anything_else_names_the_variable_and_what_is_accepted(monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "modelscope")
    with pytest.raises(
        ConfigError, match="USE_MODELSCOPE_HUB is 'modelscope'; set it to one of 1, true, yes, on, y, or"
    ):
        asks_modelscope(None)


@pytest.mark.parametrize("value", ["1", "y", "On"])
@pytest.mark.parametrize("variable", OFFLINE_VARIABLES)
def test_every_hub_is_offline_at_every_spelling_of_yes(variable, value, monkeypatch, tmp_path):
    """huggingface_hub itself takes y for no."""
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path))
    monkeypatch.setenv(variable, value)
    doors = {
        "model": lambda: resolve_model("nobody/nothing", "hf"),
        "model of ModelScope": lambda: resolve_model("nobody/nothing", "modelscope"),
        "adapter": lambda: resolve_adapter("nobody/nothing"),
        "data": lambda: hub_files(HubName("hf", "nobody/nothing", None, None), "train", []),
        "data of ModelScope": lambda: hub_files(HubName("modelscope", "nobody/nothing", None, None), "train", []),
        "list": lambda: list_files("models", "nobody/nothing"),
        "file": lambda: fetch_file("models", "nobody/nothing", "a.json", 1),
    }
    for name, door in doors.items():
        with pytest.raises((ModelError, DataError, ModelScopeError), match=f"{variable} is set; unset it once"):
            door()
            pytest.fail(name)


@pytest.mark.parametrize(("value", "hub"), [("on", "modelscope"), ("Y", "modelscope"), ("off", "hf"), ("n", "hf")])
def test_commands_with_a_configuration_and_those_without_agree_on_the_hub(value, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("MACFT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", value)
    assert load().hub == hub
    place = {"modelscope": "the cache of ModelScope models", "hf": "the hub cache"}[hub]
    for chosen in (None, load().hub):
        with pytest.raises(ModelError, match=f"nobody/nothing: not in {place}"):
            resolve_model("nobody/nothing", chosen)
