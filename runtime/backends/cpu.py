"""The CPU backend: a lowered stage run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, and all run the same table (runtime/kernels/interpreter.py). The calling
thread never waits for one that has not woken: it does all the work that nobody else has claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gguf_tools.jit import Kernel
from runtime.backends.crew import ReadyTable
from runtime.backends.engine import HEAD_ROWS, Engine
from runtime.backends.lowering import HostProduct, Lowering
from runtime.backends.needs import needed_kernels
from runtime.kernels.table import FORMATS
from runtime.program import Floats, Span, Stage, matrices

FEW_TOKENS = 4  # up to here one after the other: a tile costs as much as 4 tokens to set up


@dataclass(frozen=True, eq=False)
class LoweredSpan:
    """The tables of a span, for one token and for many."""

    span: Span
    decode: list[ReadyTable | HostProduct]  # body and head in one go, for one token
    body_one: list[ReadyTable | HostProduct]
    body_many: list[ReadyTable | HostProduct]
    head_one: list[ReadyTable | HostProduct]
    head_many: list[ReadyTable | HostProduct]


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
        self._engine = engine = Engine(
            stage, n_ctx=n_ctx, n_threads=n_threads, n_batch=n_batch, kv_type=kv_type
        )
        one, many = (Lowering(stage, engine.memory, one_token=flag) for flag in (True, False))
        self.spans = tuple(_lower(span, engine, one, many) for span in stage.spans)
        slow = sorted({matrix.quant.name for matrix in matrices(stage)} - FORMATS.keys())
        self.notes: tuple[str, ...] = ()
        if slow:
            verb = "has" if len(slow) == 1 else "have"
            self.notes = (
                f"{', '.join(slow)} {verb} no fast kernel yet: these tensors are read slowly",
            )

    @staticmethod
    def kernels(stage: Stage, kv_type: str = "f16") -> list[Kernel]:
        """The kernels that `stage` needs, the slowest to compile first."""
        return needed_kernels(stage, kv_type)

    def run(
        self, index: int, values: Mapping[str, Floats], start: int, n_outputs: int
    ) -> dict[str, Floats]:
        lowered = self.spans[index]
        span = lowered.span
        n = len(next(iter(values.values())))
        rows = n_outputs if span.head else n
        made = {name: np.empty((rows, width), np.float32) for name, width in span.outputs.items()}
        if n <= FEW_TOKENS:
            self._run_one_by_one(lowered, values, made, start, n - rows)
            return made
        self._fill(span, values, slice(None))
        self._engine.execute(lowered.body_many, n, start)
        if span.head:
            self._run_head(lowered, made["logits"], start, n)
            return made
        for name, result in made.items():
            result[:] = self._engine.buffers[name][:n, : result.shape[1]]
        return made

    def _fill(self, span: Span, values: Mapping[str, Floats], rows: slice) -> None:
        for name, width in span.inputs.items():
            given = values[name][rows]
            self._engine.buffers[name][: len(given), :width] = given

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
            self._engine.execute(lowered.body_one if i < silent else lowered.decode, 1, start + i)
            if i >= silent:
                for name, result in made.items():
                    result[i - silent] = self._engine.buffers[name][0, : result.shape[1]]

    def _run_head(self, lowered: LoweredSpan, logits: Floats, start: int, n: int) -> None:
        """The head for the last tokens, of which there are as many as rows of logits."""
        hidden = self._engine.buffers["x"]
        for first in range(0, len(logits), HEAD_ROWS):
            rows = min(HEAD_ROWS, len(logits) - first)
            row = n - len(logits) + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._engine.execute(
                lowered.head_one if rows == 1 else lowered.head_many, rows, start + row
            )
            logits[first : first + rows] = self._engine.buffers["logits"][:rows, : logits.shape[1]]

    def close(self) -> None:
        self._engine.close()


def _lower(span: Span, engine: Engine, one: Lowering, many: Lowering) -> LoweredSpan:
    hidden = {"x": span.inputs["x"]} if span.head else {}
    decode = engine.ready(one.lower((*span.body, *span.head), span.inputs))
    body = engine.ready(one.lower(span.body, span.inputs)) if span.head else decode
    return LoweredSpan(
        span=span,
        decode=decode,
        body_one=body,
        body_many=engine.ready(many.lower(span.body, span.inputs)),
        head_one=engine.ready(one.lower(span.head, hidden)),
        head_many=engine.ready(many.lower(span.head, hidden)),
    )
