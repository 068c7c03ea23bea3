"""Text that comes through a pipe or from a file."""

import os
import threading

from gguf_tools.errors import GGUFError


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
