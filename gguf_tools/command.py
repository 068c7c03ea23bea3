"""What every command line of the project shares: how it starts, and how it ends in an error.

An error that is the user's to solve is one line on standard error and exit code 1. Ctrl-C is exit
code 130, a wrong option is 2 (typer's own), a reader that closed the pipe ends the command quietly.
"""

import gc
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from gguf_tools.errors import GGUFError, printable

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # what asks a program to end
GRACE = 2.0  # seconds


def run_command(app: Callable[[], object]) -> NoReturn:
    """Run `app`, a typer application or a function without arguments, and exit with its code.

    Command functions raise; here, and only here, an exception becomes a line and an exit code.
    A request to terminate unwinds the stack like Ctrl-C, so that no half-written file remains.
    """
    _unwind_on_termination()
    _tolerate_any_character()
    code: int | str | None = 0
    try:
        try:
            app()
        except SystemExit as end:  # how typer ends, well or not
            code = end.code
        sys.stdout.flush()  # a closed pipe is noticed here, not in the interpreter's own exit
    except GGUFError as error:
        _fail(str(error))
    except BrokenPipeError:
        _exit_on_closed_pipe()
    except OSError as error:
        _fail(describe_os_error(error))
    except MemoryError:
        _fail("there is not enough memory for this")
    except KeyboardInterrupt:
        code = INTERRUPTED
    if isinstance(code, int) and code > 128:
        _ignore_requests_to_end()
    gc.freeze()  # at exit the interpreter looks for garbage: not among all that is there
    sys.exit(code)


@contextmanager
def undisturbed_ending() -> Iterator[None]:
    """A block that ends as it should although Ctrl-C is held down.

    The first request to end raises; those within GRACE seconds after it are the same request, and
    would only tear what clears up. A later one raises again, should the first have been lost.
    """
    before = {
        number: signal.getsignal(number)
        for number in (getattr(signal, name) for name in ENDING if hasattr(signal, name))
    }
    last = -GRACE

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        handler, now = before[signal.Signals(number)], time.monotonic()
        if now - last >= GRACE and callable(handler):
            last = now
            handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, end)
    ending = False
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        ending = True  # `end` stays, for what the program still does
        raise
    finally:
        for number, handler in () if ending else before.items():
            if callable(handler):
                signal.signal(number, handler)


def describe_os_error(error: OSError) -> str:
    """A sentence about `error`, with the file it is about."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return printable(reason)
    return f"{printable(error.filename, limit=1000)}: {reason}"


def _fail(message: str) -> NoReturn:
    """Print one line and exit with 1."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def _exit_on_closed_pipe() -> NoReturn:
    """Exit without a word: the interpreter must not flush into the closed pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _tolerate_any_character() -> None:
    """Let a character that the terminal's encoding lacks be shown as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ignore_requests_to_end() -> None:
    """The interpreter gives up its handlers before it is gone: a second Ctrl-C would kill it."""
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _unwind_on_termination() -> None:
    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, terminate)
