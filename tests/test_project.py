"""Habits of the project that no other tool holds: sizes, docstrings, prints, paths, pickles."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from support.commands import CHECKOUT
from support.paths import project_files

MODULES = sorted((CHECKOUT / "macft").rglob("*.py"))
FILES = [name for name in project_files() if not name.endswith((".png", ".svg", ".arrow"))]
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))

LONGEST_FILE = 400
LONGEST_FUNCTION = 80
MOST_MODULES = 14  # side by side in a folder
MOST_ROWS = 25  # of the tour in CONTRIBUTING.md
FOLDERS = sorted({path.parent for path in MODULES})
# modules that talk to the user on the terminal
MAY_PRINT = {"cli.py", "chat.py", "report.py", "preview.py"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every call in a module."""
    return [(node.lineno, ast.unparse(node.func)) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 50 and "macft/cli.py" in FILES and "README.md" in FILES


@each_module
def test_a_file_fits_in_four_hundred_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@each_module
def test_a_function_fits_on_a_screen(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


@each_module
def test_a_module_says_what_it_is_for(path):
    if path.name == "__init__.py" and not path.read_text(encoding="utf-8").strip():
        return
    docstring = ast.get_docstring(tree(path))
    assert docstring is not None, "no docstring"
    first = docstring.split("\n\n")[0]
    assert first.endswith("."), first


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_folder_can_be_looked_over(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


def test_the_tour_has_a_row_for_every_folder():
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = text[text.index("## Tour of the tree") : text.index("## How to add")]
    names = [name for row in re.findall(r"^\| (`.*?) \|", tour, flags=re.MULTILINE) for name in row.split(", ")]
    assert len(re.findall(r"^\| `", tour, flags=re.MULTILINE)) <= MOST_ROWS
    toured: set[Path] = set()
    root = CHECKOUT / "macft"
    parent = root
    for name in (name.strip("`") for name in names):
        # "`gguf/importer/`, `exporter/`": the second stands in the folder of the first
        path = root / name if (root / name).exists() else parent / name
        assert path.exists(), name
        parent = path.parent
        toured.add(path)
    assert set(FOLDERS) - toured == {root}
    assert {path for path in root.glob("*.py") if not path.name.startswith("__")} <= toured


# "Settings in; findings out.": what a module takes and gives, where a sentence should say what it does
IN_AND_OUT = re.compile(r"\b(?:in|goes in|go in)\b[,;][^.]*\bout\b\.?$|(?:goes|go|comes|come) (?:in|out)\b")


@each_module
def test_a_module_opens_with_one_plain_sentence(path):
    docstring = ast.get_docstring(tree(path))
    if docstring is not None:
        first = docstring.split("\n\n")[0]
        assert not IN_AND_OUT.search(first), first
        assert "\n" not in first and len(first) <= 117, first


def test_the_form_in_and_out_is_recognized():
    assert IN_AND_OUT.search("A table of rows in; what became of them, counted and in warnings, out.")
    assert IN_AND_OUT.search("Nothing goes in; findings about this machine come out.")
    assert not IN_AND_OUT.search("Write files without leaving anything out.")
    assert not IN_AND_OUT.search("Merge adapters in place, and write the result.")


# each engine has the classes of the contract under the same names
PER_ENGINE = {"SplitModel"}


def test_no_two_public_classes_have_one_name():
    names = Counter(
        node.name
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} - PER_ENGINE == set()


def test_no_test_imports_from_another_test_file():
    tests = sorted((CHECKOUT / "tests").rglob("*.py"))
    imported = {
        (path.name, node.module)
        for path in tests
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.rpartition(".")[2].startswith("test_")
    }
    assert imported == set()


@each_module
def test_public_functions_and_classes_are_documented(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree(path).body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if ast.get_docstring(node) is None] == []


@each_module
def test_only_the_terminal_modules_print(path):
    if path.name not in MAY_PRINT:
        assert [line for line, name in calls(path) if name == "print"] == []


@each_module
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path):
    forbidden = {"torch.load", "torch.save", "eval", "exec", "os.system"}
    assert [(line, name) for line, name in calls(path) if name in forbidden] == []
    source = tree(path)
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    trusted = [
        node.value.lineno
        for node in ast.walk(source)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle")
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert trusted == []


# a folder of one machine, written so that this file does not hold one itself
MACHINE_PATH = re.compile(r"(?<![\w.}:$/-])/(?:work|root|tmp|Users/\w+|home/\w+|opt)/\w")


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_path_of_one_machine(name):
    lines = (CHECKOUT / name).read_text(encoding="utf-8").splitlines()
    assert [f"line {i}: {line[:120]}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)] == []


def test_the_search_for_machine_paths_finds_one():
    assert MACHINE_PATH.search("see /" + "work/main") and MACHINE_PATH.search('"/' + 'tmp/x"')
    assert not MACHINE_PATH.search("https://host/work/x") and not MACHINE_PATH.search("a/tmp/x")


def test_every_test_module_says_what_it_proves():
    for path in sorted((CHECKOUT / "tests").rglob("*.py")):
        assert ast.get_docstring(tree(path)), path.name
