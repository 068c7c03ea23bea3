"""The CPU backend: a lowered stage run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, and all run the same table (runtime/kernels/interpreter.py). The calling
thread never waits for one that has not woken: it does all the work that nobody else has claimed.

A few tokens at once need kernels of their own, which are compiled in the background when such a
batch is first met. Until then, or where no folder can keep them, the tokens go one after the other.
That takes longer and gives the same logits to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
from runtime.program import ExpertMatMul, Floats, Span, Stage

Parts = list[ReadyTable | HostProduct]

HEAD_ROWS = 48  # rows of logits computed at a time: a row of 150k float32 is 600 kB


@dataclass(frozen=True, eq=False)
class LoweredSpan:
    """The tables of a span, for one token and for many."""

    span: Span
    decode: Parts  # body and head in one go, for one token
    body_one: Parts
    body_many: Parts
    head_one: Parts
    head_many: Parts


class CPUBackend:
    """Runs a stage with compiled kernels."""

    def __init__(
        self,
        stage: Stage,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int,
        kv_type: str = "f16",
    ) -> None:
        self.stage = stage
        self.n_threads = n_threads
        arena = Arena()
        room = (max(n_batch, HEAD_ROWS) + COLUMNS - 1) // COLUMNS * COLUMNS
        n_positions = (n_ctx + POSITIONS - 1) // POSITIONS * POSITIONS
        kv = KV_TYPES[kv_type]
        self._buffers: dict[str, Floats] = {}
        shared = {
            name: self._buffer(arena, name, width, HEAD_ROWS if name == "logits" else room)
            for name, width in stage.buffers.items()
        }
        caches = make_caches(arena, stage.caches, kv, n_positions)
        memory = Memory(arena, shared, caches, kv, n_positions, n_threads, room)
        one, many = (Lowering(stage, memory, batch) for batch in (Batch.ONE, Batch.MANY))
        self._memory = memory
        self.spans = tuple(_lower(span, arena, one, many) for span in stage.spans)
        self._one_places, self._many_places = one.frame.places, many.frame.places
        self._few = few_tokens(stage)
        self._few_kernels = Background(few_kernels(stage))
        self._few_tables: list[tuple[Parts, Parts]] | None = None
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
        self._state[SCRATCH_BYTES] = scratch_bytes(stage, n_positions, room, kv)
        self._state[SCRATCH] = arena.zeros(int(self._state[SCRATCH_BYTES]) * n_threads)
        self._crew = Crew(n_threads)

    @staticmethod
    def kernels(stage: Stage, kv_type: str = "f16") -> list[Kernel]:
        """The kernels that `stage` needs, the slowest to compile first."""
        return needed_kernels(stage, kv_type)

    def _tables_for_few(self) -> list[tuple[Parts, Parts]] | None:
        """Body and head of each span for a few tokens, once their kernels are compiled."""
        if self._few_tables is None and self._few_kernels.is_done():
            few = Lowering(self.stage, self._memory, Batch.FEW)
            self._few_tables = [
                _lower_several(lowered.span, self._arena, few) for lowered in self.spans
            ]
        return self._few_tables

    def _buffer(self, arena: Arena, name: str, width: int, rows: int) -> Place:
        """Rows with room for whole groups of 32 and one cache line more, against aliasing."""
        stride = (width + 31) // 32 * 32 + 48
        block = np.zeros((rows, stride), np.float32)
        self._buffers[name] = block
        return Place(arena.hold(block), 0, stride * 4)

    def run(
        self, index: int, values: Mapping[str, Floats], start: int, n_outputs: int
    ) -> dict[str, Floats]:
        lowered = self.spans[index]
        span = lowered.span
        n = len(next(iter(values.values())))
        rows = n_outputs if span.head else n
        made = {name: np.empty((rows, width), np.float32) for name, width in span.outputs.items()}
        body, head = lowered.body_many, lowered.head_many
        if n <= self._few:
            few = self._tables_for_few() if n > 1 else None
            if few is None:
                self._run_one_by_one(lowered, values, made, start, n - rows)
                return made
            body, head = few[index]
        self._fill(span, values, slice(None))
        self._execute(body, n, start)
        if span.head:
            self._run_head(lowered.head_one, head, made["logits"], start, n)
            return made
        for name, result in made.items():
            result[:] = self._buffers[name][:n, : result.shape[1]]
        return made

    def _fill(self, span: Span, values: Mapping[str, Floats], rows: slice) -> None:
        for name, width in span.inputs.items():
            given = values[name][rows]
            self._buffers[name][: len(given), :width] = given

    def _run_one_by_one(
        self,
        lowered: LoweredSpan,
        values: Mapping[str, Floats],
        made: dict[str, Floats],
        start: int,
        silent: int,
    ) -> None:
        """Token by token; of the first `silent` ones nothing is wanted."""
        n = len(next(iter(values.values())))
        for i in range(n):
            self._fill(lowered.span, values, slice(i, i + 1))
            self._execute(lowered.body_one if i < silent else lowered.decode, 1, start + i)
            if i >= silent:
                for name, result in made.items():
                    result[i - silent] = self._buffers[name][0, : result.shape[1]]

    def _run_head(self, head_one: Parts, head: Parts, logits: Floats, start: int, n: int) -> None:
        """The head for the last tokens, of which there are as many as rows of logits."""
        hidden = self._buffers["x"]
        for first in range(0, len(logits), HEAD_ROWS):
            rows = min(HEAD_ROWS, len(logits) - first)
            row = n - len(logits) + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._execute(head_one if rows == 1 else head, rows, start + row)
            logits[first : first + rows] = self._buffers["logits"][:rows, : logits.shape[1]]

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
        groups = {s.n_heads // s.n_kv_heads for s in self.stage.caches}
        return -(-n_tokens // min(map(attention.query_tokens, groups), default=n_tokens))

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


def few_tokens(stage: Stage) -> int:
    """How many tokens, at most, are computed as each of them would be alone.

    NumPy's products depend on their number; experts take so many by matvec.
    """
    if any(host_type(step) for step in stage.steps):
        return 1
    mixed = any(isinstance(step, ExpertMatMul) for step in stage.steps)
    return min(FEW_TOKENS, experts.FEW) if mixed else FEW_TOKENS


def _view(place: Place, n_tokens: int, width: int) -> Floats:
    """A buffer as NumPy sees it; the first thread's where each thread has its own."""
    size = place.token_stride // 4
    memory = (ctypes.c_float * (n_tokens * size)).from_address(place.base)
    rows: Floats = np.ctypeslib.as_array(memory).reshape(n_tokens, size)
    return rows[:, :width]


def _lower(span: Span, arena: Arena, one: Lowering, many: Lowering) -> LoweredSpan:
    decode = _ready(arena, one.lower((*span.body, *span.head), span.inputs))
    body = _ready(arena, one.lower(span.body, span.inputs)) if span.head else decode
    body_many, head_many = _lower_several(span, arena, many)
    return LoweredSpan(
        span=span,
        decode=decode,
        body_one=body,
        body_many=body_many,
        head_one=_ready(arena, one.lower(span.head, _hidden(span))),
        head_many=head_many,
    )


def _lower_several(span: Span, arena: Arena, several: Lowering) -> tuple[Parts, Parts]:
    """Body and head for several tokens."""
    body, head = several.lower(span.body, span.inputs), several.lower(span.head, _hidden(span))
    return _ready(arena, body), _ready(arena, head)


def _hidden(span: Span) -> dict[str, int]:
    """What the head of a span begins with."""
    return {"x": span.inputs["x"]} if span.head else {}


def _ready(arena: Arena, parts: list[Table | HostProduct]) -> Parts:
    return [
        ReadyTable(part.array(), arena.zeros(len(part.rows) * PROGRESS_BYTES))
        if isinstance(part, Table)
        else part
        for part in parts
    ]
