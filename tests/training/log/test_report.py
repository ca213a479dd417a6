"""What a run shows and leaves behind: log rows, terminal forms, result files, the card, the curves."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from macft.errors import MacftError, MissingPackageError, UsageError
from macft.training.log import report as report_module
from macft.training.log.report import Report, StepRecord, read_log
from macft.training.log.results import eval_results, merge_results, model_card, train_results
from macft.training.log.trackers import open_reporters

LOSSES = [3.0000000000000004, 2.5, 2.25, 2.125, 2.0, 0.1 + 0.2]


def train(folder: Path, *, logging_steps: int, start: int = 0, reporters=(), stop: int = 6) -> None:
    with Report(folder, 6, start, start_tokens=100 * start, reporters=reporters) as report:
        for step in range(start + 1, stop + 1):
            memory = None if step == 1 else 1.5 + step / 10
            extra = {"rewards/accuracies": step / 8}
            report.step(StepRecord(step, step / 3, LOSSES[step - 1], 1e-4 / step, step / 7, 100, 0.25, memory, extra))
            if step % logging_steps == 0:
                report.log()
            if step % 3 == 0:
                report.evaluation(step, step / 3, {"eval_loss": 2.0 + step / 9})


def test_one_row_per_logging_step_in_full_precision(tmp_path):
    train(tmp_path, logging_steps=1)
    rows = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in trained] == LOSSES
    assert [row["grad_norm"] for row in trained] == [step / 7 for step in range(1, 7)]
    assert [row["current_steps"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert {row["total_steps"] for row in rows} == {6}
    assert [row["total_tokens"] for row in trained] == [100, 200, 300, 400, 500, 600]
    assert [row["throughput"] for row in trained] == [400.0] * 6
    assert [row["percentage"] for row in trained] == [16.67, 33.33, 50.0, 66.67, 83.33, 100.0]
    assert "peak_memory_gb" not in trained[0] and trained[1]["peak_memory_gb"] == 1.7
    assert trained[5]["elapsed_time"] == "0:00:00" and trained[5]["remaining_time"] == "0:00:00"
    assert not any(value is None for row in rows for value in row.values())


def test_a_row_holds_the_mean_loss_and_the_last_gradient_norm(tmp_path):
    train(tmp_path, logging_steps=3)
    rows = read_log(tmp_path)
    assert [sorted({"loss", "eval_loss"} & row.keys()) for row in rows] == [["loss"], ["eval_loss"]] * 2
    first, evaluation = rows[:2]
    assert first["loss"] == (3.0000000000000004 + 2.5 + 2.25) / 3
    assert first["grad_norm"] == 3 / 7
    assert first["lr"] == 1e-4 / 3
    assert first["rewards/accuracies"] == (1 / 8 + 2 / 8 + 3 / 8) / 3
    assert first["peak_memory_gb"] == 1.8
    assert evaluation["eval_loss"] == 2.0 + 3 / 9 and evaluation["current_steps"] == 3


def test_steps_after_the_last_row_can_be_logged_at_the_end(tmp_path):
    with Report(tmp_path, 3) as report:
        for step in (1, 2, 3):
            report.step(StepRecord(step, step / 3, float(step), 1e-4, 1.0, 10, 0.1))
            if step == 2:
                report.log()
        report.log()
        report.log()
    assert [row["loss"] for row in read_log(tmp_path)] == [1.5, 3.0]


def test_resuming_cuts_rows_past_the_checkpoint_and_the_torn_line(tmp_path):
    train(tmp_path, logging_steps=1, stop=5)
    log = tmp_path / "trainer_log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"current_steps": 6, "lo')
    train(tmp_path, logging_steps=1, start=4)
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert [row["current_steps"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == LOSSES
    assert rows[-1]["total_tokens"] == 600
    kept = log.read_bytes().splitlines()[:5]
    assert kept == whole.splitlines()[:5]


def test_a_new_run_starts_the_log_again_whatever_it_held(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text("not a row\n")
    train(tmp_path, logging_steps=6)
    assert len(read_log(tmp_path)) == 3


def test_a_damaged_row_is_named_by_its_line(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1}\n[2]\n{"current_steps": 3}\n')
    with pytest.raises(MacftError, match=r"trainer_log.jsonl line 2: found b'\[2\]"):
        Report(tmp_path, 6, start_step=3)


def test_every_row_is_on_disk_before_the_run_ends(tmp_path):
    report = Report(tmp_path, 2)
    report.step(StepRecord(1, 0.5, 1.25, 1e-4, 1.0, 10, 0.1))
    report.log()
    assert read_log(tmp_path)[0]["loss"] == 1.25
    report.close()


def test_lines_on_a_pipe_are_aligned_and_hold_no_escapes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(report_module, "stderr_is_terminal", sys.stderr.isatty)
    with Report(tmp_path, 60) as report:
        for step, loss in ((9, 2.34561), (10, 2.34567)):
            report.step(StepRecord(step, 0.1, loss, 4.5e-05, 1.234 * step, 203, 0.25, 1.94))
            report.log()
        report.message("[bold] saved")
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "step  9/60  loss 2.3456  grad 11.11  lr 4.5e-05     812 tok/s  1.9 GB  0:00 left"
    assert lines[1].index("tok/s") == lines[0].index("tok/s")
    assert lines[2] == "[bold] saved"
    assert "\x1b" not in err


REWARDS = {"rewards/accuracies": 0.75, "rewards/margins": 0.2149, "rewards/chosen": -0.05, "logps/chosen": -61.2}


def test_a_preference_line_shows_accuracy_and_margin_in_80_columns(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(report_module, "stderr_is_terminal", lambda: False)
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: 1000.0)
    with Report(tmp_path, 1000) as report:
        report.step(StepRecord(9, 0.1, 0.61123, 5e-5, 1.5, 203, 0.25, 11.9, REWARDS))
        row = report.log()
        loss = {"rewards/accuracies": 1.0, "rewards/margins": -12.5}
        report.step(StepRecord(1000, 1.0, 0.5, 5e-5, 1.5, 3000, 0.25, 11.9, loss))
        report.log()
        report.evaluation(1000, 1.0, {"eval_loss": 0.65432, **{f"eval_{key}": value for key, value in REWARDS.items()}})
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "step    9/1000  loss 0.6112  acc 0.75  margin +0.21     812 tok/s  0:00 left",
        "step 1000/1000  loss 0.5000  acc 1.00  margin -12.50   12000 tok/s  0:00 left",
        "step 1000/1000  eval_loss 0.6543  eval_acc 0.75  eval_margin +0.21",
    ]
    assert max(map(len, lines)) <= 80
    # what the line leaves out is in the row, and the row is what `log` returns
    first, _, evaluation = read_log(tmp_path)
    assert first | row == first and {"lr", "grad_norm", "peak_memory_gb", *REWARDS} <= row.keys()
    assert evaluation["eval_logps/chosen"] == -61.2


def test_log_returns_nothing_when_nothing_was_trained(tmp_path):
    with Report(tmp_path, 2) as report:
        assert report.log() == {}
    assert read_log(tmp_path) == []


def test_time_left_counts_only_the_steps_of_this_run(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now[0])
    with Report(tmp_path, 100, start_step=90) as report:
        now[0] += 12.0
        report.step(StepRecord(92, 0.92, 1.0, 1e-4, 1.0, 10, 6.0))
        report.log()
    (row,) = read_log(tmp_path)
    # 12 s for 2 steps, 8 to go
    assert (row["elapsed_time"], row["remaining_time"]) == ("0:00:12", "0:00:48")


TERMINAL_RUN = """
import sys
from pathlib import Path
from macft.training.log.report import Report, StepRecord
rewards = {"rewards/accuracies": 0.75, "rewards/margins": 0.2149} if sys.argv[2:] else {}
with Report(Path(sys.argv[1]), 4) as report:
    for step in (1, 2, 3, 4):
        report.step(StepRecord(step, step / 4, 2.5 / step, 4.5e-05, 1.0, 203, 0.25, 1.94, rewards))
        report.log()
        if step == 2:
            report.message("[red]saved[/red] 检查点")
            print("answer")
