"""The preview shows which characters are trained, in colors or marks, and hides nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.chat_templates import build, chat
from support.rows import write_lines
from support.tiny_tokenizer import TEMPLATES
from support.toy_backend import write_toy_model

from macft.data.formats.conversations import Example
from macft.data.formats.pairs import PairExample
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.row_preview import preview_example, preview_pair
from macft.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from macft.errors import DataError, UsageError
from macft.inspection.dataset import preview_source
from macft.inspection.preview import show

CHATML = build(TEMPLATES["chatml"])


def shown(tokenizer: Tokenizer, *contents: str, colors: bool = False, **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=colors, color_system="standard" if colors else None, width=40)
    example = Example(tuple(chat(*contents)), "chat.jsonl:7")
    show(preview_example(example, Encoding(tokenizer, CHATML, **{"cutoff_len": 999, **options})), console)
    return file.getvalue()


def test_a_pipe_shows_trained_text_in_marks(tokenizer: Tokenizer) -> None:
    assert shown(tokenizer, "a", "b") == (
        "<|im_start|>user⏎\na<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦b<|im_end|>⏎\n⟧\n"
        "chat.jsonl:7: 12 tokens, 3 trained (25.0%), 0 boundary tokens, not shortened, "
        "special tokens inside content: none\n"
    )


def test_a_terminal_shows_trained_text_in_green(tokenizer: Tokenizer) -> None:
    text = shown(tokenizer, "a", "b", colors=True)
    assert "\x1b[1;32mb<|im_end|>⏎" in text and "⟦" not in text
    assert "\x1b" not in text[: text.index("\x1b[1;32m")]


def test_no_color_falls_back_to_marks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦b<|im_end|>⏎\n⟧" in shown(tokenizer, "a", "b", colors=True)


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
    assert "10 tokens, 2 trained (20.0%), 0 boundary tokens, user text emptied and the last answer cut" in cut
    assert cut.startswith("<|im_start|>user⏎\n<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦f")
    assert shown(tokenizer, "a</s><s></s>", "b").endswith("special tokens inside content: </s>, <s>\n")
    assert "1 boundary tokens" in shown(tokenizer, "a", "\n\nb")
    assert "⟦user⏎" in shown(tokenizer, "a", "b", train_on_prompt=True)


def test_json_holds_the_same(tokenizer: Tokenizer) -> None:
    example = Example(tuple(chat("a", "你𠮷", "c", "d")), "chat.jsonl:7")
    value = preview_example(example, Encoding(tokenizer, CHATML, 999, mask_history=True)).value
    assert json.loads(json.dumps(value)) == value
    text = CHATML.render(example.messages)
    assert [piece["text"] for piece in value["pieces"]] == [text[:-12], text[-12:]]
    assert [piece["trained"] for piece in value["pieces"]] == [False, True]
    assert text[-12:] == "d<|im_end|>\n"
    assert value["tokens"] == tokenizer.encode(text).ids
    assert value["num_trained"] == sum(value["loss_mask"]) == 3
    assert value["num_tokens"] == len(value["loss_mask"]) and value["source"] == "chat.jsonl:7"


def test_cut_rows_without_targets_still_show(tokenizer: Tokenizer) -> None:
    assert "3 tokens, 0 trained (0.0%)" in shown(tokenizer, "one two", "b", cutoff_len=3)


# --- pairs

PAIR = PairExample(
    tuple(chat("a")),
    *[({"role": "assistant", "content": text},) for text in ("bc", "\x1b[1m")],
    source="p.jsonl:3",
)


def shown_pair(tokenizer: Tokenizer, example: PairExample, cutoff_len: int = 999) -> str:
    file = io.StringIO()
    show(preview_pair(example, Encoding(tokenizer, CHATML, cutoff_len)), Console(file=file, width=40))
    return file.getvalue()


def test_a_pair_shows_the_prompt_once_and_both_answers_in_marks(tokenizer: Tokenizer) -> None:
    assert shown_pair(tokenizer, PAIR) == (
        "--- prompt\n<|im_start|>user⏎\na<|im_end|>⏎\n<|im_start|>assistant⏎\n\n"
        "--- chosen\n⟦bc<|im_end|>⏎\n⟧\n"
        "--- rejected\n⟦<U+001B>[1m<|im_end|>⏎\n⟧\n"
        "p.jsonl:3: prompt 9 tokens, chosen 4 trained, rejected 6 trained, 0 boundary tokens, not shortened, "
        "special tokens inside content: none\n"
    )


def test_what_happened_to_the_pair_is_said(tokenizer: Tokenizer) -> None:
    system = PairExample(tuple(chat("one two", system="three")), PAIR.chosen, PAIR.rejected, "p.jsonl:3")
    assert "0 boundary tokens, user text shortened," in shown_pair(tokenizer, system, 23)
    assert "0 boundary tokens, user text emptied," in shown_pair(tokenizer, system, 22)
    assert "0 boundary tokens, user text emptied and an answer cut," in shown_pair(tokenizer, system, 20)
    assert "left out of training: cutoff_len 10 leaves no answer on one side," in shown_pair(tokenizer, system, 10)
    raw = load_template(Path(), {"eos_token": "</s>"}, "empty")
    hidden = PairExample(tuple(chat(" qu")), tuple(chat("", "ick")[1:]), tuple(chat("", " two")[1:]), "x:1")
    shown = preview_pair(hidden, Encoding(tokenizer, raw, 99)).value
    assert shown["fate"] == "refused in training: the prompt has no token of its own with this template"


def test_json_of_a_pair_holds_the_same(tokenizer: Tokenizer) -> None:
    value = preview_pair(PAIR, Encoding(tokenizer, CHATML, 999)).value
    assert json.loads(json.dumps(value)) == value
    text = CHATML.render([*PAIR.prompt, *PAIR.chosen])
    prompt, chosen = value["prompt"], value["chosen"]
    assert prompt["tokens"] + chosen["tokens"] == tokenizer.encode(text).ids
    assert "".join(piece["text"] for piece in prompt["pieces"] + chosen["pieces"]) == text
    assert [piece["trained"] for piece in prompt["pieces"] + chosen["pieces"]] == [False, True]
    assert [value[side]["num_tokens"] for side in ("prompt", "chosen", "rejected")] == [9, 4, 6]


def test_a_file_is_shown_by_what_it_holds_and_a_config_by_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_toy_model(tmp_path / "model")
    data, config = tmp_path / "p.jsonl", tmp_path / "run.yaml"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    config.write_text(json.dumps({"model_name_or_path": str(model), "dataset": str(data), "output_dir": "out"}))
    preview_source(str(data), (), 0, str(model), as_json=False)
    assert "--- rejected\n⟦c<|im_end|>" in capsys.readouterr().out
    preview_source(str(config), ("stage=foodpo",), 0, None, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [shown[side]["num_tokens"] for side in ("prompt", "chosen", "rejected")] == [9, 3, 3]
    for source, overrides in ((str(config), ()), (str(data), ("stage=sft",))):
        with pytest.raises(DataError, match="these are preference pairs; set stage: dpo"):
            preview_source(source, overrides, 0, str(model), as_json=True)


# --- whatever a data set holds


def shown_source(capsys: pytest.CaptureFixture[str], source: object, *overrides: str, model: Path, row: int = 0) -> Any:
    capsys.readouterr()
    preview_source(str(source), overrides, row, str(model), as_json=True)
    return json.loads(capsys.readouterr().out)


def test_a_name_in_dataset_info_is_shown_by_its_entry(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "rows.jsonl", {"q": "a", "r": "b", "worse": "c"})
    columns = {"query": "q", "response": "r"}
    info = {
        "chat": {"file_name": "rows.jsonl", "columns": columns},
        "pairs": {
            "file_name": "rows.jsonl",
            "ranking": True,
            "columns": {"query": "q", "chosen": "r", "rejected": "worse"},
        },
        "texts": {"file_name": "rows.jsonl", "columns": {"prompt": "q"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    place = f"dataset_dir={tmp_path}"
    value = shown_source(capsys, "chat", place, model=model)
    assert [piece["text"] for piece in value["pieces"] if piece["trained"]] == ["b<|im_end|>\n"]
    value = shown_source(capsys, "pairs", place, model=model)
    assert value["rejected"]["pieces"] == [{"text": "c<|im_end|>\n", "trained": True}]
    assert shown_source(capsys, "texts", place, model=model)["rows"] == 1


def test_texts_are_shown_with_the_token_that_ends_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"text": "a\x1bb"}, {"text": "hello </s>"})
    preview_source(str(path), ("cutoff_len=2",), 0, str(model), as_json=False)
    end = load_tokenizer(model).special_map["eos_token"]
    assert capsys.readouterr().out == (
        f"a⟦<U+001B>b{end}⟧\n"
        f"{path}:1: 4 tokens, 3 trained, 2 rows of cutoff_len 2, special tokens inside content: none\n"
    )
    value = shown_source(capsys, path, row=1, model=model)
    assert value["special_in_content"] == ["</s>"] and value["loss_mask"][0] is False
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert shown_source(capsys, tmp_path / "t.txt", row=1, model=model)["pieces"][-1]["text"] == f"wo{end}"


def test_tools_and_their_calls_are_shown_as_the_template_writes_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("human", "time?"), ("function_call", '{"name": "clock", "arguments": {}}'), ("observation", "12")]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in (*turns, ("gpt", "noon"))],
        "tools": json.dumps([{"name": "clock", "description": "the time"}]),
    }
    path = write_lines(tmp_path / "d.jsonl", row)
    value = shown_source(capsys, path, "template=qwen", model=model)
    text = "".join(piece["text"] for piece in value["pieces"])
    assert '"name": "clock", "description": "the time"' in text and "<tool_response>\n12\n" in text
    trained = [piece["text"] for piece in value["pieces"] if piece["trained"]]
    assert len(trained) == 2 and trained[0].startswith('<tool_call>\n{"name": "clock"') and "noon" in trained[1]


def test_a_row_is_shown_though_a_later_one_is_invalid(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a"})
    assert shown_source(capsys, path, model=model)["source"] == f"{path}:1"
    with pytest.raises(DataError, match='line 2: no "output"'):
        shown_source(capsys, path, row=1, model=model)
    with pytest.raises(UsageError, match="row 4: there are 1 rows, expected 0 to 0"):
        shown_source(capsys, write_lines(tmp_path / "one.jsonl", {"text": "a"}), row=4, model=model)
