"""The threads that run tables of operations together with the caller."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.kernels.interpreter import run_table


@dataclass(frozen=True, eq=False)
class ReadyTable:
    """A table and the address of its claim counters."""

    operations: npt.NDArray[np.int64]  # (n_operations, words)
    progress: int


class Crew:
    """Parked threads that run tables together with the caller."""

    def __init__(self, n_threads: int) -> None:
        self._task: tuple[ReadyTable, npt.NDArray[np.int64]] | None = None
        self._go = [threading.Lock() for _ in range(n_threads - 1)]  # held: nothing to do
        self._threads = [
            threading.Thread(target=self._work, args=(i + 1, go), daemon=True, name=f"cpu-{i + 1}")
            for i, go in enumerate(self._go)
        ]
        for go, thread in zip(self._go, self._threads, strict=True):
            go.acquire()
            thread.start()

    def run(self, table: ReadyTable, state: npt.NDArray[np.int64]) -> None:
        """Run a table; when this returns, all of its work is done."""
        self._task = (table, state)
        self._wake()
        run(table, state, 0)

    def close(self) -> None:
        self._task = None
        self._wake()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _wake(self) -> None:
        for go in self._go:
            if go.locked():  # else a late thread has yet to take the last task: it takes this one
                go.release()

    def _work(self, thread: int, go: threading.Lock) -> None:
        while True:
            go.acquire()
            task = self._task
            if task is None:
                return
            run(*task, thread)


def run(table: ReadyTable, state: npt.NDArray[np.int64], thread: int) -> None:
    """One thread's part in running a table; thread 0 stays until all is done."""
    operations = table.operations
    run_table(operations.ctypes.data, len(operations), table.progress, state.ctypes.data, thread)
