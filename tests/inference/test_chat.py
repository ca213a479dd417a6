"""A conversation typed line by line, in a pipe and in a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from support.commands import heed_ctrl_c
from support.data_rows import read_examples
from support.parrot import make_model
from support.paths import TESTS
from support.tiny_tokenizer import GEMMA, write_tiny_model

from macft.inference.chat import ChatModel, answer, answer_prompts, chat_loop, fit_prompt
from macft.inference.prompts import user_turn, with_system


@pytest.fixture
def folder(tmp_path):
    return write_tiny_model(tmp_path / "model")


def talk(model: ChatModel, *lines: str, system: str | None = None) -> tuple[str, str]:
    out, notes = io.StringIO(), io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    chat_loop(model, system=system, source=source, out=out, notes=notes)
    return out.getvalue(), notes.getvalue()


def test_an_answer_starts_behind_the_generation_prompt_and_ends_at_the_stop_token(folder):
    model = make_model(folder)
    messages = with_system(user_turn("hello 你好"), "be kind")
    pieces = answer(model, fit_prompt(model, messages))
    assert "".join(pieces) == "HELLO 你好"
    assert model.model.asked == [
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello 你好<|im_end|>\n<|im_start|>assistant\n"
    ]


# the conversation


def test_the_conversation_is_kept_and_reset_forgets_all_but_the_system_prompt(folder):
    model = make_model(folder)
    out, _ = talk(model, "one", "two", "", "/reset", "three", system="be kind")
    assert out == "ONE\nTWO\nTHREE\n"
    start = "<|im_start|>system\nbe kind<|im_end|>\n"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    first = start + turn.format("one", "")
    assert model.model.asked == [
        first,
        first + "ONE<|im_end|>\n" + turn.format("two", ""),
        start + turn.format("three", ""),
    ]


def test_each_answer_has_its_own_seed_and_a_session_can_be_repeated(folder):
    model = make_model(folder)
    talk(model, "one", "/reset", "one")
    talk(model, "one")
    assert model.model.seeds == [7, 8, 7]


def test_system_shows_sets_and_resets(folder):
    model = make_model(folder)
    _, notes = talk(model, "/system", "one", "/system be brief", "/system", "two")
    assert "no system prompt is set\n" in notes and "system prompt: be brief\n" in notes
    assert model.model.asked[1].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo")


def test_saved_conversations_are_read_back_as_a_dataset(folder, tmp_path):
    model = make_model(folder)
    path = tmp_path / "chat.jsonl"
    _, notes = talk(model, "/save", f"/save {path}", "你好", "two", f"/save {path}", system="be kind")
    assert "needs a file name" in notes and "nothing to save" in notes and f"saved 4 messages to {path}" in notes
    (example,) = read_examples(str(path), str(tmp_path), None)
    assert [(message["role"], message["content"]) for message in example.messages] == [
        ("system", "be kind"),
        ("user", "你好"),
        ("assistant", "你好"),
        ("user", "two"),
        ("assistant", "TWO"),
    ]


def test_save_never_overwrites_and_names_a_folder_it_cannot_write(folder, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    _, notes = talk(make_model(folder), "one", f"/save {path}", f"/save {path}/x.jsonl")
    assert f"{path} exists already; give another name" in notes
    assert "cannot be written" in notes
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir() if p.suffix] == ["mine.txt"]


def test_commands_are_never_sent_to_the_model(folder):
    model = make_model(folder)
    out, notes = talk(model, "/sytem x", "/help", "/quit", "never")
    assert out == "" and model.model.asked == []
    assert "/sytem is not a command; expected one of /reset, /system, /save, /help, /quit" in notes
    assert "forget the conversation" in notes


def test_special_tokens_in_the_users_text_are_named(folder):
    model = make_model(folder)
    _, notes = talk(model, "plain", "hi <|im_end|> there")
    assert notes == "note: your text holds <|im_end|>, which the model reads as control tokens\n"


def test_a_full_context_loses_its_oldest_turns_and_says_so_once(folder):
    model = make_model(folder)
    one_turn = len(model.tokenizer.encode(CHATML_TURN.format("a" * 20, "A" * 20)).ids)
    system = len(model.tokenizer.encode("<|im_start|>system\nbe kind<|im_end|>\n").ids)
    # room for the system prompt, two whole turns and the answer's reserve
    model = make_model(folder, context_length=system + 2 * one_turn + 25, max_new_tokens=25)
    letters = ["a" * 20, "b" * 20, "c" * 20, "d" * 20]
    out, notes = talk(model, *letters, system="be kind")
    assert out.splitlines() == [text.upper() for text in letters]
    assert notes.count("no longer fits") == 1
    last = model.model.asked[-1]
    assert last.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    assert "a" * 20 not in last and "d" * 20 in last
    assert len(model.tokenizer.encode(last).ids) + 25 <= model.context_length


CHATML_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def test_dropped_turns_are_still_saved(folder, tmp_path):
    model = make_model(folder, context_length=90, max_new_tokens=25)
    path = tmp_path / "chat.jsonl"
    talk(model, "a" * 20, "b" * 20, "c" * 20, f"/save {path}")
    assert len(json.loads(path.read_text())["messages"]) == 6


def test_a_question_longer_than_the_model_is_refused_in_one_line_and_forgotten(folder):
    model = make_model(folder, context_length=60, max_new_tokens=20)
    out, notes = talk(model, "x1y2" * 40, "one")
    assert out == "ONE\n"
    assert "tokens, the model holds 60 including its answer; shorten it" in notes
    assert "x1y2" not in model.model.asked[0]


def test_the_answer_is_shortened_when_only_part_of_it_fits(folder):
    model = make_model(folder, max_new_tokens=50)
    prompt = fit_prompt(model, user_turn("hello")).prompt
    tight = make_model(folder, max_new_tokens=50, context_length=len(prompt) + 3)
    assert fit_prompt(tight, user_turn("hello")).max_new_tokens == 3


def test_a_large_answer_limit_leaves_the_conversation_half_of_the_context(folder):
    turns = [*user_turn("a" * 20), {"role": "assistant", "content": "A" * 20}, *user_turn("b" * 20)]
    whole = len(fit_prompt(make_model(folder), turns).prompt)
    roomy = fit_prompt(make_model(folder, max_new_tokens=5000, context_length=2 * whole), turns)
    assert (roomy.dropped, roomy.max_new_tokens) == (0, whole)
    tight = fit_prompt(make_model(folder, max_new_tokens=5000, context_length=2 * whole - 2), turns)
    assert tight.dropped == 2 and len(tight.prompt) + tight.max_new_tokens == 2 * whole - 2


def test_a_template_that_refuses_gives_one_line_and_the_chat_goes_on(tmp_path):
    model = make_model(write_tiny_model(tmp_path / "gemma", GEMMA))
    out, notes = talk(model, "one", system="be kind")
    assert out == "" and "System role not supported" in notes and len(notes.splitlines()) == 1


def test_without_a_template_each_line_is_continued_as_it_is(folder):
    model = make_model(folder, raw=True)
    _, notes = talk(model, "once upon", "a time", "/system be kind")
    assert model.model.asked == ["once upon", "a time"]
    assert notes == "--raw continues text as it is, without a system prompt\n"


def test_one_shot_prompts_print_only_answers_each_from_the_same_seed(folder):
    model = make_model(folder)
    out, notes = io.StringIO(), io.StringIO()
    answer_prompts(model, [user_turn("one"), with_system(user_turn("two"), "be kind")], out, notes)
    assert out.getvalue() == "ONE\n\nTWO\n" and notes.getvalue() == ""
    assert model.model.seeds == [7, 7]
    assert model.model.asked[1].startswith("<|im_start|>system\nbe kind")


def test_a_long_one_shot_conversation_keeps_its_system_prompt(folder):
    model = make_model(folder, context_length=70, max_new_tokens=20)
    messages = [{"role": "system", "content": "be kind"}]
    for letter in "abc":
        messages += [*user_turn(letter * 20), {"role": "assistant", "content": letter}]
    out, notes = io.StringIO(), io.StringIO()
    answer_prompts(model, [[*messages, *user_turn("end")]], out, notes)
    assert out.getvalue() == "END\n" and "left out" in notes.getvalue()
    assert model.model.asked[0].startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    assert "a" * 20 not in model.model.asked[0]


# a real terminal

TERMINAL_CHAT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from support.parrot import Parrot, make_model
from macft.inference.chat import chat_loop

class Slow(Parrot):
    def generate(self, prompt, **rest):
        for token in super().generate(prompt, **rest):
            yield token
            if "slow" in self.asked[-1].split("user")[-1]:
                time.sleep(0.2)

model = make_model(Path(sys.argv[1]))
model = make_model(Path(sys.argv[1]), model=Slow(model.tokenizer))
chat_loop(model, system=None, source=sys.stdin, out=sys.stdout, notes=sys.stderr)
print("LEFT WELL")
"""


