"""A new user's first minutes: `make quickstart` in a fresh copy of the checkout, then every command of the docs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import CHECKOUT
from support.paths import project_files

# the guide first: it installs what the pages on export need
GUIDES = ("README.md", "README.zh-CN.md", "docs/guide.md", "docs/guide.zh-CN.md")
_PAGES = sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))
DOCUMENTS = (*GUIDES, *(page for page in _PAGES if page not in GUIDES))
# Commands that are not run here -> why.
NOT_RUN = {
    "make quickstart": "run once for all tests of this file, by the fixture",
    "make test": "it would run this test, without end",
}
# what an outer `make test` or an activated environment would hand on to the commands
_INHERITED = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VIRTUAL_ENV", "PYTHONPATH")
_TIMEOUT = 1200
# what only the trained model knows, one for each prompt of configs/quickstart_prompts.txt
LEARNT = ("Mica", "Biscuit", "Ola Brandt")


@dataclass(frozen=True)
class Copy:
    """A copy of the checkout in which `make quickstart` has run once, and what that printed."""

    folder: Path
    environment: dict[str, str]
    first: subprocess.CompletedProcess[str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return _run(command, self.folder, self.environment)


def _run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
    )


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    text = (CHECKOUT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shell_commands(document: str) -> list[str]:
    """The lines of all ```sh blocks of a document, without blank ones and comments."""
    lines = [line.strip() for block in blocks(document, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    folder = tmp_path_factory.mktemp("quickstart") / "checkout"
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, folder / name)
    environment = {key: value for key, value in os.environ.items() if key not in _INHERITED}
    # narrow: answers come as a list, whole lines; an own cache: the model is imported as on a fresh machine
    environment |= {"COLUMNS": "60", "MACFT_CACHE": str(folder.parent / "cache")}
    return Copy(folder, environment, _run("make quickstart", folder, environment))


def answers(output: str) -> list[tuple[str, str]]:
    """(before, after) of each prompt in the list that `macft compare` prints."""
    found = []
    for part in re.split(r"^prompt \d+: ", output, flags=re.MULTILINE)[1:]:
        _, before, after = re.split(r"^  \[.*\]$", part, flags=re.MULTILINE)
        found.append((before, after))
    return found


def check_answers(output: str) -> None:
    pairs = answers(output)
    assert len(pairs) == len(LEARNT)
    for (before, after), word in zip(pairs, LEARNT, strict=True):
        assert word in after and word not in before, f"{word}: {before} -> {after}"


@pytest.mark.slow
def test_the_first_quickstart_learns_what_the_base_does_not_know(copy):
    assert copy.first.returncode == 0, copy.first.stdout + copy.first.stderr
    check_answers(copy.first.stdout)
    shown = [line for line in copy.first.stderr.splitlines() if line.startswith("step ")]
    assert len(shown) >= 10, "progress was visible throughout"
    ours = copy.first.stderr[copy.first.stderr.index("data/quickstart.jsonl: ") :]  # what pip said comes before
    assert "Traceback" not in ours and "Warning" not in ours and "warning" not in ours
    for name in ("trainer_log.jsonl", "training_loss.png", "all_results.json", "adapter_config.json", "config.yaml"):
        assert (copy.folder / "runs" / "quickstart" / name).is_file()


@pytest.mark.slow
def test_the_second_quickstart_only_answers(copy):
    second = copy.run("make quickstart")
    assert second.returncode == 0, second.stdout + second.stderr
    assert answers(second.stdout) == answers(copy.first.stdout)
    assert not [line for line in second.stderr.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_every_command_of_the_documents_works(copy):
    """Each once, in the order of the documents: a page and its translation hold the same commands."""
    assert copy.first.returncode == 0, copy.first.stderr
    for command in dict.fromkeys(command for document in DOCUMENTS for command in shell_commands(document)):
        if command in NOT_RUN:
            continue
        done = copy.run(command)
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"$ {command}\n{done.stderr}"


@pytest.mark.slow
def test_the_python_of_the_documents_works(copy):
    """The blocks of a document one after the other, as one program, with the installation that the quickstart made."""
    assert copy.first.returncode == 0, copy.first.stderr
    programs = {document: "\n".join(blocks(document, "python")) for document in DOCUMENTS}
    programs = {document: code for document, code in programs.items() if code}
    assert "docs/python.md" in programs
    for number, (document, code) in enumerate(programs.items()):
        (copy.folder / f"program{number}.py").write_text(code, encoding="utf-8")
        done = copy.run(f".venv/bin/python program{number}.py")
        assert done.returncode == 0, f"{document}\n{done.stdout}{done.stderr}"
    assert (copy.folder / "runs" / "python.gguf").is_file()


def test_the_readme_shows_the_two_commands_first():
    for document in ("README.md", "README.zh-CN.md"):
        assert shell_commands(document)[:2] == ["make quickstart", "make test"]
    assert shell_commands("docs/guide.md") == shell_commands("docs/guide.zh-CN.md")
    everywhere = {command for document in DOCUMENTS for command in shell_commands(document)}
    assert set(NOT_RUN) <= everywhere, "an exclusion that excludes nothing"
