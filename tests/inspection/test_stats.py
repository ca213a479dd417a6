"""`macft data stats` counts what training will see: tokens, lengths, and exactly what each cutoff_len takes away."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from support.data_rows import (
    iter_rows,
    read_examples,
    read_pairs,
    read_texts,
    tokenize_examples,
    tokenize_pairs,
    tokenize_texts,
)
from support.rows import write_lines
from support.tiny_tokenizer import write_tiny_model

from macft.commands.data import data
from macft.data.cache.workers import Encoder
from macft.data.kinds import DPO, PT, SFT, Kind
from macft.data.templates.chat_template import load_template
from macft.data.tokenization.encoding import Encoding
from macft.data.tokenization.report import TokenizeReport
from macft.data.tokenization.tokenizer import load_tokenizer
from macft.errors import DataError, UsageError
from macft.inspection.stats import Stats, histogram, measure

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "how", "are", "you", "today"]


def encoder(model: Path, kind: Kind) -> Encoder:
    tokenizer = load_tokenizer(model)
    return Encoder(kind, Encoding(tokenizer, load_template(model, tokenizer.special_map), 2048), {})


def some_text(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(1, most))))


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"instruction": some_text(rng, 40), "output": some_text(rng, 20)} for _ in range(count)]


def stats_of(model: Path, path: Path, kind: Kind, cutoffs: list[int], **keys: Any) -> Stats:
    return measure(iter_rows(kind, str(path), ""), encoder(model, kind), cutoffs, **keys)


def run(*arguments: object) -> None:
    data.main([str(argument) for argument in arguments], standalone_mode=False)


def test_tokens_and_lengths_are_those_that_training_counts(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", *chat_rows(30))
    stats = stats_of(model, path, SFT, [2048])
    one = encoder(model, SFT)
    tokenizer, template = one.encoding.tokenizer, load_template(model, one.encoding.tokenizer.special_map)
    rows, report = tokenize_examples(read_examples(str(path), "", None), tokenizer, template, cutoff_len=2048)
    assert (stats.rows, stats.tokens, stats.trained_tokens) == (30, report.tokens, report.trained_tokens)
    assert stats.lengths.tolist() == [len(row.tokens) for row in rows]
    assert stats.boundary_tokens == report.boundary_tokens and stats.turns == {1: 30}
    longest = int(np.argmax(stats.lengths))
    assert stats.longest[0] == (stats.lengths[longest], f"{path}:{longest + 1}") and len(stats.longest) == 5


@pytest.mark.parametrize("cutoff_len", [12, 24, 48, 96])
def test_a_cutoff_takes_what_training_reports(model: Path, tmp_path: Path, cutoff_len: int) -> None:
    path = write_lines(tmp_path / "d.jsonl", *chat_rows(40))
    stats = stats_of(model, path, SFT, [cutoff_len])
    [cut] = stats.cuts
    one = encoder(model, SFT)
    template = load_template(model, one.encoding.tokenizer.special_map)
    _, report = tokenize_examples(
        read_examples(str(path), "", None), one.encoding.tokenizer, template, cutoff_len=cutoff_len
    )
    assert _fate(cut) == _report(report)
    assert cut.left_out == report.without_target
    assert cut.tokens_lost == stats.tokens - report.tokens
    assert cut.too_long == (stats.lengths > cutoff_len).sum()


@pytest.mark.parametrize("cutoff_len", [16, 32, 64])
def test_a_cutoff_takes_of_pairs_what_training_reports(model: Path, tmp_path: Path, cutoff_len: int) -> None:
    rng = np.random.default_rng(3)
    rows = [
        {"prompt": some_text(rng, 30), "chosen": some_text(rng, 20), "rejected": some_text(rng, 20)} for _ in range(40)
    ]
    path = write_lines(tmp_path / "d.jsonl", *rows)
    stats = stats_of(model, path, DPO, [cutoff_len])
    [cut] = stats.cuts
    one = encoder(model, DPO)
    template = load_template(model, one.encoding.tokenizer.special_map)
    _, report = tokenize_pairs(read_pairs(str(path), "", None), one.encoding.tokenizer, template, cutoff_len=cutoff_len)
    assert _fate(cut) == _report(report)
    assert (cut.left_out, cut.tokens_lost) == (report.without_target, stats.tokens - report.tokens)


def _fate(cut: Any) -> tuple[int, int, int]:
    return cut.shortened, cut.emptied, cut.answer_cut


def _report(report: TokenizeReport) -> tuple[int, int, int]:
    return report.shortened, report.emptied, report.answer_cut


@pytest.mark.parametrize("packing", [True, False])
def test_texts_fill_the_rows_that_training_makes_of_them(model: Path, tmp_path: Path, packing: bool) -> None:
    rng = np.random.default_rng(4)
    path = write_lines(tmp_path / "d.jsonl", *({"text": some_text(rng, 60)} for _ in range(25)))
    stats = stats_of(model, path, PT, [16, 64], packing=packing)
    for cut in stats.cuts:
        rows, report = tokenize_texts(
            read_texts(str(path), "", None), load_tokenizer(model), cutoff_len=cut.cutoff_len, packing=packing
        )
        assert cut.rows == len(rows) and stats.tokens == report.tokens
        assert cut.too_long == (stats.lengths > cut.cutoff_len).sum()


def test_answers_tools_and_special_tokens_are_counted(model: Path, tmp_path: Path) -> None:
    def chat(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant") * len(texts)
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    path = write_lines(
        tmp_path / "d.jsonl", chat("a", "b"), chat("a", "b", "c", "d"), chat("a </s>", "b"), chat("only")
    )
    stats = stats_of(model, path, SFT, [])
    assert stats.turns == {1: 2, 2: 1, 0: 1} and stats.untrained == 1
    assert (stats.with_special, stats.first_special) == (1, f"{path}:3")
    # what cannot be trained on has no length
    assert len(stats.lengths) == 3 and all(tokens for tokens, _ in stats.longest)


def test_bars_hold_every_row_once_and_few_long_rows_do_not_flatten_them() -> None:
    lengths = np.array([*range(20, 120), 50_000])
    bars = histogram(lengths)
    assert sum(count for *_, count in bars) == 101
    assert bars[-1] == (bars[-2][1] + 1, None, 1) and 8 <= len(bars) <= 16
    for low, high, count in bars[:-1]:
        assert count == ((lengths >= low) & (lengths <= high)).sum()
    assert [low for low, *_ in bars[1:]] == [high + 1 for _, high, _ in bars[:-1]]
    assert histogram(np.array([7])) == [(7, 7, 1)] and histogram(np.zeros(0, np.int64)) == []


def test_the_command_prints_figures_bars_and_cutoffs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write_lines(tmp_path / "d.jsonl", *chat_rows(30))
    run("stats", path, "cutoff_len=64", "--model", model)
    lines = capsys.readouterr().out.splitlines()
    stats = stats_of(model, path, SFT, [32, 64, 128, 256])
    assert lines[0] == "rows            30"
    assert lines[1] == f"tokens          {stats.tokens:,}"
    assert lines[2] == f"trained         {stats.trained_tokens:,} ({stats.trained_tokens / stats.tokens:.1%})"
    head = next(i for i, line in enumerate(lines) if line.startswith("cutoff_len"))
    table = [list(map(int, line.replace(",", "").split())) for line in lines[head + 1 : head + 5]]
    assert table == [
        [c.cutoff_len, c.too_long, c.shortened, c.emptied, c.answer_cut, c.left_out, c.tokens_lost] for c in stats.cuts
    ]
    bars = [line for line in lines if "█" in line]
    assert len(bars) >= 5 and max(line.count("█") for line in bars) == 40
    assert lines[-1].startswith(f"longest: {stats.longest[0][1]} ({stats.longest[0][0]:,}), ")


def test_json_and_picture_hold_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "d.jsonl", *chat_rows(30))
    picture = tmp_path / "lengths.png"
    run("stats", path, "--model", model, "--json", "--plot", picture)
    value = json.loads(capsys.readouterr().out)
    stats = stats_of(model, path, SFT, [512])
    assert value["tokens"] == stats.tokens and value["length"]["max"] == stats.lengths.max()
    assert sum(bar["rows"] for bar in value["histogram"]) == value["rows"] == 30
    assert [cut["cutoff_len"] for cut in value["cutoffs"]] == [1024, 2048, 4096, 8192]
    assert value["longest"][0] == {"tokens": stats.longest[0][0], "source": stats.longest[0][1]}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000


def test_a_picture_that_is_no_png_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--plot lengths.jpg: expected a file that ends in .png"):
        run("stats", tmp_path / "absent.jsonl", "--plot", "lengths.jpg")


def test_invalid_data_are_an_error_as_in_training(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a"})
    with pytest.raises(DataError, match='line 2: no "output"'):
        run("stats", path, "--model", model)


def test_a_folder_with_only_a_tokenizer_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="macft")
    folder = write_tiny_model(tmp_path / "model")
    assert not list(folder.glob("*.safetensors"))
    path = write_lines(tmp_path / "d.jsonl", {"text": "hello, how are you today?"})
    run("stats", path, "--model", folder)
    assert capsys.readouterr().out.startswith("texts           1\n")


def test_the_commands_name_their_arguments() -> None:
    for name, command in data.commands.items():
        shown = command.get_help(click.Context(command, info_name=name))
        assert "DATASET|CONFIG.yaml [key=value]..." in shown and "--json" in shown
