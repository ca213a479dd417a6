"""A test that leaves the process changed fails by name, and the test after it sees nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import CHECKOUT
from support.shuffle import shuffle

HEADER = """
    import colorsys, json, logging, os, random, signal, sys, types
    from pathlib import Path
    import mlx.core as mx, numpy as np, pytest, torch
    from macft.data.templates.fast_render import compile_template
    from macft.data.templates.chat_template import ChatTemplate

    logger = logging.getLogger("macft")
"""
# kind -> (what a test does, the beginning of its problem, what holds for the test after it)
LEAKS = {
    "level": ("logger.setLevel('INFO')", "the logger macft at INFO", "logger.level == 0"),
    "root": ("logging.root.setLevel(10)", "the logger root at DEBUG", "logging.root.level == 30"),
    "child": (
        "logging.getLogger('macft.part').setLevel(10)",
        "the logger macft.part at DEBUG",
        "logging.getLogger('macft.part').level == 0",
    ),
    "remembered": (
        "logger.setLevel('INFO'); logger.isEnabledFor(20); logger.level = 0",
        "the logger macft answering as for another level",
        "not logger.isEnabledFor(20)",
    ),
    "handlers": (
        "logger.addHandler(logging.NullHandler())",
        "the logger macft with handlers [<NullHandler (NOTSET)>], found []",
        "not logger.handlers",
    ),
    "propagate": ("logger.propagate = False", "the logger macft with propagate False", "logger.propagate"),
    "added": ("os.environ['NEW'] = '1'", "NEW=1 in os.environ", "'NEW' not in os.environ"),
    "changed": ("os.environ['OLD'] = '2'", "OLD=2 in os.environ", "os.environ['OLD'] == '1'"),
    "deleted": ("del os.environ['OLD']", "no OLD in os.environ", "os.environ['OLD'] == '1'"),
    "folder": ("os.chdir('/')", "the current folder at /", "Path('inner.xml').parent.resolve() != Path('/')"),
    "path": ("sys.path.insert(0, '/nowhere')", "sys.path changed: +/nowhere", "'/nowhere' not in sys.path"),
    "argv": ("sys.argv = ['x']", "sys.argv at ['x']", "len(sys.argv) > 1"),
    "replaced": (
        "sys.modules['colorsys'] = types.ModuleType('colorsys')",
        "the module colorsys replaced",
        "sys.modules['colorsys'] is colorsys",
    ),
    "removed": (
        "del sys.modules['colorsys']",
        "the module colorsys removed from sys.modules",
        "sys.modules['colorsys'] is colorsys",
    ),
    "signals": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "a handler of SIGTERM",
        "signal.getsignal(signal.SIGTERM) is signal.SIG_DFL",
    ),
    "threads": (
        "torch.set_num_threads(torch.get_num_threads() + 1)",
        "torch's threads at 2, found 1",
        "torch.get_num_threads() == 1",
    ),
    "type": (
        "torch.set_default_dtype(torch.float64)",
        "torch's default type at torch.float64",
        "torch.get_default_dtype() is torch.float32",
    ),
}
# name -> what no test is blamed for; each runs after the others
ALLOWED = {
    "numbers_1": "drawn.append((random.random(), np.random.rand(), float(torch.rand(1)), float(mx.random.uniform())))",
    "numbers_2": "drawn.append((random.random(), np.random.rand(), float(torch.rand(1)), float(mx.random.uniform())))",
    "numbers_3": "assert drawn[0] == drawn[1]",
    "shared_numbers": "assert shared_1 == shared_2 == drawn[0][0]",
    "cache_1": "compile_template(ChatTemplate('x', name='x', special_map={})); assert cached() == 1",
    "cache_2": "assert cached() == 0",
    "import_1": "import wave",
    "import_2": "assert 'wave' in sys.modules",
    "shared_settings": "assert os.environ['SHARED'] == '1' and logger.level == 10",
    "after_shared_settings": "assert os.environ['SHARED'] == '1' and logger.level == 10",
    "undone": "monkeypatch.setenv('OLD', '3'); monkeypatch.chdir('/'); caplog.set_level(20, logger='macft')",
}
FIXTURES = """
    drawn = []

    def cached():
        return compile_template.cache_info().currsize

    @pytest.fixture(scope="module")
    def shared_1():
        return random.random()

    @pytest.fixture(scope="module")
    def shared_2():
        return random.random()

    @pytest.fixture(scope="module")
    def shared_settings():
        os.environ["SHARED"] = "1"
        logger.setLevel(10)
        yield
        del os.environ["SHARED"]
        logger.setLevel(0)
"""
REQUESTS = {
    "shared_numbers": "shared_1, shared_2",
    "shared_settings": "shared_settings",
    "after_shared_settings": "shared_settings",
    "undone": "monkeypatch, caplog",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> problem of each test of a small suite, run with the guard of this one; "" if it passed."""
    folder = tmp_path_factory.mktemp("inner")
    tests = [f"def test_{name}(): {code}\n\ndef test_after_{name}(): assert {after}"
             for name, (code, _, after) in LEAKS.items()]  # fmt: skip
    tests += [f"def test_{name}({REQUESTS.get(name, '')}): {code}" for name, code in ALLOWED.items()]
    source = [textwrap.dedent(HEADER), textwrap.dedent(FIXTURES), *tests]
    (folder / "test_inner.py").write_text("\n\n".join(source), encoding="utf-8")
    (folder / "conftest.py").write_text(
        "import macft.backends.mlx\nfrom support.isolation import isolated, pytest_fixture_setup\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=inner.xml", "test_inner.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OLD": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (folder / "inner.xml").is_file(), done.stdout + done.stderr
    found: dict[str, str] = {}
    for case in ElementTree.parse(folder / "inner.xml").iter("testcase"):
        name = case.attrib["name"].removeprefix("test_")
        found[name] = found.get(name, "") + "".join(part.attrib.get("message", "") for part in case)
    return found


@pytest.mark.parametrize("kind", LEAKS)
def test_what_a_test_leaves_is_named_and_put_back(problems: dict[str, str], kind: str) -> None:
    assert f"the test leaves {LEAKS[kind][1]}" in problems[kind]
    assert problems[f"after_{kind}"] == ""


@pytest.mark.parametrize("name", ALLOWED)
def test_numbers_caches_imports_and_shared_fixtures_are_no_problem(problems: dict[str, str], name: str) -> None:
    assert problems[name] == ""


def test_a_seed_gives_an_order_in_which_files_stay_whole() -> None:
    def order(seed: str) -> list[str]:
        items = [SimpleNamespace(path=Path(name), name=f"{name}{i}") for name in "abcd" for i in range(9)]
        shuffle(items, seed)
        return [item.name for item in items]

    assert order("1") == order("1") != order("2")
    assert sorted(order("1")) == sorted(order("2")) != order("1")
    assert len("".join(name[0] for name in order("1")).replace("a" * 9, "").replace("b" * 9, "")) == 18
