"""The terminal itself: text made harmless, remarks, progress, Ctrl-C, and the line that is typed.

Nothing a model writes can control the terminal: `visible` shows escape characters instead of
sending them.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from runtime.answer import Piece, Thought, ThoughtEnd
from runtime.conversation import Event, Notice, Progress
from runtime.generation import STEP

if TYPE_CHECKING:
    from prompt_toolkit.application import Application

ThinkMode = Literal["show", "hide", "fold"]
THINK_MODES: tuple[ThinkMode, ...] = ("show", "hide", "fold")

PROMPT = "> "

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Interruptible:
    """While it is entered, Ctrl-C only notes that it was `pressed`."""

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> "Interruptible":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True


class Terminable:
    """While it is entered, a request to terminate ends the line editor first, and then is obeyed.

    Its handler raises SystemExit wherever the program is. In one of the editor's tasks, such as the
    one that loads the history, that would be caught and reported there.
    """

    def __init__(self, editor: "Application[str]") -> None:
        self._editor = editor
        self._before: dict[int, Any] = {}
        self._number = 0  # of the signal that came

    def __enter__(self) -> "Terminable":
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and callable(before := signal.getsignal(number)):
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._number:
            self._before[self._number](self._number, None)

    def check(self) -> None:
        """End the editor if it is to end; called when it is ready for that."""
        future = self._editor.future
        if self._number and future is not None and not future.done():
            self._editor.exit(exception=EOFError)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self._editor.loop is not None:  # else it has not begun, and will check, or has ended
            self._editor.loop.call_soon_threadsafe(self.check)


def draw_answer(
    events: Iterator[Event], out: TextIO, interrupted: Callable[[], bool], *, think: ThinkMode
) -> bool:
    """Write the answer to `out` as it comes, ending with a newline; whether there was any text.

    Reasoning, remarks and, on a terminal, the progress of a long reading go to standard error.
    """
    last = ""
    line = StatusLine()
    thoughts = Thoughts(think, line)
    try:
        for event in events:
            if isinstance(event, Progress):
                if event.total > STEP:
                    line.show(f"reading {event.done} of {event.total} tokens")
            elif isinstance(event, Notice):
                line.erase()
                if last not in ("", "\n"):
                    out.write("\n")
                    out.flush()
                    last = "\n"
                remark(f"note: {event.text}")
            elif isinstance(event, Thought):
                thoughts.add(event)
            elif isinstance(event, ThoughtEnd):
                thoughts.end(event)
            elif isinstance(event, Piece) and (text := visible(event.text)):
                line.erase()
                last = text[-1]  # first: Ctrl-C may come at any time
                out.write(text)
                out.flush()
            if interrupted():
                break
    finally:
        line.erase()
        thoughts.end(None)
        close = getattr(events, "close", None)
        if close is not None:
            close()
        if last not in ("", "\n"):
            out.write("\n")
        out.flush()
    return bool(last)


class Thoughts:
    """The model's reasoning on standard error: shown faint, folded to one line, or hidden.

    A terminal that does not show it counts its tokens meanwhile.
    """

    def __init__(self, mode: ThinkMode, line: "StatusLine") -> None:
        self._mode = mode
        self._line = line
        self._last = ""  # character shown

    def add(self, thought: Thought) -> None:
        if self._mode != "show":
            self._line.show(f"thinking: {thought.n_tokens} tokens")
        elif text := visible(thought.text):
            self._line.erase()
            if not self._last and not is_colourful(sys.stderr):
                sys.stderr.write("(thinking)\n")
            self._last = text[-1]
            sys.stderr.write(faint(text))
            sys.stderr.flush()

    def end(self, end: ThoughtEnd | None) -> None:
        """What is said when it is over, or None when it was cut short."""
        self._line.erase()
        if self._last not in ("", "\n"):
            sys.stderr.write("\n")
        plain = bool(self._last) and not is_colourful(sys.stderr)
        if end is not None and (self._mode == "fold" or plain):
            remark(f"(thought for {end.seconds:.1f} s, {end.n_tokens} tokens)")
        elif end is not None and self._last:
            sys.stderr.write("\n")
        sys.stderr.flush()
        self._last = ""


class StatusLine:
    """A line on a terminal that is drawn over itself while something goes on."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, text: str) -> None:
        if is_terminal(sys.stderr):
            sys.stderr.write(f"\r{text}")
            sys.stderr.flush()
            self._shown = True

    def erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def visible(text: str) -> str:
    """`text` without carriage returns and with other control characters shown as `\\x1b`."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text.replace("\r", ""))


def remark(text: str) -> None:
    """Say something that is not the model's text: on standard error, faint on a terminal."""
    sys.stdout.flush()
    sys.stderr.write(faint(visible(text)) + "\n")
    sys.stderr.flush()


def faint(text: str) -> str:
    """`text` for standard error, drawn faint where that is possible."""
    return f"\x1b[2m{text}\x1b[0m" if is_colourful(sys.stderr) else text


def compiling(done: int, total: int) -> None:
    """Say that kernels are being compiled: in words once, on a terminal with what is done."""
    text = "compiling kernels, first run only"
    if not is_terminal(sys.stderr):
        if done == 0:
            remark(text)
        return
    sys.stderr.write("\r\x1b[K" if done == total else f"\r{text}: {done} of {total}")
    sys.stderr.flush()


def use_utf8(stream: Any) -> None:
    """Text into a pipe is UTF-8 whatever the locale; a terminal shows what it can."""
    if stream.isatty():
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="replace")


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def is_colourful(stream: TextIO) -> bool:
    """Whether text may be drawn faint on `stream`; NO_COLOR forbids it."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def make_line_reader() -> Callable[[], str]:
    """A function that reads a message, which may have several lines, with editing and history."""
    # Answers to the cursor query would mix with what is typed ahead.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.utils import is_dumb_terminal

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History
    try:
        history = FileHistory(str(history_file()))
    except OSError as error:
        remark(f"note: the input history is not kept: {error.strerror or error}")
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(PROMPT, history=history, key_bindings=keys)
    if is_dumb_terminal():  # there is only a prompt, without an editor and its tasks
        return session.prompt

    def read_line() -> str:
        with Terminable(session.app) as end:
            return session.prompt(pre_run=end.check)

    return read_line


def history_file() -> Path:
    """The file of the input history, made so that only its user can read it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = base / "gguf-tools"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "history"
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    return path