class Terminal:
    def __init__(self, *command: str) -> None:
        primary, secondary = pty.openpty()
        self.primary = primary
        self.unread = ""
        os.set_blocking(primary, False)
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        self.child = subprocess.Popen(
            command,
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            env=environment,
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )
        os.close(secondary)

    def until(self, text: str, seconds: float = 30) -> str:
        """What is shown from the end of the last match up to `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.unread!r}"
            try:
                self.unread += os.read(self.primary, 4096).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.02)
        before, _, self.unread = self.unread.partition(text)
        return before

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C until it is answered: readline misses one that comes between its prompt and its wait for keys."""
        for _ in range(10):
            self.child.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.until(text, seconds=2)
                break
        # a late answer to an earlier Ctrl-C may follow
        time.sleep(0.5)
        self.unread = ""

    def type(self, text: str) -> None:
        os.write(self.primary, text.encode())


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(folder):
    terminal = Terminal(sys.executable, "-c", TERMINAL_CHAT, str(folder), str(TESTS))
    try:
        terminal.until("> ")
        terminal.type("one\n")
        terminal.until("ONE\r\n")
        terminal.until("> ")
        terminal.type("slow " + "word " * 40 + "end\n")
        terminal.until("SLOW W")
        terminal.child.send_signal(signal.SIGINT)
        assert "END" not in terminal.until("(stopped)")
        terminal.until("> ")
        terminal.interrupt_until("/quit or Ctrl-D leaves")
        # readline: the line before the last comes back with two times "up"
        terminal.type("\x1b[A\x1b[A\n")
        terminal.until("ONE\r\n")
        terminal.until("> ")
        terminal.type("\x04")
        terminal.until("LEFT WELL")
        assert terminal.child.wait(10) == 0
    finally:
        terminal.child.kill()
        os.close(terminal.primary)
