"""A file that goes to the disk while it is still being written, so that its end is soon there."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

EVERY = 64 << 20  # bytes that are written before the disk is asked to take them

_flush = getattr(os, "fdatasync", os.fsync)


class Flusher:
    """Flushes a file in a thread. To be closed before the file is."""

    def __init__(self) -> None:
        self.failure: OSError | None = None  # the system tells it once, and here it is kept
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._running: Future[None] | None = None
        self._n_bytes = 0  # written since it began

    def wrote(self, fd: int, n_bytes: int) -> None:
        """So many bytes more are in the file."""
        self._n_bytes += n_bytes
        if self._n_bytes >= EVERY and (self._running is None or self._running.done()):
            self._n_bytes = 0
            self._running = self._executor.submit(self._run, fd)

    def close(self) -> None:
        """Wait for the disk; nothing is begun any more."""
        self._executor.shutdown(wait=True)

    def _run(self, fd: int) -> None:
        try:
            _flush(fd)
        except OSError as error:
            self.failure = error
