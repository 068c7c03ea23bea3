"""A program whose matrices are read while it runs, a band of rows at a time.

Norms, positions, attention and the like are lowered as they are for a prompt. A product reads a
band of its matrix, multiplies all tokens with it and forgets it: whatever a model's size, memory
holds activations, what is no matrix, and one band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gguf_tools.jit import Kernel
from runtime.backends.crew import ReadyTable
from runtime.backends.engine import Engine, Parts
from runtime.backends.frame import Batch
from runtime.backends.lowering import Lowering
from runtime.backends.memory import Place
from runtime.backends.needs import needed_kernels
from runtime.backends.observing import Observe
from runtime.backends.reference import matmul
from runtime.kernels.interpreter import HEADER, ROWS
from runtime.kernels.table import FORMATS
from runtime.program import (
    AddBias,
    Floats,
    Instruction,
    MatMul,
    Matrix,
    Program,
    Span,
    Stage,
)
from runtime.streamed_rows import StreamedRows

BAND_BYTES = 8 << 20  # of a matrix that are read together
BAND_ROWS = 16  # logits of many tokens take as much room at a time as all of so many


class StreamedBackend:
    """Runs windows of at most n_tokens tokens through one layer after the other."""

    def __init__(
        self, program: Program, *, n_tokens: int, n_threads: int, kv_type: str = "f16"
    ) -> None:
        """`program`: from build_program(..., stream=True), whole or with some of its layers."""
        self._n_tokens, self._n_vocab = n_tokens, program.buffers["logits"]
        stage = layer_stage(program, n_heads=head_bands(n_tokens))
        self._engine = engine = Engine(
            stage,
            n_ctx=n_tokens,
            n_threads=n_threads,
            n_batch=n_tokens,
            kv_type=kv_type,
            n_few=0,
            n_outputs=n_tokens,
        )
        lowering = Lowering(stage, engine.memory, Batch.MANY)
        self._spans = [
            engine.ready(lowering.lower((*span.body, *span.head), span.inputs))
            for span in stage.spans
        ]
        self._widths = [span.outputs["logits"] for span in stage.spans[len(program.layers) :]]
        self._products = BandProducts(engine)

    @staticmethod
    def kernels(program: Program, kv_type: str = "f16") -> list[Kernel]:
        """The kernels that `program` needs, the slowest to compile first."""
        return needed_kernels(layer_stage(program), kv_type)

    def layer(self, index: int, x: Floats, observe: Observe | None = None) -> Floats:
        """The hidden states (n_tokens, dim) after a layer, of a window that begins at position 0.

        `index` counts the program's layers.
        """
        self._run(self._spans[index], x, observe)
        return self._engine.buffers["x"][: len(x), : x.shape[1]].copy()

    def head(self, x: Floats, observe: Observe | None = None) -> Floats:
        """The logits (n_tokens, n_vocab) that follow the hidden states of the last layer."""
        logits = np.empty((len(x), self._n_vocab), np.float32)
        for start in range(0, len(x), self._n_tokens):
            rows = slice(start, start + self._n_tokens)
            first = 0
            for index in range(self.n_bands):
                band = self.head_band(index, x[rows], observe if index == 0 else None)
                logits[rows, first : first + band.shape[1]] = band
                first += band.shape[1]
        return logits

    @property
    def n_bands(self) -> int:
        """The logits of a window come in so many bands of the vocabulary."""
        return len(self._widths)

    def head_band(self, index: int, x: Floats, observe: Observe | None = None) -> Floats:
        """The logits (n_tokens, width) of a band; they are valid until the next one."""
        self._run(self._spans[index - self.n_bands], x, observe)
        return self._engine.buffers["logits"][: len(x), : self._widths[index]]

    def close(self) -> None:
        self._engine.close()

    def _run(self, parts: Parts, x: Floats, observe: Observe | None) -> None:
        n_tokens, dim = x.shape
        self._engine.buffers["x"][:n_tokens, :dim] = x
        multiply = self._products.multiply
        self._engine.execute(parts, n_tokens, 0, product=multiply, observe=observe)


def head_bands(n_tokens: int) -> int:
    """In how many bands of the vocabulary the logits of so many tokens are made."""
    return -(-n_tokens // BAND_ROWS)


def layer_stage(program: Program, *, n_heads: int = 1) -> Stage:
    """The whole program on one device: each layer a span, then the head, in so many bands."""
    hidden, n_vocab = {"x": program.buffers["x"]}, program.buffers["logits"]
    layers = tuple(Span(layer, (), hidden, hidden) for layer in program.layers)
    width = -(-n_vocab // n_heads)
    bands = [slice(first, min(first + width, n_vocab)) for first in range(0, n_vocab, width)]
    heads = tuple(
        Span((), cut_head(program.head, rows), hidden, {"logits": rows.stop - rows.start})
        for rows in bands
    )
    return Stage({**program.buffers, "logits": width}, (*layers, *heads), program.caches)


def cut_head(
    steps: Sequence[Instruction], rows: slice | npt.NDArray[np.intp]
) -> tuple[Instruction, ...]:
    """A program's head with the logits of some tokens of the vocabulary in the place of all."""

    def cut(step: Instruction) -> Instruction:
        if isinstance(step, MatMul) and step.target == "logits":
            return replace(step, matrix=_chosen(step.matrix, rows))
        if isinstance(step, AddBias) and step.target == "logits":
            return replace(step, bias=step.bias[rows])
        return step

    return tuple(map(cut, steps))


