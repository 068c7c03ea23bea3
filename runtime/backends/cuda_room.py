"""What launches are made of: buffers, KV caches and scratch on a GPU, all taken at once.

Nothing is allocated while tokens are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda_formats import kept_as
from runtime.program import (
    Attend,
    ExpertMatMul,
    Instruction,
    KVShape,
    MatMul,
    Matrix,
    Stage,
)

ALIGNED = 32  # float32 in a row's length: rows begin where 16 bytes can be loaded
SPLIT_POSITIONS = 256  # of the context for each block that attends for one token, at least
MOST_SPLITS = 32
HEAD_ROWS = 32  # rows of logits at a time: a row of 150k float32 is 600 kB
FLOATS = ("F32", "F16", "BF16")  # their products take activations as they are

Array = Any  # a device array of one dimension


class Memory(Protocol):
    """Where arrays come from; DeviceMemory, or another that tests look at."""

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array: ...
    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array: ...
    def hold(self, values: npt.NDArray[Any]) -> Array: ...
    def weights(self, matrices: tuple[Matrix, ...]) -> Array: ...


@dataclass(frozen=True, eq=False)
class Buffer:
    """A named buffer: token t begins at t * stride."""

    array: Array
    stride: int


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one layer, [kv head][position][padded dim], float16 bits."""

    shape: KVShape
    keys: Array
    values: Array

    @property
    def key_padded(self) -> int:
        return padded(self.shape.key_dim)

    @property
    def value_padded(self) -> int:
        return padded(self.shape.value_dim)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Room for the activations of one product: int8, scales of 32, sums of 16."""

    values: Array
    scales: Array
    sums: Array


@dataclass(frozen=True, eq=False)
class Room:
    """All that a stage needs on a GPU apart from weights, for batches of n_batch tokens."""

    n_ctx: int
    n_batch: int
    n_splits: int  # ranges of positions that attention is cut into for one token
    buffers: Mapping[str, Buffer]
    widths: Mapping[str, int]  # of the buffers
    caches: tuple[Cache, ...]
    state: Array  # int32: the position of a step's first token
    quantised: Quantised
    mixes: Array  # of attention's ranges
    extremes: Array
    order: Array  # slots of a mixture by expert
    starts: Array


def padded(dim: int) -> int:
    """The dimensions of a head in the cache."""
    return (dim + 7) // 8 * 8


def kv_bytes(shape: KVShape, n_ctx: int) -> int:
    """Bytes of a layer's cache."""
    return 2 * shape.n_kv_heads * n_ctx * (padded(shape.key_dim) + padded(shape.value_dim))


def make_room(stage: Stage, memory: Memory, *, n_ctx: int, n_batch: int) -> Room:
    """DeviceError when it does not fit."""
    n_splits = min(-(-n_ctx // SPLIT_POSITIONS), MOST_SPLITS)
    steps = stage.steps
    buffers = {}
    for name, width in stage.buffers.items():
        stride = -(-width // ALIGNED) * ALIGNED
        rows = min(n_batch, HEAD_ROWS) if name == "logits" else n_batch
        buffers[name] = Buffer(memory.zeros(rows * stride, np.float32), stride)
    caches = tuple(
        Cache(
            shape,
            memory.zeros(shape.n_kv_heads * n_ctx * padded(shape.key_dim), np.uint16),
            memory.zeros(shape.n_kv_heads * n_ctx * padded(shape.value_dim), np.uint16),
        )
        for shape in stage.caches
    )
    widest = max((stage.buffers[name] for name in _quantised(steps)), default=0)
    heads = [stage.caches[step.layer] for step in steps if isinstance(step, Attend)]
    # One token in n_splits ranges, or many in one range each.
    ranges = max(n_splits, n_batch) * max((shape.n_heads for shape in heads), default=0)
    mixtures = [step for step in steps if isinstance(step, ExpertMatMul)]
    most_used = max((step.n_used for step in mixtures), default=0)
    most_experts = max((len(step.experts) for step in mixtures), default=0)
    return Room(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_splits=n_splits,
        buffers=buffers,
        widths=stage.buffers,
        caches=caches,
        state=memory.zeros(1, np.int32),
        quantised=Quantised(
            memory.zeros(max(n_batch * widest, 16), np.int8),
            memory.zeros(n_batch * widest // 32 + 1, np.float32),
            memory.zeros(n_batch * widest // 16 + 1, np.float32),
        ),
        mixes=memory.zeros(
            max(ranges * max((shape.value_dim for shape in heads), default=0), 1), np.float32
        ),
        extremes=memory.zeros(max(2 * ranges, 1), np.float32),
        order=memory.zeros(max(n_batch * most_used, 1), np.int32),
        starts=memory.zeros(most_experts + 1, np.int32),
    )


def is_quantised(matrix: Matrix) -> bool:
    """Whether products with the matrix take activations of 8 bits."""
    return kept_as(matrix.quant) not in FLOATS


def _quantised(steps: Iterable[Instruction]) -> Iterator[str]:
    """Buffers whose numbers are made int8."""
    for step in steps:
        match step:
            case MatMul() if is_quantised(step.matrix):
                yield step.source
            case ExpertMatMul() if is_quantised(step.experts[0]):
                yield step.source
