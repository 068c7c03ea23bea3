"""The CPU backend: the lowered program run by threads that never hold the GIL.

Weights stay where they are, in the mapped file. One call runs one batch: n_threads - 1 parked
Python threads are woken, and all run the same table (runtime/kernels/interpreter.py). The calling
thread never waits for one that has not woken: it does all the work that nobody else has claimed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gguf_tools.jit import Kernel
from runtime.backends.engine import HEAD_ROWS, Engine
from runtime.backends.lowering import Lowering
from runtime.backends.needs import needed_kernels
from runtime.kernels.table import FORMATS
from runtime.program import Floats, Program, matrices

FEW_TOKENS = 4  # up to here one after the other: a tile costs as much as 4 tokens to set up


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
        self._engine = engine = Engine(
            program, n_ctx=n_ctx, n_threads=n_threads, n_batch=n_batch, kv_type=kv_type
        )
        one, many = (Lowering(program, engine.memory, one_token=flag) for flag in (True, False))
        body = [step for layer in program.layers for step in layer]
        self._decode = engine.ready(one.lower([*body, *program.head]))
        self._body_one = engine.ready(one.lower(body))
        self._prompt = engine.ready(many.lower(body))
        self._head_one = engine.ready(one.lower(program.head))
        self._head_many = engine.ready(many.lower(program.head))
        slow = sorted({m.quant.name for m in matrices(program)} - FORMATS.keys())
        self.notes: tuple[str, ...] = ()
        if slow:
            verb = "has" if len(slow) == 1 else "have"
            self.notes = (
                f"{', '.join(slow)} {verb} no fast kernel yet: these tensors are read slowly",
            )

    @staticmethod
    def kernels(program: Program, kv_type: str = "f16") -> list[Kernel]:
        """The kernels that `program` needs, the slowest to compile first."""
        return needed_kernels(program, kv_type)

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        if len(ids) <= FEW_TOKENS:
            return self._run_one_by_one(ids, start, n_outputs)
        n, dim = len(ids), self.program.buffers["x"]
        n_vocab = self.program.buffers["logits"]
        hidden = self._engine.buffers["x"]
        hidden[:n, :dim] = self.program.embed(ids, start)
        self._engine.execute(self._prompt, n, start)
        logits = np.empty((n_outputs, n_vocab), np.float32)
        for first in range(0, n_outputs, HEAD_ROWS):
            rows = min(HEAD_ROWS, n_outputs - first)
            row = n - n_outputs + first
            if row:
                hidden[:rows] = hidden[row : row + rows].copy()
            self._engine.execute(
                self._head_one if rows == 1 else self._head_many, rows, start + row
            )
            logits[first : first + rows] = self._engine.buffers["logits"][:rows, :n_vocab]
        return logits

    def _run_one_by_one(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        dim, n_vocab = self.program.buffers["x"], self.program.buffers["logits"]
        logits = np.empty((n_outputs, n_vocab), np.float32)
        silent = len(ids) - n_outputs
        for i in range(len(ids)):
            self._engine.buffers["x"][:1, :dim] = self.program.embed(ids[i : i + 1], start + i)
            self._engine.execute(self._body_one if i < silent else self._decode, 1, start + i)
            if i >= silent:
                logits[i - silent] = self._engine.buffers["logits"][0, :n_vocab]
        return logits

    def close(self) -> None:
        self._engine.close()
