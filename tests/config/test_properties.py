"""Any keys that go together are written to YAML and read back the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from macft.config.checks import contradictions
from macft.config.load import dump_yaml, load_config
from macft.config.settings import SCHEDULE_OPTIONS, Settings

REQUIRED = {"model_name_or_path": "m", "dataset": "d.jsonl", "output_dir": "o"}
# an x in front: bare words such as null, False or 0E0 are no text
TEXTS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
    .map("x".__add__)
    .filter(lambda t: t.strip() == t)
)
OPTIONS = sorted({name for names in SCHEDULE_OPTIONS.values() for name in names})


def bounds(key: str) -> tuple[float, float]:
    """The least and the greatest value that a test takes for a number."""
    low, high = -1e6, 1e6
    for limit in Settings.model_fields[key].metadata:
        if isinstance(limit, Ge | Gt):
            low = limit.ge if isinstance(limit, Ge) else limit.gt + 1e-9
        if isinstance(limit, Le | Lt):
            high = limit.le if isinstance(limit, Le) else limit.lt - 1e-9
    return low, high


def strategy(key: str, annotation: Any) -> st.SearchStrategy[Any]:
    low, high = bounds(key)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is list:
        return st.lists(st.integers(1, 8), min_size=1, max_size=3).map(lambda n: [i / sum(n) for i in n])
    if get_origin(annotation) is dict:
        values = st.floats(1e-9, 1) if key == "lr_scheduler_kwargs" else st.integers(1, 99) | TEXTS
        return st.dictionaries(st.sampled_from(OPTIONS), values, max_size=2)
    parts = get_args(annotation)
    if parts:
        return st.one_of(*(strategy(key, part) for part in parts))
    simple = {
        NoneType: st.none(),
        bool: st.booleans(),
        str: TEXTS,
        int: st.integers(int(low + 0.5), int(high)),
        float: st.floats(low, high, allow_nan=False),
    }
    return simple[annotation]


ANY = st.fixed_dictionaries(
    {},
    optional={
        key: strategy(key, field.annotation)
        for key, field in Settings.model_fields.items()
        if key not in ("output_dir", "model_name_or_path")
    },
)


def that_go_together(drawn: dict[str, Any]) -> dict[str, Any]:
    """As many of the drawn keys as can be set at once."""
    kept = dict(REQUIRED)
    for key, value in drawn.items():
        if not contradictions(Settings(**kept | {key: value})):
            kept[key] = value
    return kept


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(ANY)
def test_any_keys_that_go_together_survive_yaml(drawn):
    values = that_go_together(drawn)
    expected = Settings(**values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        read = load_config(path, [])
        assert read == expected
        path.write_text(dump_yaml(read), encoding="utf-8")
        again = load_config(path, [])
        assert again.model_dump(exclude={"lora_alpha"}) == expected.model_dump(exclude={"lora_alpha"})
        assert again.alpha == expected.alpha


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(ANY)
def test_the_command_line_says_the_same_as_the_file(drawn):
    values = that_go_together(drawn)
    assert load_config(None, [f"{key}={as_word(key, value)}" for key, value in values.items()]) == Settings(**values)


def as_word(key: str, value: Any) -> str:
    """A value as it is written on the command line: text as it stands, where a key takes nothing else."""
    if isinstance(value, str) and Settings.model_fields[key].annotation in (str, str | None):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
