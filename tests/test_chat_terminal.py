"""The chat in a real pseudo-terminal: what a person types, and what is then on the screen."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("termios", reason="pseudo-terminals are a thing of Unix")

import fcntl
import struct
import termios

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root

TIMEOUT = 180.0  # seconds for anything to appear: the first start compiles
NO_COLOR = "1"  # in the program's environment
READY = "\x1b[?2004h"  # sent when a line is asked for: bracketed paste on
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>78]|\r")

# Becomes the leader of the terminal, so that Ctrl-C reaches it, and then the program.
LAUNCHER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "runtime", *sys.argv[1:]])
"""

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Terminal:
    """A program at a pseudo-terminal. `expect` waits for text after what was seen before."""

    def __init__(self, *arguments, home):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        environment = os.environ | {
            "TERM": "xterm",
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            CACHE_VARIABLE: str(cache_root() or "off"),  # compiled kernels stay where they are
            "PYTHONIOENCODING": "utf-8",
            "NO_COLOR": NO_COLOR,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""
        self.seen = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text):
        data = text.encode()
        while data:  # in small pieces: the program must be able to write meanwhile
            data = data[os.write(self.master, data[:512]) :]
            while self._read(0):
                pass

    def expect(self, wanted):
        """What came from the last place looked at up to the end of `wanted`, as it was sent."""
        deadline = time.monotonic() + TIMEOUT
        while (place := self.raw.find(wanted, self.seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{wanted!r} did not come; there was\n{self.raw[self.seen :]}")
        start, self.seen = self.seen, place + len(wanted)
        return self.raw[start : self.seen]

    def answer(self):
        """The lines up to the next prompt, without escape sequences."""
        return ESCAPES.sub("", self.expect(READY))

    def say(self, text):
        self.type(text + "\r")
        return self.answer()

    def wait(self):
        """Let the program end; its exit code."""
        deadline = time.monotonic() + TIMEOUT
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(TIMEOUT)

    def _read(self, seconds):
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # how Linux says that the other side has closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


@pytest.fixture
def start(stories260k_gguf, tmp_path):
    """Starts `run` on the story model and waits for its first prompt."""
    opened = []

    def start(*options):
        terminal = Terminal(stories260k_gguf, "--threads", "1", *options, home=tmp_path)
        opened.append(terminal.__enter__())
        return terminal, terminal.answer()

    yield start
    for terminal in opened:
        terminal.__exit__()


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(CHATML)
    return path


GREEDY = ("--temp", "0", "-n", "20")


def n_read(shown):
    """The tokens read for an answer, from its figures."""
    return int(re.search(r"\[read (\d+) token", shown)[1])


def context(shown):
    return int(re.search(r"context (\d+) of", shown)[1])


def test_two_turns(start):
    terminal, banner = start(*GREEDY)
    assert "260K parameters" in banner and "Q8_0" in banner
    assert "context 512 of 512" in banner and "CPU" in banner
    assert "plain text is continued" in banner
    first = terminal.say("Once upon a time")
    assert "there was a" in first and "wrote 20" in first
    before = context(first)
    second = terminal.say("The dog")
    assert "wrote 20" in second and "re-read" not in second
    assert n_read(second) == context(second) - 19 - before  # nothing twice
    terminal.type("/exit\r")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.raw


def test_two_turns_through_a_template(start, template):
    terminal, banner = start(*GREEDY, "--chat-template", template, "--system", "Tell a story.")
    assert "template: custom" in banner and str(template) in banner
    first = terminal.say("Lily")
    second = terminal.say("Tim")
    assert "re-read" not in second
    assert n_read(second) == context(second) - 19 - context(first)
    third = terminal.say("/system Be brief.")
    assert "the system prompt is set" in third
    third = terminal.say("Sue")
    assert re.search(r"re-read \d+ of \d+ tokens because the system prompt changed", third)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(start):
    terminal, _ = start("--temp", "1", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "-1")
    terminal.type("Once upon a time\r")
    terminal.expect("\n")
    terminal.expect(" ")
    terminal.type("\x03")
    shown = terminal.answer()
    assert "(stopped)" in shown or "wrote" in shown  # a short story may end first
    assert "wrote" in terminal.say("Then")
    assert "/exit leaves" in terminal.say("\x03")
    terminal.type("/exit\r")
    assert terminal.wait() == 0


def test_ctrl_c_stops_reading(start):
    terminal, _ = start("--temp", "0", "-n", "20", "--ctx", "8192")
    terminal.type(f"\x1b[200~{'once upon a time ' * 1000}\x1b[201~\r")
    terminal.expect("reading 256 of")
    terminal.type("\x03")
    assert "(stopped; the message is taken back)" in terminal.answer()
    assert "0 turns" in terminal.say("/stats")
    assert "wrote 20" in terminal.say("Once upon a time")


def test_what_is_typed_ahead_is_not_lost(start):
    terminal, _ = start(*GREEDY)
    terminal.type("Once upon a time\rThe dog\r/stats\r")
    assert "wrote 20" in terminal.answer()
    assert "wrote 20" in terminal.answer()
    assert "2 turns" in terminal.answer()


def test_a_paste_of_several_lines_is_one_message(start):
    terminal, _ = start(*GREEDY)
    shown = terminal.say("\x1b[200~Once upon a time\nthere was\na dog\x1b[201~")
    assert shown.count("wrote") == 1
    assert "1 turn in" in terminal.say("/stats")
    assert "took back: Once upon a time\\nthere was\\na dog" in terminal.say("/undo")


def test_alt_enter_begins_a_new_line(start):
    terminal, _ = start(*GREEDY)
    assert "wrote" in terminal.say("one\x1b\rtwo")
    assert "took back: one\\ntwo" in terminal.say("/undo")


def test_regen_and_undo(start):
    terminal, _ = start(*GREEDY)
    assert "no answer yet" in terminal.say("/regen")
    assert "nothing to take back" in terminal.say("/undo")
    first = terminal.say("Once upon a time")
    again = terminal.say("/regen")
    story = first.split("Once upon a time")[-1].split("[read")[0].strip()
    assert story and story in again
    assert n_read(again) == 1  # the prompt is still known
    assert "took back: Once upon a time (0 turns left)" in terminal.say("/undo")
    assert story in terminal.say("Once upon a time")


def test_an_empty_line_goes_on_with_the_text(start):
    terminal, _ = start(*GREEDY)
    assert "wrote" not in terminal.say("")
    terminal.say("Once upon a time")
    shown = terminal.say("")
    assert "wrote 20" in shown and n_read(shown) == 1


def test_settings(start):
    terminal, _ = start("-n", "5")
    assert "temp 0.8" in terminal.say("/set")
    assert "temp 0.5" in terminal.say("/set temp 0.5")
    assert "top-k 3" in terminal.say("/set top_k=3")
    assert "seed 7" in terminal.say("/set seed 7")
    assert "max-tokens 4" in terminal.say("/set max-tokens 4")
    assert "from 0 to 1" in terminal.say("/set top-p 2")
    assert "a whole number" in terminal.say("/set top-k many")
    assert "unknown setting heat" in terminal.say("/set heat 3")
    assert "needs a value" in terminal.say("/set temp")
    assert "wrote 4" in terminal.say("Once upon a time")


def test_the_same_seed_tells_the_same_story(start):
    terminal, _ = start("-n", "20")
    stories = []
    for _ in range(2):
        terminal.say("/set seed 11")
        terminal.say("/clear")
        shown = terminal.say("Once upon a time")
        stories.append(shown.split("Once upon a time")[-1].split("[read")[0])
    assert stories[0] == stories[1]


def test_other_commands(start):
    terminal, _ = start(*GREEDY)
    for name in ("exit", "clear", "regen", "undo", "system", "set", "stats"):
        assert f"/{name}" in terminal.say("/help")
    assert "unknown command /dance" in terminal.say("/dance now")
    assert "plain text is continued" in terminal.say("/system Be nice")
    assert "figures after each answer: off" in terminal.say("/stats off")
    assert "[read" not in terminal.say("Once")
    assert "wrote 20" in terminal.say("/stats")
    assert "forgotten" in terminal.say("/clear")
    assert "nothing to take back" in terminal.say("/undo")


def test_a_full_context_drops_the_oldest_turns(start, template):
    terminal, _ = start("--temp", "0", "-n", "16", "--ctx", "96", "--chat-template", template)
    shown = [
        terminal.say(f"Tell me about the {animal}") for animal in ("dog", "cat", "bird", "cow")
    ]
    assert re.search(r"context of 96 tokens is full: the oldest .*dropped", "".join(shown))
    assert all("wrote" in answer for answer in shown)


def test_the_policy_stop_refuses_what_does_not_fit(start, template):
    policy = ("--context-policy", "stop", "--chat-template", template)
    terminal, _ = start("--temp", "0", "-n", "16", "--ctx", "64", *policy)
    shown = [
        terminal.say(f"Tell me about the {animal}") for animal in ("dog", "cat", "bird", "cow")
    ]
    assert "/undo or /clear makes room" in shown[-1]
    terminal.say("/clear")
    assert "wrote" in terminal.say("Tell me about the dog")


def test_a_message_longer_than_the_context(start):
    terminal, _ = start(*GREEDY, "--ctx", "32")
    assert "the context holds 32" in terminal.say("one two three four five " * 10)
    assert "wrote" in terminal.say("Once")


def test_the_history_outlives_the_program(start, tmp_path):
    terminal, _ = start(*GREEDY)
    terminal.say("Once upon a time")
    terminal.type("/exit\r")
    terminal.wait()
    history = tmp_path / "state" / "gguf-tools" / "history"
    assert "Once upon a time" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    terminal, _ = start(*GREEDY)
    terminal.type("\x1b[A\x1b[A")  # past /exit
    assert "there was a" in terminal.say("")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_leaves_no_trace(start, tmp_path, number):
    history = tmp_path / "state" / "gguf-tools" / "history"
    history.parent.mkdir(parents=True)
    history.write_text("".join(f"\n# 2026-01-01\n+line {i}\n" for i in range(50_000)))
    terminal, _ = start(*GREEDY)  # the editor reads its history while it waits
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert "Traceback" not in terminal.raw and "xception" not in terminal.raw
    assert terminal.raw.endswith("\x1b[?2004l")  # the terminal is as it was
