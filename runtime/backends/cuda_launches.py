"""From instructions to kernel launches: which kernel, how many threads, which arrays.

The position a step begins at is in memory (`Room.state`), not among the arguments: the launches for
one token can be captured once and replayed for every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.cuda_formats import WHOLE, blocks_held, kept_as
from runtime.backends.cuda_room import Array, Buffer, Memory, Room, is_quantised, ranges_for
from runtime.backends.flow import unknown, width_written, written_by
from runtime.kernels.cuda import attention, elementwise, norms, positions, routing
from runtime.kernels.cuda.products import PRODUCTS, WARPS, quantise
from runtime.kernels.cuda.products import ROWS as ROWS_OF_BLOCK
from runtime.kernels.cuda.tiles import ROWS, THREADS, TILES, TOKENS, Tiles, sort_slots
from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Floats,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Matrix,
    RMSNorm,
    Rope,
    RopeTable,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    StoreKV,
)

FEW_TOKENS = 8  # up to here a warp for each row and token; more share tiles


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with its grid and arguments."""

    kernel: Any
    grid: tuple[int, int, int]
    block: tuple[int, int]
    arguments: tuple[Any, ...]
    shared: int = 0  # bytes that the kernel divides up itself

    def __call__(self, stream: Any = 0) -> None:
        self.kernel[self.grid, self.block, stream, self.shared](*self.arguments)


class Launches:
    """Makes launches over one room; arrays of constants go to the GPU when first needed."""

    def __init__(self, room: Room, memory: Memory, tiles: Mapping[str, Tiles] = TILES) -> None:
        """`tiles` are the kernels for many tokens, by format."""
        self.room = room
        self.tiles = tiles
        self._memory = memory
        self._angles: dict[int, tuple[RopeTable, Array, Array]] = {}

    def make(
        self,
        steps: Iterable[Instruction],
        n_tokens: int,
        *,
        holding: Mapping[str, int] | None = None,
        instead: Mapping[str, Buffer] | None = None,
    ) -> list[Launch]:
        """Launches of `steps` for the first n_tokens tokens of the buffers.

        `holding` says how many numbers a token has in buffers that have room for more; `instead`
        are other buffers than the room's, such as its later rows.
        """
        buffers = {**self.room.buffers, **(instead or {})}
        return _Emitter(self, buffers, n_tokens, holding or {}).emit(steps)

    def vector(self, values: Floats | None) -> Array:
        """A vector on the GPU; for none, one that is not read."""
        return self.room.nothing if values is None else self._memory.hold(values)

    def weights(self, *matrices: Matrix) -> Array:
        return self._memory.weights(matrices)

    def angles(self, table: RopeTable) -> tuple[Array, Array]:
        """Cosines and sines of all positions, (n_ctx * n_dims / 2)."""
        known = self._angles.get(id(table))
        if known is None:
            cosines, sines = table.angles(np.arange(self.room.n_ctx))
            known = (table, self._memory.hold(cosines), self._memory.hold(sines))
            self._angles[id(table)] = known
        return known[1:]


