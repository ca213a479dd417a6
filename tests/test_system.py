"""On/off environment variables: one reading of them for the whole program."""

from __future__ import annotations

import pytest

from macft.errors import ConfigError
from macft.hub.models import asks_modelscope
from macft.hub.modelscope import is_offline
from macft.system import is_on


@pytest.mark.parametrize(
    ("value", "expected"),
    [(word, True) for word in ("1", "true", "YES", "On", "y")]
    + [(word, False) for word in ("0", "False", "no", "OFF", "n", "")],
)
def test_every_spelling_of_yes_and_no_is_read(value, expected, monkeypatch):
    for name, ask in (("USE_MODELSCOPE_HUB", lambda: asks_modelscope(None)), ("HF_HUB_OFFLINE", is_offline)):
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
