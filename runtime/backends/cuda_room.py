"""What launches are made of: buffers, KV caches and scratch on a GPU, all taken at once.

Nothing is allocated while tokens are read. What is taken is listed here alone: the planner adds up
(runtime/split.py) the same arrays that a backend then takes. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda_formats import FLOATS, allocated, kept_as
from runtime.program import (
    Attend,
    ExpertMatMul,
    Instruction,
    KVShape,
    MatMul,
    Matrix,
    Program,
    Rope,
    RopeTable,
    Stage,
)

ALIGNED = 32  # float32 in a row's length: rows begin where 16 bytes can be loaded
RANGE = 64  # positions of the context for each block that attends for one token, at least
MOST_RANGES = 64  # (runtime/kernels/cuda/attention.py)
HEAD_ROWS = 32  # rows of logits at a time: a row of 150k float32 is 600 kB

Array = Any  # a device array of one dimension


class Memory(Protocol):
    """Where arrays come from; DeviceMemory, or another that tests look at."""

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array: ...
    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array: ...
    def hold(self, values: npt.NDArray[Any]) -> Array: ...
    def weights(self, matrices: tuple[Matrix, ...]) -> Array: ...


@dataclass(frozen=True)
class Needed:
    """An array that is needed: so many numbers of a type."""

    size: int
    dtype: npt.DTypeLike

    @property
    def n_bytes(self) -> int:
        return allocated(self.size * np.dtype(self.dtype).itemsize)

    def take(self, memory: Memory) -> Array:
        return memory.zeros(self.size, self.dtype)


@dataclass(frozen=True)
class KVKind:
    """How the cache keeps the numbers of a head."""

    padding: int  # a head's dimensions are padded to a multiple
    dtype: npt.DTypeLike
    per_scale: int  # numbers that share a float16 scale; 0: they have none

    def padded(self, dim: int) -> int:
        return -(-dim // self.padding) * self.padding

    def needs(self, shape: KVShape, dim: int, n_ctx: int) -> list[Needed]:
        """The numbers of keys or values with so many dimensions, and the scales if any."""
        size = shape.n_kv_heads * n_ctx * self.padded(dim)
        scales = [Needed(size // self.per_scale, np.uint16)] if self.per_scale else []
        return [Needed(size, self.dtype), *scales]


KV_KINDS = {"f16": KVKind(8, np.uint16, 0), "q8_0": KVKind(32, np.int8, 32)}


@dataclass(frozen=True, eq=False)
class Buffer:
    """A named buffer: token t begins at t * stride."""

    array: Array
    stride: int


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys or values of one layer (runtime/kernels/cuda/positions.py)."""

    numbers: Array  # [kv head][position][padded]
    scales: Array  # float16 bits, as the numbers; not read where the kind has none
    dim: int
    padded: int


@dataclass(frozen=True, eq=False)
class Cache:
    """The KV cache of one layer."""

    shape: KVShape
    keys: Kept
    values: Kept


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
    buffers: Mapping[str, Buffer]
    widths: Mapping[str, int]  # of the buffers
    kv_type: str
    caches: tuple[Cache, ...]
    nothing: Array  # for arguments that are not read
    state: Array  # int32: the position of a step's first token
    quantised: Quantised
    mixes: Array  # of attention's ranges
    extremes: Array
    order: Array  # slots of a mixture by expert
    starts: Array


