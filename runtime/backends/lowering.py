"""From a program to tables of operations for the compiled interpreter.

A program is lowered twice: for one token (decode) and for many (prompt). What differs:

- One token: norms, attention's last step and the quantising of activations are cheap, so every
  thread does them for itself in memory of its own rather than wait for another; products are
  matvec kernels that read the blocks as they lie.
- Many tokens: those steps share the tokens out; products decode 32 rows at a time for a tile.

In both, matrix rows and columns of buffers are shared out in the same groups of 32, so that a
sum or gate after a product stays within its thread. A barrier is put in front of an operation
only where it touches what another thread may still be using: each operation says which buffers
it reads and writes and how it is shared out, and `Table.add` compares that with what has happened
since the last barrier.

Formats without kernels of their own become `HostMatMul`s between tables: NumPy multiplies with
rows that the format's definition decodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gguf_tools.jit import Kernel
from runtime.kernels import attention, elementwise, matmul
from runtime.kernels.activations import Activation
from runtime.kernels.formats import FormatKernels
from runtime.kernels.interpreter import ARGUMENTS
from runtime.kernels.table import FORMATS
from runtime.program import (
    Add,
    AddBias,
    Attend,
    Floats,
    Gate,
    Instruction,
    KVShape,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    StoreKV,
)


class Arena:
    """Zeroed memory that kernels address; lives as long as the arena."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.generic]] = []

    def zeros(self, n_bytes: int) -> int:
        """The address of n_bytes zero bytes, 64-byte aligned; costs memory only when touched."""
        block = np.zeros(n_bytes + 64, np.uint8)
        self._blocks.append(block)
        return (block.ctypes.data + 63) // 64 * 64

    def hold(self, array: npt.NDArray[np.generic]) -> int:
        """The address of an array that is kept alive from now on."""
        if not array.flags.c_contiguous:
            raise ValueError("kernels address contiguous arrays only")
        self._blocks.append(array)
        return array.ctypes.data

    def padded(self, values: Floats) -> int:
        """A copy of a vector with room for whole groups of 32."""
        copy = np.zeros((len(values) + 63) // 32 * 32, np.float32)
        copy[: len(values)] = values
        return self.hold(copy)


@dataclass(frozen=True)
class Place:
    """Where a buffer lies: base + thread * thread_stride + token * token_stride, in bytes."""

    base: int
    thread_stride: int
    token_stride: int

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.base, self.thread_stride, self.token_stride


# How an operation's work on a buffer is shared out. Two operations that share a buffer out in the
# same way touch the same part of it in each thread. WHOLE: any thread may touch any part.
WHOLE = "whole"


@dataclass(frozen=True)
class Access:
    buffer: str
    sharing: str
    writes: bool


def reads(buffer: str, sharing: str = WHOLE) -> Access:
    return Access(buffer, sharing, writes=False)


def writes(buffer: str, sharing: str) -> Access:
    return Access(buffer, sharing, writes=True)


def columns(width: int) -> str:
    return f"columns of {width}"


def items(per_token: int) -> str:
    return f"{per_token} items a token"


@dataclass(frozen=True, eq=False)
class HostMatMul:
    """A product that NumPy does between two tables."""

    step: MatMul


@dataclass
class Table:
    """Operations for `run_table`, with barriers where they are needed."""

    rows: list[list[int]] = field(default_factory=list)
    _pending: list[Access] = field(default_factory=list)

    def add(
        self, kernel: Kernel, arguments: Iterable[int | float], accesses: Iterable[Access]
    ) -> None:
        accesses = list(accesses)
        barrier = any(_clash(old, new) for old in self._pending for new in accesses)
        if barrier:
            self._pending.clear()
        self._pending.extend(accesses)
        row = [kernel.address, int(barrier), *(_word(a) for a in arguments)]
        self.rows.append(row + [0] * (2 + ARGUMENTS - len(row)))

    def array(self) -> npt.NDArray[np.int64]:
        return np.array(self.rows, np.int64).reshape(-1, 2 + ARGUMENTS)


def _clash(old: Access, new: Access) -> bool:
    """Whether two accesses since the last barrier may meet in different threads."""
    if old.buffer != new.buffer or not (old.writes or new.writes):
        return False
    return old.sharing != new.sharing or old.sharing == WHOLE


def _word(argument: int | float) -> int:
    """An argument as the interpreter finds it: int64, or float32 bits in the low half."""
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.uint32))
    return int(argument)


