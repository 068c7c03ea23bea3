"""The prompt: from the command line, through a pipe, or from a file."""

import os
import sys
import threading

from gguf_tools.errors import GGUFError
from runtime.terminal import remark

WAIT_FOR_PIPE = 2.0  # seconds that `-p` waits for a pipe to give its first byte


def read_prompt(prompt: str | None) -> str | None:
    """`prompt`, then what is piped in; None when a person is to be asked."""
    piped: str | None = ""
    if sys.stdin is None or not sys.stdin.isatty():
        piped = read_piped_text(wait=None if prompt is None else WAIT_FOR_PIPE)
        if piped is None:
            remark(
                f"note: nothing came through standard input in {WAIT_FOR_PIPE:g} s; "
                "going on without it"
            )
    elif prompt is None:
        if not sys.stdout.isatty():
            raise GGUFError("a chat needs a terminal to write to; give a prompt with -p")
        return None
    text = "\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise GGUFError(
            "the prompt is empty: give some text with -p or in a pipe, "
            "or start `run` at a terminal to chat"
        )
    return text


def check_text(name: str, value: str | None) -> None:
    """GGUFError when the value of option `name` is not text: a shell passes any bytes."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise GGUFError(f"{name}: the text is not valid UTF-8") from None


def read_piped_text(*, wait: float | None) -> str | None:
    """All text on standard input, less the last newline.

    With `wait`, None unless the first byte, or the end, comes within so many seconds: a program
    that starts this one may leave a pipe open and never write to it.
    """
    chunks: list[bytes] = []
    begun = threading.Event()

    def read() -> None:
        try:
            while chunk := os.read(0, 1 << 16):
                chunks.append(chunk)
                begun.set()
        except OSError:  # closed, or a folder: there is nothing to read
            chunks.clear()
        begun.set()

    # A thread, because not every system can wait for a pipe; and os.read, because a thread that
    # still waits in sys.stdin when the program ends is a crash.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if wait is not None and not begun.wait(wait):
        return None
    reader.join()
    try:
        text = b"".join(chunks).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GGUFError(f"standard input is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")
