"""What lowered tables run with: buffers, KV caches, scratch, and the threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.backends.crew import Crew, ReadyTable
from runtime.backends.lowering import HostProduct, HostShow
from runtime.backends.memory import Arena, Memory, Place, make_caches
from runtime.backends.needs import scratch_bytes
from runtime.backends.observing import Observe, Product, observed, show
from runtime.backends.reference import expert_matmul, matmul
from runtime.backends.table import Table
from runtime.kernels import attention
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
from runtime.kernels.matmul import COLUMNS
from runtime.program import ExpertMatMul, Floats, Stage

HEAD_ROWS = 48  # rows of logits computed at a time: a row of 150k float32 is 600 kB

Parts = list[ReadyTable | HostProduct | HostShow]


class Engine:
    """Memory for a stage and the threads that run its tables."""

    def __init__(
        self,
        stage: Stage,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int,
        kv_type: str,
        n_few: int,
        n_outputs: int = HEAD_ROWS,
    ) -> None:
        """`n_few`: so many tokens are computed as each would be alone; `n_outputs`: of so many
        there are logits at a time.
        """
        self.stage = stage
        self._n_few = n_few
        arena = Arena()
        room = (max(n_batch, n_outputs) + COLUMNS - 1) // COLUMNS * COLUMNS
        n_positions = (n_ctx + POSITIONS - 1) // POSITIONS * POSITIONS
        kv = KV_TYPES[kv_type]
        self.buffers: dict[str, Floats] = {}
        shared: dict[str, Place] = {}
        for name, width in stage.buffers.items():
            rows = n_outputs if name == "logits" else room
            self.buffers[name], shared[name] = arena.rows(rows, width)
        caches = make_caches(arena, stage.caches, kv, n_positions)
        self.memory = Memory(arena, shared, caches, kv, n_positions, n_threads, room)
        self._state = np.zeros(STATE_FIELDS, np.int64)
        self._state[N_THREADS] = n_threads
        self._state[SCRATCH_BYTES] = scratch_bytes(stage, n_positions, room, kv)
        self._state[SCRATCH] = arena.zeros(int(self._state[SCRATCH_BYTES]) * n_threads)
        self._crew = Crew(n_threads)

    def ready(self, parts: Iterable[Table | HostProduct | HostShow]) -> Parts:
        """The tables with the counters that they are claimed by."""
        arena = self.memory.arena
        return [
            ReadyTable(part.array(), arena.zeros(len(part.rows) * PROGRESS_BYTES))
            if isinstance(part, Table)
            else part
            for part in parts
        ]

    def execute(
        self,
        parts: Sequence[ReadyTable | HostProduct | HostShow],
        n_tokens: int,
        start: int,
        *,
        product: Product = matmul,
        observe: Observe | None = None,
    ) -> None:
        """Run tables, and the products between them with `product`."""
        product = observed(product, observe)
        for part in parts:
            if isinstance(part, HostShow):
                show(part.step, _view(part.source, n_tokens, part.width), observe)
                continue
            if isinstance(part, HostProduct):
                _multiply(part, n_tokens, product)
                continue
            # A new block each time: a late thread may still read that of the step before.
            self._state[EPOCH] += 1
            state = self._state.copy()
            state[N_TOKENS] = n_tokens
            state[POSITION] = start
            state[N_CHUNKS] = self._chunks(n_tokens, start)
            self._crew.run(part, state)

    def close(self) -> None:
        self._crew.close()

    def _chunks(self, n_tokens: int, start: int) -> int:
        """Attention's pieces of a KV head's work, at most, over all layers."""
        if n_tokens <= self._n_few:
            return n_tokens * attention.chunk_count(start + n_tokens)
        groups = {s.n_heads // s.n_kv_heads for s in self.stage.caches}
        return -(-n_tokens // min(map(attention.query_tokens, groups), default=n_tokens))


def _multiply(part: HostProduct, n_tokens: int, product: Product) -> None:
    """A product that no table does."""
    step = part.step
    source = _view(part.source, n_tokens, part.width)
    if isinstance(step, ExpertMatMul):
        width = step.n_used * step.experts[0].n_rows
        assert part.routes is not None
        routes = _view(part.routes, n_tokens, 2 * step.n_used)
        result = expert_matmul(source, routes, step, product)
    else:
        width = step.matrix.n_rows
        result = product(source[:, : step.matrix.n_columns], step.matrix)
    _view(part.target, n_tokens, width)[:] = result


def _view(place: Place, n_tokens: int, width: int) -> Floats:
    """A buffer as NumPy sees it; the first thread's where each thread has its own."""
    size = place.token_stride // 4
    memory = (ctypes.c_float * (n_tokens * size)).from_address(place.base)
    rows: Floats = np.ctypeslib.as_array(memory).reshape(n_tokens, size)
    return rows[:, :width]