@dataclass(frozen=True)
class Cache:
    """The KV cache of one layer: addresses of [kv head][position][padded dim] f16."""

    shape: KVShape
    keys: int
    values: int


@dataclass(frozen=True)
class Memory:
    """What both lowerings of a program share."""

    arena: Arena
    shared: dict[str, Place]  # every buffer, with room for all tokens of a batch
    caches: tuple[Cache, ...]
    n_positions: int  # positions the caches have room for
    n_threads: int
    n_batch: int  # tokens there is room for, a multiple of matmul.COLUMNS


class Lowering:
    """Lowers runs of instructions, for one token or for many, over the same memory."""

    def __init__(self, program: Program, memory: Memory, *, one_token: bool) -> None:
        self.program = program
        self.memory = memory
        self.one_token = one_token
        self.host_types: set[str] = set()
        self._vectors: dict[int, int] = {}
        self._ropes: dict[int, tuple[int, int]] = {}
        self._fresh: set[tuple[str, str]] = set()  # (buffer, form) quantised and still valid
        self._forms: dict[str, tuple[int, ...]] = {}
        self._partials = 0
        self.places = dict(memory.shared)
        if one_token:
            for name in _owned_buffers(program):
                self.places[name] = self._owned(program.buffers[name] * 4)

    def lower(self, steps: Iterable[Instruction]) -> list[Table | HostMatMul]:
        """Tables, and products for the host between them."""
        self._fresh.clear()
        parts: list[Table | HostMatMul] = [Table()]
        for step in steps:
            if isinstance(step, MatMul) and step.matrix.quant.name not in FORMATS:
                self.host_types.add(step.matrix.quant.name)
                parts += [HostMatMul(step), Table()]
                self._written(step.target)
            else:
                table = parts[-1]
                assert isinstance(table, Table)
                self._emit(table, step)
        return [part for part in parts if isinstance(part, HostMatMul) or part.rows]

    # --- one instruction -----------------------------------------------------------------

    def _emit(self, table: Table, step: Instruction) -> None:
        match step:
            case RMSNorm():
                self._norm(table, step)
            case MatMul():
                kernels = FORMATS[step.matrix.quant.name]
                if self.one_token:
                    self._matvec(table, step, kernels)
                else:
                    self._matmul(table, step, kernels)
                self._written(step.target)
            case AddBias():
                width = len(step.bias)
                bias = self._vector(step.bias)
                arguments = (*self.places[step.target].arguments, bias, width)
                changed = self._access(step.target, columns(width), written=True)
                table.add(elementwise.add_bias, arguments, changed)
                self._written(step.target)
            case Rope():
                self._rope(table, step)
            case StoreKV():
                self._store(table, step)
            case Attend():
                if self.one_token:
                    self._attend_one(table, step)
                else:
                    self._attend_many(table, step)
                self._written(step.target)
            case Gate():
                width = self.program.buffers[step.target]
                names = (step.gate, step.up, step.target)
                places = [a for name in names for a in self.places[name].arguments]
                accesses = [
                    *self._access(step.gate, columns(width)),
                    *self._access(step.up, columns(width)),
                    *self._access(step.target, columns(width), written=True),
                ]
                table.add(elementwise.gate_silu, (*places, width), accesses)
                self._written(step.target)
            case Add():
                width = self.program.buffers[step.target]
                source, target = self.places[step.source], self.places[step.target]
                accesses = [
                    *self._access(step.source, columns(width)),
                    *self._access(step.target, columns(width), written=True),
                ]
                table.add(elementwise.add, (*source.arguments, *target.arguments, width), accesses)
                self._written(step.target)

    def _norm(self, table: Table, step: RMSNorm) -> None:
        width = len(step.weight)
        groups = self.program.buffers[step.source] // width
        owned = self._is_owned(step.target)
        arguments = (
            *self.places[step.source].arguments,
            *self.places[step.target].arguments,
            self._vector(step.weight),
            width,
            groups,
            float(step.epsilon),
            0 if owned else 1,
        )
        accesses = [
            *self._access(step.source, WHOLE if owned else items(groups)),
            *self._access(step.target, items(groups), written=True),
        ]
        table.add(elementwise.rms_norm, arguments, accesses)
        self._written(step.target)

    def _matvec(self, table: Table, step: MatMul, kernels: FormatKernels) -> None:
        matrix, source = step.matrix, self.places[step.source]
        accesses = self._access(step.target, columns(matrix.n_rows), written=True)
        if kernels.activation.quantise is None:
            place: tuple[int, ...] = (source.base, source.thread_stride)
            accesses += self._access(step.source, WHOLE)
        else:
            place = self._quantised(table, step.source, kernels.activation, matrix.n_columns)
        arguments = (
            *self._matrix(matrix),
            kernels.matvec.address,
            *place,
            self.places[step.target].base,
        )
        table.add(matmul.matvec, arguments, accesses)

    def _quantised(self, table: Table, source: str, form: Activation, k: int) -> tuple[int, ...]:
        """Each thread's own bytes of the (one) token in `source`, made unless still valid."""
        assert form.quantise is not None
        if form.name not in self._forms:
            owned = self._owned(max(form.size(w) for w in self._activation_widths()))
            self._forms[form.name] = (owned.base, owned.thread_stride)
        place = self._forms[form.name]
        if (source, form.name) not in self._fresh:
            arguments = (*self.places[source].arguments, *place, form.quantise.address, k)
            table.add(matmul.quantise, arguments, self._access(source, WHOLE))
            self._refreshed(source, form.name)
        return place

    def _matmul(self, table: Table, step: MatMul, kernels: FormatKernels) -> None:
        matrix, target = step.matrix, self.places[step.target]
        source = self.places[step.source]
        accesses = self._access(step.target, columns(matrix.n_rows), written=True)
        if kernels.group == 0:
            floats = (
                *self._matrix(matrix),
                kernels.rows.address,
                matmul.tile_floats.address,
                matrix.quant.block_bytes,
                *source.arguments,
                target.base,
                target.token_stride,
            )
            accesses += self._access(step.source, WHOLE)
            table.add(matmul.matmul_floats, floats, accesses)
            return
        form = f"{kernels.group}/{kernels.span}/{kernels.bias}"
        place = self._quantised_columns(table, step.source, form, kernels, matrix.n_columns)
        arguments = (
            *self._matrix(matrix),
            kernels.rows.address,
            matmul.TILES[kernels.group, kernels.has_offset].address,
            *place,
            target.base,
            target.token_stride,
            kernels.group,
            int(kernels.has_offset),
        )
        table.add(matmul.matmul_bytes, arguments, [*accesses, reads(f"columns {form}")])

    def _quantised_columns(
        self, table: Table, source: str, form: str, kernels: FormatKernels, k: int
    ) -> tuple[int, ...]:
        """Bytes of all tokens in `source` for the tile: q, scales, corrections, sums, strides."""
        if form not in self._forms:
            width = max(self._activation_widths())
            q_stride = (width + 63) // 64 * 64 + 64
            meta_stride = (width // kernels.group * 4 + 63) // 64 * 64 + 64
            arena, n = self.memory.arena, self.memory.n_batch
            metas = [arena.zeros(n * meta_stride) for _ in range(3)]
            self._forms[form] = (arena.zeros(n * q_stride), *metas, q_stride, meta_stride)
        place = self._forms[form]
        if (source, form) not in self._fresh:
            shape = (k, kernels.group, kernels.span, kernels.bias)
            arguments = (*self.places[source].arguments, *place, *shape)
            accesses = self._access(source, items(1))
            accesses.append(writes(f"columns {form}", items(1)))
            table.add(matmul.quantise_columns, arguments, accesses)
            self._refreshed(source, form)
        return place

    def _rope(self, table: Table, step: Rope) -> None:
        key = id(step.table)
        if key not in self._ropes:
            angles = step.table.angles(np.arange(self.memory.n_positions))
            self._ropes[key] = (
                self.memory.arena.hold(angles[0]),
                self.memory.arena.hold(angles[1]),
            )
        arguments = (
            *self.places[step.target].arguments,
            step.n_heads,
            step.head_dim,
            step.table.n_dims,
            int(step.table.interleaved),
            *self._ropes[key],
        )
        accesses = self._access(step.target, items(step.n_heads), written=True)
        table.add(elementwise.rope, arguments, accesses)
        self._written(step.target)

    def _store(self, table: Table, step: StoreKV) -> None:
        cache = self.memory.caches[step.layer]
        shape = cache.shape
        arguments = (
            *self.places[step.keys].arguments,
            *self.places[step.values].arguments,
            cache.keys,
            cache.values,
            shape.n_kv_heads,
            shape.key_dim,
            shape.value_dim,
            attention.padded(shape.key_dim) * 2,
            attention.padded(shape.value_dim) * 2,
            self.memory.n_positions,
        )
        accesses = [
            *self._access(step.keys, items(shape.n_kv_heads)),
            *self._access(step.values, items(shape.n_kv_heads)),
            writes(f"cache {step.layer}", items(shape.n_kv_heads)),
        ]
        table.add(elementwise.store_kv, arguments, accesses)

    def _attention(self, step: Attend) -> tuple[int | float, ...]:
        cache = self.memory.caches[step.layer]
        shape = cache.shape
        return (
            *self.places[step.queries].arguments,
            cache.keys,
            cache.values,
            shape.n_heads,
            shape.n_kv_heads,
            shape.key_dim,
            shape.value_dim,
            attention.padded(shape.key_dim),
            attention.padded(shape.value_dim),
            self.memory.n_positions,
            step.window,
            float(step.scale),
        )

    def _attend_one(self, table: Table, step: Attend) -> None:
        shape = self.memory.caches[step.layer].shape
        if not self._partials:
            most = max(attention.partial_bytes(s.n_heads, s.value_dim) for s in self.program.caches)
            self._partials = self.memory.arena.zeros(most)
        table.add(
            attention.attend_chunks,
            (*self._attention(step), self._partials),
            [
                *self._access(step.queries, WHOLE),
                reads(f"cache {step.layer}"),
                writes("partials", "chunks"),
            ],
        )
        target = self.places[step.target]
        owned = self._is_owned(step.target)
        arguments = (
            target.base,
            target.thread_stride,
            shape.n_heads,
            shape.value_dim,
            attention.padded(shape.value_dim),
            step.window,
            self._partials,
            0 if owned else 1,
        )
        accesses = [
            reads("partials"),
            *self._access(step.target, "heads in turn", written=True),
        ]
        table.add(attention.combine, arguments, accesses)

    def _attend_many(self, table: Table, step: Attend) -> None:
        target = self.places[step.target]
        accesses = [
            *self._access(step.queries, WHOLE),
            reads(f"cache {step.layer}"),
            *self._access(step.target, "blocks of queries", written=True),
        ]
        arguments = (*self._attention(step), target.base, target.token_stride)
        table.add(attention.attend_tiles, arguments, accesses)

    # --- helpers -------------------------------------------------------------------------

    def _access(self, buffer: str, sharing: str, *, written: bool = False) -> list[Access]:
        """What barriers must know of a buffer; nothing for a thread's own."""
        return [] if self._is_owned(buffer) else [Access(buffer, sharing, written)]

    def _is_owned(self, buffer: str) -> bool:
        return self.places[buffer].thread_stride != 0

    def _owned(self, n_bytes: int) -> Place:
        """Memory for one token in every thread."""
        stride = (n_bytes + 127) // 64 * 64 + 128
        return Place(self.memory.arena.zeros(stride * self.memory.n_threads), stride, stride)

    def _written(self, buffer: str) -> None:
        self._fresh = {pair for pair in self._fresh if pair[0] != buffer}

    def _refreshed(self, buffer: str, form: str) -> None:
        """`form`'s memory now holds `buffer`, and no other buffer."""
        self._fresh = {pair for pair in self._fresh if pair[1] != form} | {(buffer, form)}

    def _vector(self, values: Floats) -> int:
        if id(values) not in self._vectors:
            self._vectors[id(values)] = self.memory.arena.padded(values)
        return self._vectors[id(values)]

    def _matrix(self, matrix: Matrix) -> tuple[int, int, int, int]:
        address = self.memory.arena.hold(matrix.data)
        return address, matrix.data.shape[1], matrix.n_rows, matrix.n_columns

    def _activation_widths(self) -> set[int]:
        steps = [*(i for layer in self.program.layers for i in layer), *self.program.head]
        return {step.matrix.n_columns for step in steps if isinstance(step, MatMul)}


def _owned_buffers(program: Program) -> set[str]:
    """Buffers that every thread fills for itself when there is one token.

    Those are written by whole-row norms and by attention's last step only, and read by products.
    """
    steps = [*(i for layer in program.layers for i in layer), *program.head]
    candidates = {
        step.target
        for step in steps
        if isinstance(step, Attend)
        or (isinstance(step, RMSNorm) and len(step.weight) == program.buffers[step.target])
    }
    for step in steps:
        if isinstance(step, RMSNorm):
            if len(step.weight) != program.buffers[step.target]:
                candidates.discard(step.target)
        elif isinstance(step, (MatMul, AddBias, Rope, Gate, Add)):
            candidates.discard(step.target)
        if isinstance(step, StoreKV):
            candidates -= {step.keys, step.values}
    return candidates
