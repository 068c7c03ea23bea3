"""The CPU backend: the lowered program run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, and all run the same table (runtime/kernels/interpreter.py). The calling
thread never waits for one that has not woken: it does all the work that nobody else has claimed.

A few tokens at once need kernels of their own, which are compiled in the background when such a
batch is first met. Until then, or where no folder can keep them, the tokens go one after the other.
That takes longer and gives the same logits to the bit.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from gguf_tools.jit import Background, Kernel
from runtime.backends.crew import Crew, ReadyTable
from runtime.backends.frame import Batch
from runtime.backends.lowering import HostProduct, Lowering, host_type
from runtime.backends.memory import Arena, Memory, Place, make_caches
from runtime.backends.needs import few_kernels, needed_kernels, scratch_bytes
from runtime.backends.reference import expert_matmul, matmul
from runtime.backends.table import Table
from runtime.kernels import attention, experts
from runtime.kernels.interpreter import (
    EPOCH,
    N_CHUNKS,
    N_THREADS,
    N_TOKENS,
    POSITION,
    PROGRESS_BYTES,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_FIELDS,
)
from runtime.kernels.kv_cache import KV_TYPES, POSITIONS
from runtime.kernels.matmul import COLUMNS, FEW_TOKENS
from runtime.program import ExpertMatMul, Floats, Program

Parts = list[ReadyTable | HostProduct]

HEAD_ROWS = 48  # rows of logits computed at a time: a row of 150k float32 is 600 kB


class CPUBackend:
    """Runs a program with compiled kernels."""

    def __init__(
        self,
        program: Program,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int,
        kv_type: str = "f16",
    ) -> None:
        self.program = program
        self.n_threads = n_threads
        arena = Arena()
        room = (max(n_batch, HEAD_ROWS) + COLUMNS - 1) // COLUMNS * COLUMNS
        n_positions = (n_ctx + POSITIONS - 1) // POSITIONS * POSITIONS
        kv = KV_TYPES[kv_type]
        self._buffers: dict[str, Floats] = {}
        shared = {
            name: self._buffer(arena, name, width, HEAD_ROWS if name == "logits" else room)
            for name, width in program.buffers.items()
        }
        caches = make_caches(arena, program.caches, kv, n_positions)
        memory = Memory(arena, shared, caches, kv, n_positions, n_threads, room)
        one, many = (Lowering(program, memory, batch) for batch in (Batch.ONE, Batch.MANY))
        self._memory = memory
        self._body = [step for layer in program.layers for step in layer]
        self._decode = _ready(arena, one.lower([*self._body, *program.head]))
        self._body_one = _ready(arena, one.lower(self._body))
        self._prompt = _ready(arena, many.lower(self._body))
        self._head_one = _ready(arena, one.lower(program.head))
        self._head_many = _ready(arena, many.lower(program.head))
        self._one_places, self._many_places = one.frame.places, many.frame.places
        self._few = few_tokens(program)
        self._few_kernels = Background(few_kernels(program))
        self._few_tables: tuple[Parts, Parts] | None = None  # body and head
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
        self._state[SCRATCH_BYTES] = scratch_bytes(program, n_positions, room, kv)
        self._state[SCRATCH] = arena.zeros(int(self._state[SCRATCH_BYTES]) * n_threads)
        self._crew = Crew(n_threads)

    @staticmethod
    def kernels(program: Program, kv_type: str = "f16") -> list[Kernel]:
        """The kernels that `program` needs, the slowest to compile first."""
        return needed_kernels(program, kv_type)

    def _tables_for_few(self) -> tuple[Parts, Parts] | None:
        """Body and head for a few tokens, once their kernels are compiled."""
        if self._few_tables is None and self._few_kernels.is_done():
            lowering = Lowering(self.program, self._memory, Batch.FEW)
            body, head = (lowering.lower(steps) for steps in (self._body, self.program.head))
            self._few_tables = _ready(self._arena, body), _ready(self._arena, head)
        return self._few_tables

    def _buffer(self, arena: Arena, name: str, width: int, rows: int) -> Place:
        """Rows with room for whole groups of 32 and one cache line more, against aliasing."""
        stride = (width + 31) // 32 * 32 + 48
        block = np.zeros((rows, stride), np.float32)
        self._buffers[name] = block
        return Place(arena.hold(block), 0, stride * 4)

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        n, dim = len(ids), self.program.buffers["x"]
        body, head = self._prompt, self._head_many
        if n <= self._few:
            few = self._tables_for_few() if n > 1 else None
            if few is None:
                return self._run_one_by_one(ids, start, n_outputs)
            body, head = few
        n_vocab = self.program.buffers["logits"]
        hidden = self._buffers["x"]
        hidden[:n, :dim] = self.program.embed(ids, start)
        self._execute(body, n, start)
        logits = np.empty((n_outputs, n_vocab), np.float32)
        for first in range(0, n_outputs, HEAD_ROWS):
            rows = min(HEAD_ROWS, n_outputs - first)
            row = n - n_outputs + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._execute(self._head_one if rows == 1 else head, rows, start + row)
            logits[first : first + rows] = self._buffers["logits"][:rows, :n_vocab]
        return logits

    def _run_one_by_one(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        dim, n_vocab = self.program.buffers["x"], self.program.buffers["logits"]
        logits = np.empty((n_outputs, n_vocab), np.float32)
        silent = len(ids) - n_outputs
        for i in range(len(ids)):
            self._buffers["x"][:1, :dim] = self.program.embed(ids[i : i + 1], start + i)
            self._execute(self._body_one if i < silent else self._decode, 1, start + i)
            if i >= silent:
                logits[i - silent] = self._buffers["logits"][0, :n_vocab]
        return logits

    def close(self) -> None:
        self._few_kernels.close()
        self._crew.close()

    def _execute(self, parts: Parts, n_tokens: int, start: int) -> None:
        for part in parts:
            if isinstance(part, HostProduct):
                self._multiply(part, n_tokens)
                continue
            # A new block each time: a late thread may still read that of the step before.
            self._state[EPOCH] += 1
            state = self._state.copy()
            state[N_TOKENS] = n_tokens
            state[POSITION] = start
            state[N_CHUNKS] = self._chunks(n_tokens, start)
            self._crew.run(part, state)

    def _chunks(self, n_tokens: int, start: int) -> int:
        """Attention's pieces of a KV head's work, at most, over all layers."""
        if n_tokens <= self._few:
            return n_tokens * attention.chunk_count(start + n_tokens)
        sizes = {attention.query_tokens(s.n_heads // s.n_kv_heads) for s in self.program.caches}
        return -(-n_tokens // min(sizes))

    def _multiply(self, part: HostProduct, n_tokens: int) -> None:
        """A product of a format without kernels, in NumPy."""
        places = self._one_places if n_tokens == 1 else self._many_places
        step = part.step
        source = _view(places[step.source], n_tokens, part.width)
        if isinstance(step, ExpertMatMul):
            width = step.n_used * step.experts[0].n_rows
            routes = _view(places[step.routes], n_tokens, 2 * step.n_used)
            product = expert_matmul(source, routes, step)
        else:
            width = step.matrix.n_rows
            product = matmul(source[:, : step.matrix.n_columns], step.matrix)
        _view(places[step.target], n_tokens, width)[:] = product


def few_tokens(program: Program) -> int:
    """How many tokens, at most, are computed as each of them would be alone.

    NumPy's products depend on their number; experts take so many by matvec.
    """
    if any(host_type(step) for step in program.steps):
        return 1
    mixed = any(isinstance(step, ExpertMatMul) for step in program.steps)
    return min(FEW_TOKENS, experts.FEW) if mixed else FEW_TOKENS


def _view(place: Place, n_tokens: int, width: int) -> Floats:
    """A buffer as NumPy sees it; the first thread's where each thread has its own."""
    size = place.token_stride // 4
    memory = (ctypes.c_float * (n_tokens * size)).from_address(place.base)
    rows: Floats = np.ctypeslib.as_array(memory).reshape(n_tokens, size)
    return rows[:, :width]


def _ready(arena: Arena, parts: list[Table | HostProduct]) -> Parts:
    return [
        ReadyTable(part.array(), arena.zeros(len(part.rows) * PROGRESS_BYTES))
        if isinstance(part, Table)
        else part
        for part in parts
    ]
