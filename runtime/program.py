"""The instructions a decoder is made of.

A program is data: a decoder (runtime/decoders) emits it from a model's configuration and tensors,
and every backend runs it. Buffers are named; each holds one row of `width` float32 per token.

    x       the hidden state; `embed` writes it before the first layer
    logits  one row of n_vocab; written by the head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.quants import QuantType

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix as it lies in the file: n_rows outputs of n_columns inputs each."""

    name: str
    quant: QuantType
    n_rows: int
    n_columns: int
    data: npt.NDArray[np.uint8]  # (n_rows, row_bytes), a view into the mapped file

    def rows(self, chosen: slice | npt.NDArray[np.intp]) -> Floats:
        """Some rows as float32 (len(chosen), n_columns)."""
        return self.quant.dequantize(np.ascontiguousarray(self.data[chosen]))


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Rotary positions: pair i of a head turns by position * frequencies[i]; then times scale."""

    n_dims: int  # the first dimensions of a head that turn
    interleaved: bool  # pairs (0, 1), (2, 3)... as llama's GGUF; else (0, n/2), (1, n/2 + 1)...
    frequencies: npt.NDArray[np.float64]  # (n_dims / 2,)
    scale: float

    def angles(self, positions: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Cosines and sines, (len(positions), n_dims / 2)."""
        turns = positions[:, None] * self.frequencies[None, :]
        cosines = (np.cos(turns) * self.scale).astype(np.float32)
        return cosines, (np.sin(turns) * self.scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """target = source / sqrt(mean(source^2) + epsilon) * weight, over groups of len(weight)."""

    source: str
    target: str
    weight: Floats
    epsilon: float


@dataclass(frozen=True, eq=False)
class MatMul:
    """target = source @ matrix.T"""

    source: str
    target: str
    matrix: Matrix


@dataclass(frozen=True, eq=False)
class AddBias:
    """target += bias"""

    target: str
    bias: Floats


@dataclass(frozen=True, eq=False)
class Rope:
    """Turn each head of target by its token's position."""

    target: str
    n_heads: int
    head_dim: int
    table: RopeTable


@dataclass(frozen=True, eq=False)
class StoreKV:
    """Put this step's keys and values in the KV cache of a layer."""

    keys: str
    values: str
    layer: int


@dataclass(frozen=True, eq=False)
class Attend:
    """Causal attention of the queries on the KV cache of a layer."""

    queries: str
    target: str
    layer: int
    scale: float
    window: int  # a token sees itself and the window - 1 tokens before; 0 = all


@dataclass(frozen=True, eq=False)
class Gate:
    """target = silu(gate) * up"""

    gate: str
    up: str
    target: str


@dataclass(frozen=True, eq=False)
class Add:
    """target += source"""

    source: str
    target: str


Instruction = RMSNorm | MatMul | AddBias | Rope | StoreKV | Attend | Gate | Add


@dataclass(frozen=True)
class KVShape:
    """The KV cache of one layer, per token."""

    n_heads: int  # query heads
    n_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Program:
    """A whole decoder: embed a token, run the layers, run the head on the rows wanted."""

    buffers: Mapping[str, int]  # name -> width
    embedding: Matrix
    layers: tuple[tuple[Instruction, ...], ...]
    head: tuple[Instruction, ...]
    caches: tuple[KVShape, ...]  # one per layer


def matrices(program: Program) -> list[Matrix]:
    """Every matrix the program multiplies by, in order of use."""
    steps = [*(i for layer in program.layers for i in layer), *program.head]
    return [step.matrix for step in steps if isinstance(step, MatMul)]