"""


def run_on_terminal(columns: int, *arguments: str) -> tuple[str, bytes]:
    """What TERMINAL_RUN shows on a terminal, and what it writes to standard output."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-c", TERMINAL_RUN, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=secondary, env=environment)
    os.close(secondary)
    shown = b""
    while chunk := _read(primary):
        shown += chunk
    assert child.stdout is not None
    written = child.stdout.read()
    assert child.wait() == 0
    return shown.decode(), written


def test_a_preference_bar_fits_into_80_columns(tmp_path):
    text, _ = run_on_terminal(80, str(tmp_path), "preference")
    drawn = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", text) if line.startswith("step 4/4")]
    assert drawn and drawn[-1].rstrip().endswith("loss 0.6250  acc 0.75  margin +0.21  812 tok/s  0:00 left")
    # one line with a bar in it, not a wrapped one
    assert len(drawn[-1]) <= 80 and "━" in drawn[-1]


def test_a_terminal_shows_a_bar_and_keeps_messages_above_it(tmp_path):
    text, written = run_on_terminal(90, str(tmp_path))
    assert written == b"answer\n"
    assert "[red]saved[/red] 检查点" in text
    assert "step 4/4" in text and "loss 0.6250  lr 4.5e-05  812 tok/s  1.9 GB  0:00 left" in text
    # one bar, redrawn in place: its last drawing is not followed by a log line
    assert "grad" not in text and text.count("\x1b[2K") >= 2
    assert len(read_log(tmp_path)) == 4


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux answers EIO once the other side is closed
        return b""


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed += 1