def ranges_for(n_ctx: int, n_batch: int, n_tokens: int) -> int:
    """The ranges of positions that attention is cut into for so many tokens."""
    return max(1, min(_ranges(n_ctx), max(_ranges(n_ctx), n_batch) // n_tokens))


def make_room(stage: Stage, memory: Memory, *, n_ctx: int, n_batch: int, kv_type: str) -> Room:
    """DeviceMemoryError when it does not fit."""
    taken = {name: array.take(memory) for name, array in _scratch(stage, n_ctx, n_batch).items()}
    return Room(
        n_ctx=n_ctx,
        n_batch=n_batch,
        buffers={
            name: Buffer(_buffer(name, width, n_batch).take(memory), _stride(width))
            for name, width in stage.buffers.items()
        },
        widths=stage.buffers,
        kv_type=kv_type,
        caches=tuple(
            Cache(
                shape,
                _keep(shape, shape.key_dim, memory, n_ctx, kv_type, taken["nothing"]),
                _keep(shape, shape.value_dim, memory, n_ctx, kv_type, taken["nothing"]),
            )
            for shape in stage.caches
        ),
        quantised=Quantised(taken.pop("values"), taken.pop("scales"), taken.pop("sums")),
        **taken,
    )


def kv_bytes(shape: KVShape, n_ctx: int, kv_type: str) -> int:
    """Bytes of a layer's cache."""
    kind = KV_KINDS[kv_type]
    dims = (shape.key_dim, shape.value_dim)
    return sum(need.n_bytes for dim in dims for need in kind.needs(shape, dim, n_ctx))


def scratch_bytes(part: Program | Stage, *, n_ctx: int, n_batch: int) -> int:
    """Bytes beside weights, KV caches and logits."""
    buffers = [
        _buffer(name, width, n_batch) for name, width in part.buffers.items() if name != "logits"
    ]
    turns = {id(step.table): step.table for step in part.steps if isinstance(step, Rope)}
    angles = sum(2 * table_bytes(table, n_ctx) for table in turns.values())
    arrays = (*buffers, *_scratch(part, n_ctx, n_batch).values())
    return angles + sum(need.n_bytes for need in arrays)


def logits_bytes(part: Program | Stage, *, n_batch: int) -> int:
    """Bytes of the logits; none where the head is elsewhere."""
    width = part.buffers.get("logits")
    return 0 if width is None else _buffer("logits", width, n_batch).n_bytes


def table_bytes(table: RopeTable, n_ctx: int) -> int:
    """Bytes of the cosines, or sines, of all positions."""
    pairs = table.n_dims // 2
    return Needed(n_ctx * pairs, np.float32).n_bytes if pairs else 0


def is_quantised(matrix: Matrix) -> bool:
    """Whether products with the matrix take activations of 8 bits."""
    return kept_as(matrix.quant) not in FLOATS


def _keep(
    shape: KVShape, dim: int, memory: Memory, n_ctx: int, kv_type: str, nothing: Array
) -> Kept:
    kind = KV_KINDS[kv_type]
    arrays = [need.take(memory) for need in kind.needs(shape, dim, n_ctx)]
    numbers, scales = (*arrays, nothing)[:2]
    return Kept(numbers, scales, dim, kind.padded(dim))


def _ranges(n_ctx: int) -> int:
    return min(-(-n_ctx // RANGE), MOST_RANGES)


def _stride(width: int) -> int:
    return -(-width // ALIGNED) * ALIGNED


def _buffer(name: str, width: int, n_batch: int) -> Needed:
    rows = min(n_batch, HEAD_ROWS) if name == "logits" else n_batch
    return Needed(rows * _stride(width), np.float32)


def _scratch(part: Program | Stage, n_ctx: int, n_batch: int) -> dict[str, Needed]:
    """Arrays beside buffers and caches, by their names in Room and Quantised."""
    steps = part.steps
    widest = max((part.buffers[name] for name in _quantised(steps)), default=0)
    heads = [part.caches[step.layer] for step in steps if isinstance(step, Attend)]
    # One token in many ranges, or many in one range each.
    ranges = max(_ranges(n_ctx), n_batch) * max((shape.n_heads for shape in heads), default=0)
    mixed = ranges * max((shape.value_dim for shape in heads), default=0)
    mixtures = [step for step in steps if isinstance(step, ExpertMatMul)]
    most_used = max((step.n_used for step in mixtures), default=0)
    most_experts = max((len(step.experts) for step in mixtures), default=0)
    return {
        "nothing": Needed(1, np.float32),
        "state": Needed(1, np.int32),
        "values": Needed(max(n_batch * widest, 16), np.int8),
        "scales": Needed(n_batch * widest // 32 + 1, np.float32),
        "sums": Needed(n_batch * widest // 16 + 1, np.float32),
        "mixes": Needed(max(mixed, 1), np.float32),
        "extremes": Needed(max(2 * ranges, 1), np.float32),
        "order": Needed(max(n_batch * most_used, 1), np.int32),
        "starts": Needed(most_experts + 1, np.int32),
    }


def _quantised(steps: Iterable[Instruction]) -> Iterator[str]:
    """Buffers whose numbers are made int8."""
    for step in steps:
        match step:
            case MatMul() if is_quantised(step.matrix):
                yield step.source
            case ExpertMatMul() if is_quantised(step.experts[0]):
                yield step.source
