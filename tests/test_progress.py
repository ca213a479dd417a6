"""What a terminal and a log see of a long job."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from macft import progress
from macft.text import size


def test_a_log_hears_now_and_then_how_far_it_is(monkeypatch, caplog, capfd):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level("INFO", "macft"), progress.counting_bytes(4_000_000_000, "writing x.gguf") as advance:
        for _ in range(4):
            advance(1_000_000_000)
    assert caplog.messages == [f"writing x.gguf: {share}% of 4.0 GB" for share in (25, 50, 75)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "is_shown"), [(-1.0, True), (60.0, False)])
def test_a_terminal_has_a_bar_only_when_it_takes_a_while(seconds, is_shown):
    """Under a pseudo-terminal of its own."""
    code = f"""
import os, pty, sys
from macft import progress
from macft.text import size
progress._SECONDS_BEFORE_BAR = {seconds}
pid, descriptor = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    with progress.counting_bytes(100, "writing x.gguf") as advance:
        advance(50)
        advance(50)
    os._exit(0)
seen = b""
try:
    while part := os.read(descriptor, 4096):
        seen += part
except OSError:
    pass  # Linux: the other end is closed
os.waitpid(pid, 0)
sys.stdout.write(repr(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("writing x.gguf" in done.stdout) == is_shown, done.stdout


def test_rows_and_batches_are_counted_in_a_log(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level("INFO", "macft"):
        assert list(progress.tracked("abc", 3, "reference")) == ["a", "b", "c"]
        with progress.counting("tokenizing", None) as advance:
            advance(7)
        with progress.counting("tokenizing", 9) as advance:
            advance(7)
    assert caplog.messages == [
        "reference: 1 of 3 batches",
        "reference: 2 of 3 batches",
        "tokenizing: 7 rows",
        "tokenizing: 7 of 9 rows",
    ]


def test_a_log_hears_how_much_of_a_folder_is_written(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    hidden = tmp_path / ".out.1.tmp"
    hidden.mkdir()
    (hidden / "model.safetensors").write_bytes(bytes(1_500_000))
    with caplog.at_level("INFO", "macft"), progress.watching(tmp_path / "out", "converting x"):
        give_up = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < give_up:
            time.sleep(0.05)
    assert set(caplog.messages) == {"converting x: 1.5 MB written"}


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(0, "0 kB"), (12_345, "12 kB"), (3_440_000, "3.4 MB"), (1_230_000_000, "1.2 GB")]
)
def test_sizes_are_read_in_the_unit_that_fits(num_bytes, shown):
    assert size(num_bytes) == shown