def test_reporters_receive_every_row_and_are_closed_once(tmp_path):
    recorder = Recorder()
    train(tmp_path, logging_steps=3, reporters=[recorder])
    assert [step for step, _ in recorder.rows] == [3, 3, 6, 6]
    assert recorder.rows[1][1] == {"eval_loss": 2.0 + 3 / 9, "epoch": 1.0}
    report = Report(tmp_path, 6, reporters=[recorder])
    report.close()
    report.close()
    assert recorder.closed == 2


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, logging_steps=1, reporters=open_reporters(["tensorboard"], tmp_path, "run", {}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(LOSSES, rel=1e-6)
    assert [event.value for event in events.Scalars("eval/loss")] == pytest.approx([2 + 3 / 9, 2 + 6 / 9])


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "swanlab"])
def test_a_missing_tracker_names_the_command_that_installs_it(tmp_path, tracker, monkeypatch):
    for package in (tracker, "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: not importable
    with pytest.raises(MissingPackageError, match=f"pip install {tracker}"):
        open_reporters([tracker], tmp_path, "run", {})
    assert list(tmp_path.iterdir()) == []


def test_report_to_takes_none_and_refuses_unknown_names(tmp_path):
    assert open_reporters(["none"], tmp_path, "run", {}) == []
    with pytest.raises(UsageError, match="found 'tensorbord', expected none or some of tensorboard, wandb"):
        open_reporters(["tensorbord"], tmp_path, "run", {})


def test_results_are_rates_by_hand_and_united_in_all_results(tmp_path):
    trained = train_results(
        epoch=2.0, train_loss=1.5, seconds=8.0, examples=20, steps=4, tokens=1000, peak_memory_gb=1.23456
    )
    merge_results(tmp_path, "train", trained)
    merge_results(tmp_path, "eval", eval_results(epoch=2.0, values={"eval_loss": 1.75}, seconds=0.5, examples=3))
    expected = {
        "epoch": 2.0,
        "train_loss": 1.5,
        "train_runtime": 8.0,
        "train_samples_per_second": 2.5,
        "train_steps_per_second": 0.5,
        "train_tokens_per_second": 125.0,
        "total_tokens": 1000,
        "peak_memory_gb": 1.235,
    }
    assert json.loads((tmp_path / "train_results.json").read_text()) == expected
    assert json.loads((tmp_path / "all_results.json").read_text()) == {
        **expected,
        "eval_loss": 1.75,
        "eval_runtime": 0.5,
        "eval_samples_per_second": 6.0,
    }
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] == 1.75


def test_a_damaged_summary_does_not_cost_new_results(tmp_path):
    (tmp_path / "all_results.json").write_text("{")
    merge_results(tmp_path, "eval", {"eval_loss": 1.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 1.0}


def test_the_model_card_front_matter_parses_and_the_command_can_be_pasted():
    card = model_card(
        base="models/my: base|1",
        adapter_dir="runs/a b",
        data="数据.jsonl",
        settings={"lora_rank": 8, "lora_target": ["q_proj", "v_proj"], "note": "a|b\nc", "val_size": None},
        results={"train_loss": 1.23456789, "total_tokens": 12345678},
        versions={"mlx": "0.32.4"},
    )
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "models/my: base|1",
        "library_name": "peft",
        "tags": ["lora", "macft"],
    }
    assert "macft chat 'models/my: base|1' --adapter 'runs/a b'" in text
    assert "| note | a\\|b c |" in text and '| lora_target | ["q_proj", "v_proj"] |' in text
    assert "| train_loss | 1.23457 |" in text and "| total_tokens | 12345678 |" in text
    assert "| mlx | 0.32.4 |" in text and "数据.jsonl" in text
