"""From a stage of a program to tables of operations for the compiled interpreter.

A stage is lowered for one token (decode), for a few, and for many (prompt). What differs:

- One token: norms, attention's last step and the quantising of activations are cheap, so every
  thread does them for itself in memory of its own rather than wait for another; products are
  matvec kernels that read the blocks as they lie.
- Many tokens: those steps share the tokens out; products decode 32 rows at a time for a tile.
- A few tokens: steps are shared out as for many, but computed as for one, with the same results
  to the bit: matvec kernels for several columns, and each token's attention by itself.

In all, matrix rows and columns of buffers are shared out in the same groups of 32, so that a sum
or gate after a product can be claimed with it (runtime/backends/table.py).

Formats without kernels of their own become `HostProduct`s between tables: NumPy multiplies with
rows that the format's definition decodes. So do matrices that are streamed
(runtime/backends/streaming.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gguf_tools.jit import Kernel
from runtime.backends.flow import PARTIALS, unknown, width_written, written_by
from runtime.backends.frame import EACH, Batch, Frame, row_groups
from runtime.backends.memory import Memory, Place
from runtime.backends.mixture import Mixture
from runtime.backends.products import Forms, lower_product
from runtime.backends.table import WHOLE, Table, Units, columns, items, reads, writes
from runtime.kernels import attention, elementwise, gates, kv_cache
from runtime.kernels.matmul import FEW_TOKENS
from runtime.kernels.table import FORMATS
from runtime.program import (
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Matrix,
    RMSNorm,
    Rope,
    Route,
    Scale,
    Show,
    SigmoidScale,
    SoftCap,
    Stage,
    StoreKV,
)
from runtime.streamed_rows import StreamedRows


@dataclass(frozen=True, eq=False)
class HostProduct:
    """A product that is done between two tables, of rows as wide as its source."""

    step: MatMul | ExpertMatMul
    width: int
    source: Place
    target: Place
    routes: Place | None


@dataclass(frozen=True, eq=False)
class HostShow:
    """What an observer is told between two tables."""

    step: Show
    width: int
    source: Place


class Lowering:
    """Lowers runs of instructions, for batches of one size, over the same memory."""

    def __init__(self, stage: Stage, memory: Memory, batch: Batch) -> None:
        self.memory = memory
        # A late thread leaves a table that the caller has left for a product of the host: what it
        # was to make for itself there, the next table would miss.
        owns = batch is Batch.ONE and not any(is_apart(step) for step in stage.steps)
        self.frame = Frame(stage, memory, batch, owns=owns)
        self._forms = Forms()
        self._mixture = Mixture(self.frame, self._forms)
        self._ropes: dict[int, tuple[int, int]] = {}
        self._partials = 0

    def lower(
        self, steps: Iterable[Instruction], given: Mapping[str, int]
    ) -> list[Table | HostProduct | HostShow]:
        """Tables, and products for the host between them; `given` are the widths of inputs."""
        self._forms.clear()
        for name, width in given.items():
            self.frame.set_width(name, width)
        table = Table()
        parts: list[Table | HostProduct | HostShow] = [table]
        for step in steps:
            if is_apart(step):
                self._forms.clear()
                table = Table()
                parts += [self._apart(step), table]
            else:
                self._emit(table, step)
            self._note(step)
        return [part for part in parts if not isinstance(part, Table) or part.rows]

    def _apart(self, step: Instruction) -> HostProduct | HostShow:
        assert isinstance(step, (MatMul, ExpertMatMul, Show))
        places = self.frame.places
        width = self.frame.width(step.source)
        if isinstance(step, Show):
            return HostShow(step, width, places[step.source])
        routes = places[step.routes] if isinstance(step, ExpertMatMul) else None
        return HostProduct(step, width, places[step.source], places[step.target], routes)

    def _note(self, step: Instruction) -> None:
        """What a buffer holds has changed."""
        target, frame = written_by(step), self.frame
        if target is None:
            return
        self._forms.written(target)
        width = width_written(step, frame.width, frame.stage.caches)
        if width is not None:
            frame.set_width(target, width)

    # --- one instruction -----------------------------------------------------------------

    def _emit(self, table: Table, step: Instruction) -> None:
        match step:
            case RMSNorm():
                self._rms_norm(table, step)
            case LayerNorm():
                self._layer_norm(table, step)
            case MatMul():
                lower_product(self.frame, self._forms, table, step)
            case AddBias():
                bias, width = self.frame.vector(step.bias), len(step.bias)
                self._on_columns(table, step, elementwise.add_bias, bias, width=width)
            case Rope():
                self._rope(table, step)
            case StoreKV():
                self._store(table, step)
            case Attend():
                if self.frame.batch is Batch.MANY:
                    self._attend_many(table, step)
                else:
                    self._attend_each(table, step)
            case Gate():
                kernel, width = gates.GATES[step.activation], self.frame.width(step.gate)
                sources = (step.gate, step.up)
                self.frame.add_columns(table, kernel, sources, step.target, width=width)
            case Activate():
                self._on_columns(table, step, gates.ALONE[step.activation])
            case Add():
                self._on_columns(table, step, elementwise.add, source=step.source)
            case Scale():
                self._on_columns(table, step, elementwise.scale, float(step.factor))
            case SoftCap():
                self._on_columns(table, step, elementwise.softcap, float(step.cap))
            case Route():
                self._mixture.route(table, step)
            case ExpertMatMul():
                self._mixture.product(table, step)
            case ExpertBias():
                self._mixture.bias(table, step)
            case ExpertSum():
                self._mixture.sum(table, step)
            case SigmoidScale():
                self._sigmoid_scale(table, step)
            case Show():
                raise ValueError("what an observer is told is no part of a table")
            case _:
                unknown(step)

    def _on_columns(
        self,
        table: Table,
        step: AddBias | Activate | Add | Scale | SoftCap,
        kernel: Kernel,
        *constants: int | float,
        source: str | None = None,
        width: int = 0,
    ) -> None:
        """An operation on the columns of the step's target."""
        self.frame.add_columns(
            table,
            kernel,
            () if source is None else (source,),
            step.target,
            width=width or self.frame.width(step.target),
            constants=constants,
        )

    def _sigmoid_scale(self, table: Table, step: SigmoidScale) -> None:
        width = self.frame.width(step.target)
        places = (
            *self.frame.places[step.gate].arguments,
            *self.frame.places[step.target].arguments,
        )
        accesses = [
            *self.frame.access(step.gate, WHOLE),
            *self.frame.access(step.target, columns(width), written=True),
        ]
        units = Units(row_groups(width), parts=self.memory.n_threads)
        kernel = elementwise.sigmoid_scale
        table.add(kernel, (*places, width), accesses, units, columns(width))

    def _rms_norm(self, table: Table, step: RMSNorm) -> None:
        groups = self.frame.width(step.source) // len(step.weight)
        constants = (self.frame.vector(step.weight), len(step.weight), groups)
        kernel = elementwise.rms_norm
        self._norm(table, step, kernel, (*constants, float(step.epsilon)), groups)

    def _layer_norm(self, table: Table, step: LayerNorm) -> None:
        size = step.weight.shape[-1]
        groups = self.frame.width(step.source) // size
        along = size * 4 if step.weight.ndim == 2 else 0
        vectors = (self.frame.vector(step.weight), self.frame.vector(step.bias))
        constants = (*vectors, along, size, groups, float(step.epsilon))
        self._norm(table, step, elementwise.layer_norm, constants, groups)

    def _norm(
        self,
        table: Table,
        step: RMSNorm | LayerNorm,
        kernel: Kernel,
        constants: tuple[int | float, ...],
        groups: int,
    ) -> None:
        frame = self.frame
        owned = frame.is_owned(step.target)
        places = (*frame.places[step.source].arguments, *frame.places[step.target].arguments)
        accesses = [
            *frame.access(step.source, WHOLE if owned else items(groups)),
            *frame.access(step.target, items(groups), written=True),
        ]
        frame.add_items(table, kernel, (*places, *constants), accesses, groups, owned=owned)

    def _rope(self, table: Table, step: Rope) -> None:
        key = id(step.table)
        if key not in self._ropes:
            angles = step.table.angles(np.arange(self.memory.n_positions))
            self._ropes[key] = (
                self.memory.arena.hold(angles[0]),
                self.memory.arena.hold(angles[1]),
            )
        arguments = (
            *self.frame.places[step.target].arguments,
            step.n_heads,
            step.head_dim,
            step.table.n_dims,
            int(step.table.interleaved),
            *self._ropes[key],
        )
        accesses = self.frame.access(step.target, items(step.n_heads), written=True)
        self.frame.add_items(table, elementwise.rope, arguments, accesses, step.n_heads)

    def _store(self, table: Table, step: StoreKV) -> None:
        cache = self.memory.caches[step.layer]
        shape, kv = cache.shape, self.memory.kv
        arguments = (
            *self.frame.places[step.keys].arguments,
            *self.frame.places[step.values].arguments,
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
            *self.frame.access(step.keys, items(shape.n_kv_heads)),
            *self.frame.access(step.values, items(shape.n_kv_heads)),
            writes(f"cache {step.layer}", items(shape.n_kv_heads)),
        ]
        self.frame.add_items(table, kv_cache.store_kv, arguments, accesses, shape.n_kv_heads)

    def _attention(self, step: Attend) -> tuple[int | float, ...]:
        cache = self.memory.caches[step.layer]
        shape, kv = cache.shape, self.memory.kv
        return (
            *self.frame.places[step.queries].arguments,
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

    def _attend_each(self, table: Table, step: Attend) -> None:
        """Each token by itself."""
        shape = self.memory.caches[step.layer].shape
        kv = self.memory.kv
        sizes = ((s.n_heads, s.value_dim) for s in self.frame.stage.caches)
        stride = max(attention.partial_bytes(n, dim, kv) for n, dim in sizes)
        if not self._partials:
            n_tokens = 1 if self.frame.one_token else FEW_TOKENS
            self._partials = self.memory.arena.zeros(n_tokens * stride)
        table.add(
            attention.attend_chunks,
            (
                *self._attention(step),
                kv.score.address,
                kv.mix.address,
                self._partials,
                *_softcap(step),
                stride,
            ),
            [
                *self.frame.access(step.queries, WHOLE),
                reads(f"cache {step.layer}"),
                writes(PARTIALS, "chunks"),
            ],
            Units(per_chunk=shape.n_kv_heads, parts=self.frame.most_parts()),
        )
        target = self.frame.places[step.target]
        owned = self.frame.is_owned(step.target)
        arguments = (
            *target.arguments,
            shape.n_heads,
            shape.value_dim,
            kv.padded(shape.value_dim),
            step.window,
            self._partials,
            self.frame.vector(step.sinks),
            stride,
        )
        accesses = [reads(PARTIALS), *self.frame.access(step.target, "heads", written=True)]
        parts = 0 if owned else self.frame.most_parts()
        units = Units(per_token=shape.n_heads, parts=parts)
        table.add(attention.combine, arguments, accesses, units)

    def _attend_many(self, table: Table, step: Attend) -> None:
        target = self.frame.places[step.target]
        accesses = [
            *self.frame.access(step.queries, WHOLE),
            reads(f"cache {step.layer}"),
            *self.frame.access(step.target, "blocks of queries", written=True),
        ]
        kv = self.memory.kv
        halves = [0 if k is None else k.address for k in (kv.key_halves, kv.value_halves)]
        arguments = (
            *self._attention(step),
            *halves,
            target.base,
            target.token_stride,
            *_softcap(step),
            self.frame.vector(step.sinks),
        )
        n_kv_heads = self.memory.caches[step.layer].shape.n_kv_heads
        units = Units(per_chunk=n_kv_heads, parts=EACH)
        table.add(attention.attend_tiles, arguments, accesses, units)


def is_apart(step: Instruction) -> bool:
    """Whether it is done between tables: a product with what is streamed or lacks kernels; Show."""
    if isinstance(step, Show):
        return True
    if not isinstance(step, (MatMul, ExpertMatMul)):
        return False
    return isinstance(_matrix(step).data, StreamedRows) or lacks_kernels(step)


def lacks_kernels(step: MatMul | ExpertMatMul) -> bool:
    """Whether a product's format has none."""
    return _matrix(step).quant.name not in FORMATS


def _matrix(step: MatMul | ExpertMatMul) -> Matrix:
    return step.matrix if isinstance(step, MatMul) else step.experts[0]


def _softcap(step: Attend) -> tuple[int | float, ...]:
    """The kernel of a soft-cap and the cap, of scores that are log2(e) times as large."""
    if not step.softcap:
        return 0, 0
    return attention.cap_scores.address, float(step.softcap * attention.LOG2_E)
