"""The preview shows which characters are trained, in colours or marks, and hides nothing."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from test_template import build, chat
from tiny_tokenizer import TEMPLATES, write_tiny_model

from macft.data.formats import Example
from macft.data.preview import preview, preview_json
from macft.data.tokenizer import Tokenizer, load_tokenizer
from macft.errors import UsageError

CHATML = build(TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def shown(tokenizer: Tokenizer, *contents: str, colours: bool = False, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=colours, color_system="standard" if colours else None, width=40)
    examples = [Example((), "x:1"), Example(tuple(chat(*contents)), "chat.jsonl:7")]
    preview(examples, 1, tokenizer, CHATML, **{"cutoff_len": 999, **options}, console=console)
    return file.getvalue()


def test_a_pipe_shows_trained_text_in_marks(tokenizer: Tokenizer) -> None:
    assert shown(tokenizer, "a", "b") == (
        "<|im_start|>user⏎\na<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦b<|im_end|>⏎\n⟧\n"
        "chat.jsonl:7: 12 tokens, 3 trained (25.0%), 0 straddling, not shortened, "
        "special tokens inside content: none\n"
    )


def test_a_terminal_shows_trained_text_in_green(tokenizer: Tokenizer) -> None:
    text = shown(tokenizer, "a", "b", colours=True)
    assert "\x1b[1;32mb<|im_end|>⏎" in text and "⟦" not in text
    assert "\x1b" not in text[: text.index("\x1b[1;32m")]


def test_no_color_falls_back_to_marks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦b<|im_end|>⏎\n⟧" in shown(tokenizer, "a", "b", colours=True)


def test_markup_links_and_emoji_codes_are_plain_text(tokenizer: Tokenizer) -> None:
    content = "[bold red]x[/] [link=http://y]z[/link] :smile: [/nothing]"
    assert content in shown(tokenizer, content, "b") and f"⟦{content}<" in shown(tokenizer, "a", content)


def test_invisible_characters_are_seen_and_cannot_steer_the_terminal(tokenizer: Tokenizer) -> None:
    text = shown(tokenizer, "a\t\x1b[2J\u200b\u00a0\r\n", "你好 𠮷")
    assert "a⇥<U+001B>[2J<U+200B><U+00A0><U+000D>⏎\n<|im_end|>" in text
    assert "⟦你好 𠮷<|im_end|>" in text and "\x1b" not in text


def test_long_lines_are_not_broken(tokenizer: Tokenizer) -> None:
    assert "word " * 60 in shown(tokenizer, "word " * 60, "b")


def test_what_happened_to_the_row_is_said(tokenizer: Tokenizer) -> None:
    assert "user text shortened" in shown(tokenizer, "one two three", "b", cutoff_len=13)
    cut = shown(tokenizer, "one two three", "four five six", cutoff_len=10)
    assert "10 tokens, 2 trained (20.0%), 0 straddling, user text emptied and the last answer cut" in cut
    assert cut.startswith("<|im_start|>user⏎\n<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦f")
    assert shown(tokenizer, "a</s><s></s>", "b").endswith("special tokens inside content: </s>, <s>\n")
    assert "1 straddling" in shown(tokenizer, "a", "\n\nb")
    assert "⟦user⏎" in shown(tokenizer, "a", "b", train_on_prompt=True)


def test_json_holds_the_same(tokenizer: Tokenizer) -> None:
    examples = [Example(tuple(chat("a", "你𠮷", "c", "d")), "chat.jsonl:7")]
    value = preview_json(examples, 0, tokenizer, CHATML, cutoff_len=999, mask_history=True)
    assert json.loads(json.dumps(value)) == value
    text = CHATML.render(examples[0].messages)
    assert [piece["text"] for piece in value["pieces"]] == [text[:-12], text[-12:]]
    assert [piece["trained"] for piece in value["pieces"]] == [False, True]
    assert text[-12:] == "d<|im_end|>\n"
    assert value["tokens"] == tokenizer.encode(text).ids
    assert value["num_trained"] == sum(value["loss_mask"]) == 3
    assert value["num_tokens"] == len(value["loss_mask"]) and value["source"] == "chat.jsonl:7"


@pytest.mark.parametrize("index", [-1, 1])
def test_a_row_that_is_not_there_is_refused(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(UsageError, match=f"row {index}: there are 1 rows, wanted 0 to 0"):
        preview_json([Example((), "x:1")], index, tokenizer, CHATML, cutoff_len=9)


def test_cut_rows_without_targets_still_show(tokenizer: Tokenizer) -> None:
    assert "3 tokens, 0 trained (0.0%)" in shown(tokenizer, "one two", "b", cutoff_len=3)
