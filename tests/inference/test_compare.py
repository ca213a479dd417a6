"""Prompt files, and answers side by side."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from macft.errors import DataError
from macft.inference.compare import as_json, compare
from macft.inference.prompts import read_prompts, user_turn, with_system


def test_prompt_files_hold_lines_or_rows(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\n  two\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [user_turn("one"), user_turn("  two")]
    messages = [*with_system(user_turn("q"), "s"), {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "one"}, {"messages": messages}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(tmp_path / "b.jsonl") == [user_turn("one"), messages[:2]]


def test_all_problems_of_a_prompt_file_are_named_at_once(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "one"}\n{"text": 1}\n{"messages": []}\n')
    with pytest.raises(DataError, match="2 lines hold no prompt") as caught:
        read_prompts(path)
    assert "line 2: found keys text; expected" in str(caught.value) and "line 3:" in str(caught.value)
    (tmp_path / "prompts.txt").write_text(" \n")
    with pytest.raises(DataError, match="has no prompt; write one per line"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=r"no such prompt file; did you mean .*prompts\.txt"):
        read_prompts(tmp_path / "promts.txt")


PROMPTS = ["who are you?", "say [bold]hi[/bold]"]
ANSWERS = {"smollm2-135m": ["I am SmolLM.", "[red]hi"], "+ runs/quickstart": ["我是小助手", "line\nnext"]}


def shown_at(width: int, *, terminal: bool) -> list[str]:
    file = io.StringIO()
    compare(PROMPTS, ANSWERS, Console(file=file, width=width, force_terminal=terminal, no_color=True))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_wide_console_shows_answers_side_by_side_with_brackets_as_typed(terminal):
    lines = shown_at(100, terminal=terminal)
    row = next(line for line in lines if "who are you?" in line)
    assert row.index("who are you?") < row.index("I am SmolLM.") < row.index("我是小助手")
    assert any("say [bold]hi[/bold]" in line and "[red]hi" in line for line in lines)
    assert ("│" in row) == terminal
    if not terminal:
        assert "\x1b" not in "".join(lines)


def test_a_narrow_console_gets_a_list():
    assert shown_at(60, terminal=False) == [
        "prompt 1: who are you?",
        "  [smollm2-135m]",
        "    I am SmolLM.",
        "  [+ runs/quickstart]",
        "    我是小助手",
        "",
        "prompt 2: say [bold]hi[/bold]",
        "  [smollm2-135m]",
        "    [red]hi",
        "  [+ runs/quickstart]",
        "    line",
        "    next",
    ]


def test_json_has_one_object_per_prompt():
    assert as_json(PROMPTS, ANSWERS)[1] == {
        "prompt": "say [bold]hi[/bold]",
        "answers": {"smollm2-135m": "[red]hi", "+ runs/quickstart": "line\nnext"},
    }
