"""The CPU backend: the lowered program run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, all run the same table (runtime/kernels/interpreter.py) and meet at
barriers made of atomics.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import numpy.typing as npt

from runtime.backends.lowering import (
    Arena,
    Cache,
    HostMatMul,
    Lowering,
    Memory,
    Place,
    Table,
)
from runtime.backends.reference import matmul as reference_matmul
from runtime.kernels import attention, matmul
from runtime.kernels.interpreter import (
    BARRIER,
    N_THREADS,
    N_TOKENS,
    POSITION,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_FIELDS,
    run_table,
)
from runtime.program import Floats, MatMul, Program

HEAD_ROWS = 48  # rows of logits computed at a time: a row of 150k float32 is 600 kB


class CPUBackend:
    """Runs a program with compiled kernels."""

    def __init__(self, program: Program, *, n_ctx: int, n_threads: int, n_batch: int) -> None:
        self.program = program
        self.n_threads = n_threads
        arena = Arena()
        columns = matmul.COLUMNS
        room = (max(n_batch, HEAD_ROWS) + columns - 1) // columns * columns
        n_positions = (n_ctx + attention.KEYS - 1) // attention.KEYS * attention.KEYS
        self._buffers: dict[str, Floats] = {}
        shared = {
            name: self._buffer(arena, name, width, HEAD_ROWS if name == "logits" else room)
            for name, width in program.buffers.items()
        }
        caches = tuple(
            Cache(
                shape,
                arena.zeros(shape.n_kv_heads * n_positions * attention.padded(shape.key_dim) * 2),
                arena.zeros(shape.n_kv_heads * n_positions * attention.padded(shape.value_dim) * 2),
            )
            for shape in program.caches
        )
        memory = Memory(arena, shared, caches, n_positions, n_threads, room)
        one, many = (Lowering(program, memory, one_token=flag) for flag in (True, False))
        body = [step for layer in program.layers for step in layer]
        self._decode = _arrays(one.lower([*body, *program.head]))
        self._prompt = _arrays(many.lower(body))
        self._head_one = _arrays(one.lower(program.head))
        self._head_many = _arrays(many.lower(program.head))
        self._one_places, self._many_places = one.places, many.places
        slow = sorted(one.host_types)
        self.notes: tuple[str, ...] = ()
        if slow:
            verb = "has" if len(slow) == 1 else "have"
            self.notes = (
                f"{', '.join(slow)} {verb} no fast kernel yet: these tensors are read slowly",
            )
        self._arena = arena
        self._state = np.zeros(STATE_FIELDS, np.int64)
        self._state[N_THREADS] = n_threads
        self._state[BARRIER] = arena.zeros(128)
        self._state[SCRATCH_BYTES] = _scratch_bytes(program, n_positions)
        self._state[SCRATCH] = arena.zeros(int(self._state[SCRATCH_BYTES]) * n_threads)
        self._crew = _Crew(n_threads)

    def _buffer(self, arena: Arena, name: str, width: int, rows: int) -> Place:
        """Rows with room for whole groups of 32 and one cache line more, against aliasing."""
        stride = (width + 31) // 32 * 32 + 48
        block = np.zeros((rows, stride), np.float32)
        self._buffers[name] = block
        return Place(arena.hold(block), 0, stride * 4)

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        n, dim = len(ids), self.program.buffers["x"]
        n_vocab = self.program.buffers["logits"]
        hidden = self._buffers["x"]
        hidden[:n, :dim] = self.program.embedding.rows(ids)
        if n == 1 and n_outputs == 1:
            self._execute(self._decode, 1, start)
            return self._buffers["logits"][:1, :n_vocab].copy()
        self._execute(self._prompt, n, start)
        logits = np.empty((n_outputs, n_vocab), np.float32)
        for first in range(0, n_outputs, HEAD_ROWS):
            rows = min(HEAD_ROWS, n_outputs - first)
            row = n - n_outputs + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._execute(self._head_one if rows == 1 else self._head_many, rows, start + row)
            logits[first : first + rows] = self._buffers["logits"][:rows, :n_vocab]
        return logits

    def close(self) -> None:
        self._crew.close()

    def _execute(
        self, parts: list[npt.NDArray[np.int64] | HostMatMul], n_tokens: int, start: int
    ) -> None:
        self._state[N_TOKENS] = n_tokens
        self._state[POSITION] = start
        for part in parts:
            if isinstance(part, HostMatMul):
                self._multiply(part.step, n_tokens)
            else:
                self._crew.run(part.ctypes.data, len(part), self._state.ctypes.data)

    def _multiply(self, step: MatMul, n_tokens: int) -> None:
        """A product of a format without kernels, in NumPy."""
        places = self._one_places if n_tokens == 1 else self._many_places
        source = _view(places[step.source], n_tokens, step.matrix.n_columns)
        target = _view(places[step.target], n_tokens, step.matrix.n_rows)
        target[:] = reference_matmul(source, step)


def _view(place: Place, n_tokens: int, width: int) -> Floats:
    """A buffer as NumPy sees it; the first thread's where each thread has its own."""
    size = place.token_stride // 4
    memory = (ctypes.c_float * (n_tokens * size)).from_address(place.base)
    rows: Floats = np.ctypeslib.as_array(memory).reshape(n_tokens, size)
    return rows[:, :width]


def _arrays(parts: list[Table | HostMatMul]) -> list[npt.NDArray[np.int64] | HostMatMul]:
    return [part.array() if isinstance(part, Table) else part for part in parts]


def _scratch_bytes(program: Program, n_positions: int) -> int:
    steps = [*(i for layer in program.layers for i in layer), *program.head]
    needs = [matmul.scratch_bytes(s.matrix.n_columns) for s in steps if isinstance(s, MatMul)]
    needs += [
        attention.scratch_bytes(
            n_positions, shape.n_heads // shape.n_kv_heads, shape.key_dim, shape.value_dim
        )
        for shape in program.caches
    ]
    return (max(needs) + 4095) // 4096 * 4096


class _Crew:
    """Parked threads that run a table together with the caller."""

    def __init__(self, n_threads: int) -> None:
        self._task = (0, 0, 0)
        self._go = [threading.Semaphore(0) for _ in range(n_threads - 1)]
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(i + 1, go), daemon=True, name=f"cpu-{i + 1}")
            for i, go in enumerate(self._go)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, table: int, count: int, state: int) -> None:
        """Run a table; the barrier at its end holds the caller until every thread is done."""
        self._task = (table, count, state)
        for go in self._go:
            go.release()
        run_table(table, count, state, 0)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for go in self._go:
                go.release()
            for thread in self._threads:
                thread.join()

    def _work(self, thread: int, go: threading.Semaphore) -> None:
        while True:
            go.acquire()
            if self._closed:
                return
            table, count, state = self._task
            run_table(table, count, state, thread)
