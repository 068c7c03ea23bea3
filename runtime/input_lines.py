"""Lines of standard input, which can be waited for."""

from __future__ import annotations

import os
import threading
from queue import Empty, Queue


class InputLines:
    """What a parent process tells, line by line.

    A thread reads, because not every system can wait for a pipe; and with os.read, because a thread
    that still waits in sys.stdin when the program ends is a crash.
    """

    def __init__(self) -> None:
        self._lines: Queue[bytes] = Queue()  # b"": there are no more
        self._next: bytes | None = None
        threading.Thread(target=self._read, daemon=True, name="input").start()

    def comes(self, *, seconds: float) -> bool:
        """Whether the next line, or the end, is there within so many seconds."""
        if self._next is None:
            try:
                self._next = self._lines.get(timeout=seconds)
            except Empty:
                return False
        return True

    def read(self) -> bytes:
        """The next line, which is waited for; b"" at the end."""
        line = self._lines.get() if self._next is None else self._next
        self._next = None if line else b""
        return line

    def _read(self) -> None:
        rest = b""
        while chunk := _read_some():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._lines.put(line + b"\n")
        self._lines.put(b"")


def _read_some() -> bytes:
    try:
        return os.read(0, 1 << 16)
    except OSError:  # closed
        return b""