def _chosen(matrix: Matrix, rows: slice | npt.NDArray[np.intp]) -> Matrix:
    if isinstance(rows, slice):
        return replace(matrix, n_rows=rows.stop - rows.start, data=matrix.data[rows])

    def read(first: int, last: int) -> npt.NDArray[np.uint8]:
        return np.asarray(matrix.data[rows[first:last]])

    data = StreamedRows(read, 0, len(rows), matrix.data.shape[1])
    return replace(matrix, n_rows=len(rows), data=data)


@dataclass(frozen=True, eq=False)
class _Product:
    """A table that multiplies with a band of some format and shape, and its buffers."""

    table: ReadyTable
    source: Floats  # (n_tokens, n_columns or more)
    target: Floats  # (n_tokens, n_rows or more)

    def multiply(self, engine: Engine, x: Floats, band: npt.NDArray[np.uint8]) -> Floats:
        n_tokens, n_columns = x.shape
        self.source[:n_tokens, :n_columns] = x
        # The product is the last operation, its first argument the address of the weights. A late
        # thread claims nothing of the run before: the number of units is the same in all.
        self.table.operations[-1, HEADER] = band.ctypes.data
        engine.execute([self.table], n_tokens, 0)
        return self.target[:n_tokens, : len(band)]


class BandProducts:
    """Products with matrices that are read a band at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._products: dict[tuple[str, int, int], _Product] = {}

    def multiply(self, x: Floats, matrix: Matrix) -> Floats:
        """x (n_tokens, n_columns) times the matrix."""
        if matrix.quant.name not in FORMATS:
            return matmul(x, matrix)
        y = np.empty((len(x), matrix.n_rows), np.float32)
        row_bytes = matrix.data.shape[1]
        step = max(ROWS, BAND_BYTES // row_bytes // ROWS * ROWS)
        for first in range(0, matrix.n_rows, step):
            band = np.asarray(matrix.data[first : first + step])
            last = first + len(band)
            y[:, first:last] = self._product(matrix, len(band)).multiply(self._engine, x, band)
        return y

    def _product(self, matrix: Matrix, n_rows: int) -> _Product:
        key = matrix.quant.name, matrix.n_columns, n_rows
        if key not in self._products:
            self._products[key] = self._make(matrix, n_rows)
        return self._products[key]

    def _make(self, matrix: Matrix, n_rows: int) -> _Product:
        engine = self._engine
        memory = engine.memory
        # Never touched: it stands for bands that come later.
        nothing = np.zeros((n_rows, matrix.data.shape[1]), np.uint8)
        band = replace(matrix, n_rows=n_rows, data=nothing)
        widths = {"source": matrix.n_columns, "target": n_rows}
        step = MatMul("source", "target", band)
        span = Span((step,), (), {"source": matrix.n_columns}, {"target": n_rows})
        blocks: dict[str, Floats] = {}
        places: dict[str, Place] = {}
        for name, width in widths.items():
            blocks[name], places[name] = memory.arena.rows(memory.n_batch, width)
        stage = Stage(widths, (span,), caches=())
        lowering = Lowering(stage, replace(memory, shared=places), Batch.MANY)
        (table,) = engine.ready(lowering.lower(span.body, span.inputs))
        assert isinstance(table, ReadyTable)
        return _Product(table, blocks["source"], blocks["target"])
