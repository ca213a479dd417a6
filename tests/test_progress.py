"""What a terminal and a log see of a long job."""

from __future__ import annotations

import subprocess
import sys

import pytest

from macft import progress


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
