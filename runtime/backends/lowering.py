"""From a program to tables of operations for the compiled interpreter.

A program is lowered twice: for one token (decode) and for many (prompt). What differs:

- One token: norms, attention's last step and the quantising of activations are cheap, so every
  thread does them for itself in memory of its own rather than wait for another; products are
  matvec kernels that read the blocks as they lie.
- Many tokens: those steps share the tokens out; products decode 32 rows at a time for a tile.

In both, matrix rows and columns of buffers are shared out in the same groups of 32, so that a sum
or gate after a product can be claimed with it (runtime/backends/table.py).

Formats without kernels of their own become `HostMatMul`s between tables: NumPy multiplies with
rows that the format's definition decodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gguf_tools.jit import Kernel
from runtime.backends.memory import Memory, Place
from runtime.backends.table import WHOLE, Access, Table, Units, columns, items, reads, writes
from runtime.kernels import attention, elementwise, kv_cache, matmul
from runtime.kernels.activations import Activation
from runtime.kernels.formats import FormatKernels
from runtime.kernels.interpreter import ROWS
from runtime.kernels.table import FORMATS
from runtime.program import (
    Add,
    AddBias,
    Attend,
    Floats,
    Gate,
    Instruction,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Rope,
    StoreKV,
)

PART_BYTES = 32768  # of weights, at least, in a part: claiming one costs about 0.1 us
PARTS_PER_THREAD = 4  # at most
EACH = 1 << 30  # parts: claim unit by unit


@dataclass(frozen=True, eq=False)
class HostMatMul:
    """A product that NumPy does between two tables."""

    step: MatMul


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
                bias = self._vector(step.bias)
                self._on_columns(table, elementwise.add_bias, (), step.target, bias)
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
                sources = (step.gate, step.up)
                self._on_columns(table, elementwise.gate_silu, sources, step.target)
            case Add():
                self._on_columns(table, elementwise.add, (step.source,), step.target)

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
        )
        accesses = [
            *self._access(step.source, WHOLE if owned else items(groups)),
            *self._access(step.target, items(groups), written=True),
        ]
        self._add_items(table, elementwise.rms_norm, arguments, accesses, groups, owned=owned)
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
        self._add_product(table, matmul.matvec, arguments, accesses, matrix)

    def _quantised(self, table: Table, source: str, form: Activation, k: int) -> tuple[int, ...]:
        """Each thread's own bytes of the (one) token in `source`, made unless still valid."""
        assert form.quantise is not None
        if form.name not in self._forms:
            owned = self._owned(max(form.size(w) for w in self._activation_widths()))
            self._forms[form.name] = (owned.base, owned.thread_stride)
        place = self._forms[form.name]
        if (source, form.name) not in self._fresh:
            arguments = (*self.places[source].arguments, *place, form.quantise.address, k)
            table.add(matmul.quantise, arguments, self._access(source, WHOLE), Units(fixed=1))
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
            self._add_product(table, matmul.matmul_floats, floats, accesses, matrix)
            return
        form = f"{kernels.group}/{kernels.bias}"
        place = self._quantised_columns(table, step.source, form, kernels, matrix.n_columns)
        arguments = (
            *self._matrix(matrix),
            kernels.rows.address,
            matmul.tile_for(kernels).address,
            *place,
            target.base,
            target.token_stride,
            kernels.group,
            int(kernels.has_offset),
        )
        accesses.append(reads(f"columns {form}"))
        self._add_product(table, matmul.matmul_bytes, arguments, accesses, matrix)

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
            shape = (k, kernels.group, kernels.bias)
            arguments = (*self.places[source].arguments, *place, *shape)
            accesses = self._access(source, items(1))
            accesses.append(writes(f"columns {form}", items(1)))
            self._add_items(table, matmul.quantise_columns, arguments, accesses, 1)
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
        self._add_items(table, elementwise.rope, arguments, accesses, step.n_heads)
        self._written(step.target)

    def _store(self, table: Table, step: StoreKV) -> None:
        cache = self.memory.caches[step.layer]
        shape, kv = cache.shape, self.memory.kv
        arguments = (
            *self.places[step.keys].arguments,
            *self.places[step.values].arguments,
            cache.keys,
            cache.values,
            shape.n_kv_heads,
            shape.key_dim,
            shape.value_dim,
            kv.padded(shape.key_dim),
            kv.padded(shape.value_dim),
            kv.block_bytes(shape.key_dim),
            kv.block_bytes(shape.value_dim),
            self.memory.n_positions,
            kv.store.address,
        )
        accesses = [
            *self._access(step.keys, items(shape.n_kv_heads)),
            *self._access(step.values, items(shape.n_kv_heads)),
            writes(f"cache {step.layer}", items(shape.n_kv_heads)),
        ]
        self._add_items(table, kv_cache.store_kv, arguments, accesses, shape.n_kv_heads)

    def _attention(self, step: Attend) -> tuple[int | float, ...]:
        cache = self.memory.caches[step.layer]
        shape, kv = cache.shape, self.memory.kv
        return (
            *self.places[step.queries].arguments,
            cache.keys,
            cache.values,
            shape.n_heads,
            shape.n_kv_heads,
            shape.key_dim,
            shape.value_dim,
            kv.padded(shape.key_dim),
            kv.padded(shape.value_dim),
            self.memory.n_positions,
            step.window,
            float(step.scale),
            kv.block_bytes(shape.key_dim),
            kv.block_bytes(shape.value_dim),
        )

    def _attend_one(self, table: Table, step: Attend) -> None:
        shape = self.memory.caches[step.layer].shape
        kv = self.memory.kv
        if not self._partials:
            sizes = ((s.n_heads, s.value_dim) for s in self.program.caches)
            most = max(attention.partial_bytes(n, dim, kv) for n, dim in sizes)
            self._partials = self.memory.arena.zeros(most)
        table.add(
            attention.attend_chunks,
            (*self._attention(step), kv.score.address, kv.mix.address, self._partials),
            [
                *self._access(step.queries, WHOLE),
                reads(f"cache {step.layer}"),
                writes("partials", "chunks"),
            ],
            Units(per_chunk=shape.n_kv_heads, parts=self._most_parts()),
        )
        target = self.places[step.target]
        owned = self._is_owned(step.target)
        arguments = (
            target.base,
            target.thread_stride,
            shape.n_heads,
            shape.value_dim,
            kv.padded(shape.value_dim),
            step.window,
            self._partials,
        )
        accesses = [reads("partials"), *self._access(step.target, "heads", written=True)]
        parts = 0 if owned else self._most_parts()
        table.add(attention.combine, arguments, accesses, Units(shape.n_heads, parts=parts))

    def _attend_many(self, table: Table, step: Attend) -> None:
        target = self.places[step.target]
        accesses = [
            *self._access(step.queries, WHOLE),
            reads(f"cache {step.layer}"),
            *self._access(step.target, "blocks of queries", written=True),
        ]
        kv = self.memory.kv
        halves = [0 if k is None else k.address for k in (kv.key_halves, kv.value_halves)]
        arguments = (*self._attention(step), *halves, target.base, target.token_stride)
        n_kv_heads = self.memory.caches[step.layer].shape.n_kv_heads
        units = Units(per_chunk=n_kv_heads, parts=EACH)
        table.add(attention.attend_tiles, arguments, accesses, units)

    # --- helpers -------------------------------------------------------------------------

    def _on_columns(
        self, table: Table, kernel: Kernel, sources: tuple[str, ...], target: str, *constants: int
    ) -> None:
        """An operation on columns, claimed with the product that made them where it can be."""
        width = self.program.buffers[target]
        places = [a for name in (*sources, target) for a in self.places[name].arguments]
        accesses = [a for name in sources for a in self._access(name, columns(width))]
        accesses += self._access(target, columns(width), written=True)
        units = Units((width + ROWS - 1) // ROWS, parts=self.memory.n_threads)
        table.add(kernel, (*places, *constants, width), accesses, units, columns(width))
        self._written(target)

    def _add_items(
        self,
        table: Table,
        kernel: Kernel,
        arguments: Iterable[int | float],
        accesses: Iterable[Access],
        per_token: int,
        *,
        owned: bool = False,
    ) -> None:
        """An operation on items of tokens; for one token they are too little to share out."""
        parts = 0 if owned else 1 if self.one_token else self._most_parts()
        sharing = "" if owned else items(per_token)
        table.add(kernel, arguments, accesses, Units(per_token=per_token, parts=parts), sharing)

    def _add_product(
        self,
        table: Table,
        kernel: Kernel,
        arguments: Iterable[int | float],
        accesses: Iterable[Access],
        matrix: Matrix,
    ) -> None:
        """A product, in parts that are worth claiming."""
        n_threads = self.memory.n_threads
        rounds = matrix.data.size // (n_threads * PART_BYTES)
        parts = n_threads * min(max(rounds, 1), PARTS_PER_THREAD)
        units = Units((matrix.n_rows + ROWS - 1) // ROWS, parts=parts)
        table.add(kernel, arguments, accesses, units, columns(matrix.n_rows))

    def _most_parts(self) -> int:
        return self.memory.n_threads * PARTS_PER_THREAD

    def _access(self, buffer: str, sharing: str, *, written: bool = False) -> list[Access]:
        """What the table must know of a buffer; nothing for a thread's own."""
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