class _Emitter:
    """One run of instructions for n tokens; knows what buffers hold at each step."""

    def __init__(
        self,
        launches: Launches,
        buffers: Mapping[str, Buffer],
        n_tokens: int,
        holding: Mapping[str, int],
    ) -> None:
        self.made: list[Launch] = []
        self._from = launches
        self._room = launches.room
        self._shapes = [cache.shape for cache in launches.room.caches]
        self._buffers = buffers
        self._n = n_tokens
        self._widths = dict(holding)
        self._quantised: tuple[str, int] | None = None  # the buffer and width that are int8 now
        self._sorted: str | None = None  # the routes whose slots are sorted now

    def emit(self, steps: Iterable[Instruction]) -> list[Launch]:
        for step in steps:
            self._emit(step)
            self._note(step)
        return self.made

    def _emit(self, step: Instruction) -> None:
        match step:
            case RMSNorm():
                size = len(step.weight)
                self._norm(norms.rms_norm, step, size, self._from.vector(step.weight))
            case LayerNorm():
                size = step.weight.shape[-1]
                along = size if step.weight.ndim == 2 else 0
                bias = (self._from.vector(step.bias), step.bias is not None)
                weight = self._from.vector(step.weight)
                self._norm(norms.layer_norm, step, size, weight, along, *bias)
            case MatMul():
                self._product(step)
            case AddBias():
                bias = self._from.vector(step.bias)
                self._columns(elementwise.add_bias, len(step.bias), step.target, constants=(bias,))
            case Rope():
                self._rope(step)
            case StoreKV():
                self._store(step)
            case Attend():
                self._attend(step)
            case Gate():
                kernel, width = elementwise.GATES[step.activation], self._width(step.gate)
                self._columns(kernel, width, step.gate, step.up, step.target)
            case Activate():
                self._on_target(elementwise.ALONE[step.activation], step)
            case Add():
                self._on_target(elementwise.add, step, step.source)
            case Scale():
                self._on_target(elementwise.scale, step, constants=(np.float32(step.factor),))
            case SoftCap():
                self._on_target(elementwise.softcap, step, constants=(np.float32(step.cap),))
            case Route():
                self._route(step)
            case ExpertMatMul():
                self._expert_product(step)
            case ExpertBias():
                self._expert_bias(step)
            case ExpertSum():
                self._expert_sum(step)
            case SigmoidScale():
                self._on_target(elementwise.sigmoid_scale, step, step.gate)
            case Show():
                pass
            case _:
                unknown(step)

    # --- what buffers hold -----------------------------------------------------------------

    def _width(self, name: str) -> int:
        return self._widths.get(name, self._room.widths[name])

    def _note(self, step: Instruction) -> None:
        target = written_by(step)
        if target is None:
            return
        if self._quantised is not None and self._quantised[0] == target:
            self._quantised = None
        if self._sorted == target:
            self._sorted = None
        width = width_written(step, self._width, self._shapes)
        if width is not None:
            self._widths[target] = width

    # --- launches --------------------------------------------------------------------------

    def _add(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int],
        arguments: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        self.made.append(Launch(kernel, grid, block, arguments, shared))

    def _places(self, *names: str) -> tuple[Any, ...]:
        """Array and stride of each buffer."""
        found = (self._buffers[name] for name in names)
        return tuple(value for buffer in found for value in (buffer.array, buffer.stride))

    def _columns(
        self, kernel: Any, width: int, *names: str, constants: tuple[Any, ...] = ()
    ) -> None:
        """A thread for each of `width` columns of each token."""
        threads = _threads(width)
        grid = (-(-width // threads), self._n, 1)
        self._add(kernel, grid, (threads, 1), (*self._places(*names), *constants, width))

    def _on_target(
        self,
        kernel: Any,
        step: Activate | Add | Scale | SoftCap | SigmoidScale,
        *sources: str,
        constants: tuple[Any, ...] = (),
    ) -> None:
        width = self._width(step.target)
        self._columns(kernel, width, *sources, step.target, constants=constants)

    def _norm(self, kernel: Any, step: RMSNorm | LayerNorm, size: int, *constants: Any) -> None:
        groups = self._width(step.source) // size
        places = self._places(step.source, step.target)
        arguments = (*places, *constants, size, np.float32(step.epsilon))
        self._add(kernel, (groups, self._n, 1), (_threads(size), 1), arguments)

    def _rope(self, step: Rope) -> None:
        table = step.table
        if table.n_dims < 2:
            return
        constants = (step.head_dim, table.n_dims, table.interleaved)
        arguments = (*self._places(step.target), *constants, *self._from.angles(table))
        block = (_threads(table.n_dims // 2), 1)
        grid = (step.n_heads, self._n, 1)
        self._add(positions.rope, grid, block, (*arguments, self._room.state))

    def _store(self, step: StoreKV) -> None:
        room = self._room
        cache = room.caches[step.layer]
        for name, kept in ((step.keys, cache.keys), (step.values, cache.values)):
            size = (kept.dim, kept.padded, room.n_ctx)
            arguments = (*self._places(name), kept.numbers, kept.scales, *size, room.state)
            grid = (cache.shape.n_kv_heads, self._n, 1)
            self._add(positions.STORE[room.kv_type], grid, (_threads(kept.padded), 1), arguments)

    def _attend(self, step: Attend) -> None:
        room = self._room
        cache = room.caches[step.layer]
        shape = cache.shape
        group = shape.n_heads // shape.n_kv_heads
        n_ranges = ranges_for(room.n_ctx, room.n_batch, self._n)
        # The queries of a block: of several heads as far as they read the same keys, or tokens.
        heads_each = attention.heads_of_block(group)
        tokens_each = attention.QUERIES // heads_each
        arguments = (
            *self._places(step.queries),
            cache.keys.numbers,
            cache.keys.scales,
            cache.values.numbers,
            cache.values.scales,
            room.mixes,
            room.extremes,
            room.state,
            self._n,
            shape.n_heads,
            group,
            heads_each,
            cache.keys.dim,
            cache.keys.padded,
            cache.values.dim,
            cache.values.padded,
            room.n_ctx,
            np.float32(step.scale),
            step.window,
            np.float32(step.softcap),
        )
        self._add(
            attention.ATTEND[room.kv_type],
            (shape.n_kv_heads * -(-group // heads_each), -(-self._n // tokens_each), n_ranges),
            (attention.THREADS, 1),
            arguments,
            attention.shared_bytes(cache.keys.padded, cache.values.padded),
        )
        sinks = (self._from.vector(step.sinks), step.sinks is not None)
        arguments = (
            *(room.mixes, room.extremes, n_ranges, room.state, self._n, tokens_each, step.window),
            *(*sinks, *self._places(step.target), shape.value_dim),
        )
        block = (_threads(shape.value_dim), 1)
        self._add(attention.combine, (shape.n_heads, self._n, 1), block, arguments)

    def _activations(self, source: str, matrix: Matrix, width: int) -> tuple[Any, ...]:
        """xq, xd, xs and a token's stride, as the products of the matrix's format read them."""
        buffer = self._buffers[source]
        if not is_quantised(matrix):
            return buffer.array, self._from.vector(None), self._from.vector(None), buffer.stride
        room = self._room.quantised
        if self._quantised != (source, width):
            arguments = (buffer.array, buffer.stride, room.values, room.scales, room.sums, width)
            grid = (-(-width // (32 * WARPS)), self._n, 1)
            self._add(quantise, grid, (32, WARPS), arguments)
            self._quantised = source, width
        return room.values, room.scales, room.sums, width

    def _tiles(self, matrix: Matrix) -> Tiles:
        tiles = TILES if matrix.n_columns % WHOLE else self._from.tiles
        return tiles[kept_as(matrix.quant)]

    def _product(self, step: MatMul) -> None:
        matrix = step.matrix
        activations = self._activations(step.source, matrix, matrix.n_columns)
        size = (matrix.n_rows, matrix.n_columns, blocks_held(matrix))
        arguments = (self._from.weights(matrix), *activations, *self._places(step.target), *size)
        name = kept_as(matrix.quant)
        if self._n <= FEW_TOKENS:
            grid = (-(-matrix.n_rows // ROWS_OF_BLOCK), self._n, 1)
            self._add(PRODUCTS[name].matvec, grid, (32, WARPS), arguments)
        else:
            grid = (-(-matrix.n_rows // ROWS), -(-self._n // TOKENS), 1)
            self._add(self._tiles(matrix).matmul, grid, (THREADS, 1), (*arguments, self._n))

    def _expert_product(self, step: ExpertMatMul) -> None:
        matrix, n_experts = step.experts[0], len(step.experts)
        width = self._width(step.source)
        slot_stride = matrix.n_columns if width == step.n_used * matrix.n_columns else 0
        if step.n_used == 1:
            slot_stride = 0
        activations = self._activations(
            step.source, matrix, width if slot_stride else matrix.n_columns
        )
        size = (matrix.n_rows, matrix.n_columns, blocks_held(matrix))
        arguments = (
            *(self._from.weights(*step.experts), *activations, slot_stride),
            *(*self._places(step.target), *size),
        )
        name = kept_as(matrix.quant)
        routes = self._places(step.routes)
        if self._n <= FEW_TOKENS:
            grid = (-(-matrix.n_rows // ROWS_OF_BLOCK), self._n, step.n_used)
            kernel = PRODUCTS[name].expert_matvec
            self._add(kernel, grid, (32, WARPS), (*arguments, *routes))
            return
        room = self._room
        if self._sorted != step.routes:
            lists = (*routes, self._n, step.n_used, n_experts, room.order, room.starts)
            self._add(sort_slots, (1, 1, 1), (THREADS, 1), lists, 4 * n_experts)
            self._sorted = step.routes
        # No expert gets a token twice.
        grid = (-(-matrix.n_rows // ROWS), -(-self._n // TOKENS), n_experts)
        lists = (room.order, room.starts, step.n_used)
        self._add(self._tiles(matrix).expert_matmul, grid, (THREADS, 1), (*arguments, *lists))

    def _route(self, step: Route) -> None:
        n_experts = self._width(step.scores)
        arguments = (
            *(*self._places(step.scores, step.routes), n_experts, step.n_used),
            *(routing.GATINGS[step.gating], step.normalize, np.float32(step.scale)),
            *(self._from.vector(step.bias), step.bias is not None),
            *(step.n_groups, step.n_groups_used, step.n_compared),
        )
        shared = routing.shared_bytes(n_experts, step.n_groups)
        self._add(routing.route, (self._n, 1, 1), (32, 1), arguments, shared)

    def _expert_bias(self, step: ExpertBias) -> None:
        n_rows = step.biases.shape[1]
        constants = (self._from.vector(step.biases), n_rows)
        names = (step.target, step.routes)
        self._columns(elementwise.expert_bias, step.n_used * n_rows, *names, constants=constants)

    def _expert_sum(self, step: ExpertSum) -> None:
        width = self._width(step.source) // step.n_used
        arguments = (
            *(*self._places(step.source, step.routes), step.n_used),
            *(*self._places(step.target), width),
        )
        threads = _threads(width)
        grid = (-(-width // threads), self._n, 1)
        self._add(elementwise.expert_sum, grid, (threads, 1), arguments)


def _threads(size: int) -> int:
    """Threads of a block that shares `size` numbers out: whole warps, 256 at most."""
    return min(-(-size // 32) * 32, 256)
