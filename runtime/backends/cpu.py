"""The CPU backend: a lowered stage run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, and all run the same table (runtime/kernels/interpreter.py). The calling
thread never waits for one that has not woken: it does all the work that nobody else has claimed.

A few tokens at once need kernels of their own, which are compiled in the background when such a
batch is first met. Until then, or where no folder can keep them, the tokens go one after the other.
That takes longer and gives the same logits to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gguf_tools.jit import Background, Kernel
from runtime.backends.engine import HEAD_ROWS, Engine, Parts
from runtime.backends.frame import Batch
from runtime.backends.lowering import Lowering, is_apart
from runtime.backends.needs import few_kernels, needed_kernels
from runtime.kernels import experts
from runtime.kernels.matmul import FEW_TOKENS
from runtime.kernels.table import FORMATS
from runtime.program import ExpertMatMul, Floats, Span, Stage, matrices


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
        self._few = few_tokens(stage)
        self._engine = engine = Engine(
            stage,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_batch=n_batch,
            kv_type=kv_type,
            n_few=self._few,
        )
        one, many = (Lowering(stage, engine.memory, size) for size in (Batch.ONE, Batch.MANY))
        self.spans = tuple(_lower(span, engine, one, many) for span in stage.spans)
        self._few_kernels = Background(few_kernels(stage))
        self._few_tables: list[tuple[Parts, Parts]] | None = None
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

    def _tables_for_few(self) -> list[tuple[Parts, Parts]] | None:
        """Body and head of each span for a few tokens, once their kernels are compiled."""
        if self._few_tables is None and self._few_kernels.is_done():
            few = Lowering(self.stage, self._engine.memory, Batch.FEW)
            self._few_tables = [
                _lower_several(lowered.span, self._engine, few) for lowered in self.spans
            ]
        return self._few_tables

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
        self._engine.execute(body, n, start)
        if span.head:
            self._run_head(lowered.head_one, head, made["logits"], start, n)
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

    def _run_head(self, head_one: Parts, head: Parts, logits: Floats, start: int, n: int) -> None:
        """The head for the last tokens, of which there are as many as rows of logits."""
        hidden = self._engine.buffers["x"]
        for first in range(0, len(logits), HEAD_ROWS):
            rows = min(HEAD_ROWS, len(logits) - first)
            row = n - len(logits) + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._engine.execute(head_one if rows == 1 else head, rows, start + row)
            logits[first : first + rows] = self._engine.buffers["logits"][:rows, : logits.shape[1]]

    def close(self) -> None:
        self._few_kernels.close()
        self._engine.close()


def few_tokens(stage: Stage) -> int:
    """How many tokens, at most, are computed as each of them would be alone.

    NumPy's products depend on their number; experts take so many by matvec.
    """
    if any(is_apart(step) for step in stage.steps):
        return 1
    mixed = any(isinstance(step, ExpertMatMul) for step in stage.steps)
    return min(FEW_TOKENS, experts.FEW) if mixed else FEW_TOKENS


def _lower(span: Span, engine: Engine, one: Lowering, many: Lowering) -> LoweredSpan:
    decode = engine.ready(one.lower((*span.body, *span.head), span.inputs))
    body = engine.ready(one.lower(span.body, span.inputs)) if span.head else decode
    body_many, head_many = _lower_several(span, engine, many)
    return LoweredSpan(
        span=span,
        decode=decode,
        body_one=body,
        body_many=body_many,
        head_one=engine.ready(one.lower(span.head, _hidden(span))),
        head_many=head_many,
    )


def _lower_several(span: Span, engine: Engine, several: Lowering) -> tuple[Parts, Parts]:
    """Body and head for several tokens."""
    body, head = several.lower(span.body, span.inputs), several.lower(span.head, _hidden(span))
    return engine.ready(body), engine.ready(head)


def _hidden(span: Span) -> dict[str, int]:
    """What the head of a span begins with."""
    return {"x": span.inputs["x"]} if span.head else {}
